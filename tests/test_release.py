"""What would be published: a wheel that holds all of the package and runs alone, under a tag that fits."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from checkpoints import Spec, build
from release import faults, notes
from scratch import made_once

ROOT = Path(__file__).parent.parent
URLS = ("Homepage", "Source", "Issues", "Changelog")
CHANGELOG = "# Changelog\n\n## 0.2.0 (2026-12-01)\n\n- It can fly.\n\n## 0.1.0\n\n- First.\n"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the files that Git knows, or would."""
    list_files = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(list_files, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")

    def make(directory: Path) -> None:
        for name in filter(lambda name: (ROOT / name).is_file(), names):
            if name.startswith("reshard/") or "/" not in name:
                (directory / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, directory / "tree" / name)
        command = [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            directory,
            directory / "tree",
        ]
        subprocess.run(command, check=True, capture_output=True)

    (found,) = made_once(tmp_path_factory, "wheel", make).glob("*.whl")
    return found


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    tracked = subprocess.run(["git", "ls-files", "reshard"], cwd=ROOT, capture_output=True, text=True, check=True)
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed >= set(tracked.stdout.split())
    assert {name for name in packed if not name.endswith(".py")} >= {
        "reshard/py.typed",
        "reshard/cli/output.schema.json",
        "reshard/traffic/page.html",
    }


def test_the_wheel_runs_alone_and_brings_the_command_and_the_plugin(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    build(Spec("deepseek_v3", experts=8), tmp_path / "source")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import reshard; assert reshard.__file__.startswith(sys.argv[1]);"
        "from reshard.cli.main import main; main(sys.argv[2:])"
    )
    arguments = ["analyze", tmp_path / "source", "--ep", "2", "--tokens", "16", "--html", tmp_path / "page.html"]
    command = [sys.executable, "-c", script, tmp_path / "installed", *arguments]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "page.html").stat().st_size > 10_000
    (points,) = (tmp_path / "installed").glob("*.dist-info/entry_points.txt")
    assert "[console_scripts]\nreshard = reshard.cli.main:main" in points.read_text()
    assert "[vllm.general_plugins]\nreshard = reshard.vllm:register" in points.read_text()


def test_a_tree_that_fits_its_tag_may_be_published() -> None:
    assert list(faults("v0.2.0", "0.2.0", URLS, CHANGELOG, "")) == []
    assert notes(CHANGELOG) == "- It can fly."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tag": "0.2.0"}, "expected a tag such as"),
        ({"tag": "v0.3.0"}, "has version 0.2.0, but the tag is v0.3.0"),
        ({"version": "0.2.0.dev0"}, "has version 0.2.0.dev0, but the tag is v0.2.0"),
        ({"changelog": CHANGELOG.replace("0.2.0 (2026-12-01)", "Unreleased")}, "found 'Unreleased'"),
        ({"changelog": CHANGELOG.replace(" (2026-12-01)", "")}, "found '0.2.0'"),
        ({"changelog": CHANGELOG.replace("- It can fly.", "")}, "says nothing of 0.2.0"),
        ({"changelog": ""}, "found 'none'"),
        ({"urls": ("Homepage",)}, "lacks Source, Issues, Changelog"),
        ({"changed": " M README.md\n"}, "not committed: M README.md"),
    ],
)
def test_what_does_not_fit_a_tag_is_said(change: dict[str, object], said: str) -> None:
    sound = {"tag": "v0.2.0", "version": "0.2.0", "urls": URLS, "changelog": CHANGELOG, "changed": ""}
    found = list(faults(**{**sound, **change}))  # type: ignore[arg-type]
    assert [line for line in found if said in line]
