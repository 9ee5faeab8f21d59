"""Whether the packages in dist/ may be published under a tag. `make release TAG=v0.2.0` builds them and runs it.

    python tools/release.py v0.2.0

Prints what is in the way, a line each, and exits with 1; or the notes of the release.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Collection, Iterator
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parent.parent
URLS = ("Homepage", "Source", "Issues", "Changelog")


def faults(tag: str, version: str, urls: Collection[str], changelog: str, changed: str) -> Iterator[str]:
    """What is in the way of publishing the tree as `tag`.

    Parameters:
        tag: the name of the Git tag, "v" and the version
        version: of the package
        urls: the names of its project URLs
        changelog: the text of CHANGELOG.md
        changed: what `git status --porcelain` prints

    """
    if not re.fullmatch(r"v\d+\.\d+\.\d+((a|b|rc)\d+)?", tag):
        yield f"{tag}: expected a tag such as v0.2.0 or v0.2.0rc1"
    elif tag != f"v{version}":
        yield f"reshard/_version.py: has version {version}, but the tag is {tag}"
    headings = re.findall(r"^## (.*)", changelog, re.MULTILINE)
    if not headings or not re.fullmatch(rf"{re.escape(tag[1:])} \(\d{{4}}-\d\d-\d\d\)", headings[0]):
        found = headings[0] if headings else "none"
        yield f"CHANGELOG.md: expected its first heading to be `## {tag[1:]} (year-month-day)`, found {found!r}"
    elif not notes(changelog):
        yield f"CHANGELOG.md: says nothing of {tag[1:]}"
    if missing := [name for name in URLS if name not in urls]:
        yield f"pyproject.toml: [project.urls] lacks {', '.join(missing)}, which PyPI shows"
    if changed:
        yield f"not committed: {' '.join(changed.split())}"


def notes(changelog: str) -> str:
    """What a release says: the first section of the changelog, without its heading."""
    return re.split(r"^## .*\n", changelog, flags=re.MULTILINE)[1].strip()


def main(tag: str) -> int:
    """Print the notes of the release, or what is in its way."""
    (wheel,) = (ROOT / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    urls = [entry.split(",")[0] for entry in metadata.get_all("Project-URL", [])]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    status = ["git", "status", "--porcelain"]
    changed = subprocess.run(status, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = list(faults(tag, metadata["Version"], urls, changelog, changed))
    print("\n".join(found) or notes(changelog))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
