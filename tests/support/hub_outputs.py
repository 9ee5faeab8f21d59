"""What tests of remote sources compare: outputs made from elsewhere, and the lines of refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from command_line import run
from oracle import tree

MANIFEST = "reshard_manifest.json"


def committed(directory: Path, target: Path) -> Path:
    """A copy without empty folders, which a repository cannot hold."""
    shutil.copytree(directory, target)
    for folder in sorted(target.rglob("*"), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return target


def refused(*arguments: object) -> str:
    """The one line with which a command refuses."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("reshard: error")]
    return line


def assert_same_output(expected: Path, actual: Path) -> None:
    """Every file is the same, and the manifests differ only in what they say of the source's place and times."""
    ours, theirs = (json.loads((out / MANIFEST).read_bytes()) for out in (actual, expected))
    for manifest in (ours, theirs):
        for key in ("path", "repo_id", "revision"):
            manifest["source"].pop(key)
        manifest.pop("fingerprint"), manifest.pop("digest")
    assert ours == theirs
    assert {**tree(expected), MANIFEST: ""} == {**tree(actual), MANIFEST: ""}
