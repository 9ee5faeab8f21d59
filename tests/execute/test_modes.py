"""Permissions: what is made from files that only some may read is for them only, at every moment."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Spec, build
from command_line import run_well
from oracle import assert_identical_trees

import reshard.execute.run

OPTIONS = ("--ep", 3, "--max-shard-size", 20_000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint in several files, with a folder."""
    build(Spec("deepseek_v3", experts=8), tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The umask during a test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def set_modes(root: Path, file: int, folder: int) -> None:
    """Give all files, and all folders, the same permissions."""
    for path in [*root.rglob("*"), root]:
        path.chmod(folder if path.is_dir() else file)


@pytest.mark.parametrize(("file", "folder"), [(0o600, 0o700), (0o640, 0o750), (0o444, 0o555), (0o664, 0o775)])
@pytest.mark.parametrize("layout", ["ranks", "source"])
def test_files_and_folders_keep_the_permissions_of_the_source(
    file: int, folder: int, layout: str, umask: int, source: Path, tmp_path: Path
) -> None:
    set_modes(source, file, folder)
    out, staged, back = (tmp_path / name for name in ("out", "staged", "back"))
    run_well("zigzag", "--src", source, "--out", out, *OPTIONS, "--layout", layout)
    run_well("stage", out, "--ranks", "0", "--out", staged)
    run_well("restore", out, "--out", back)
    assert_identical_trees(source, back)
    for root in (out, staged, back):
        assert mode(root) == folder & ~umask | 0o700, "who writes it can write to it; otherwise as any new folder"
        for path in root.rglob("*"):
            if path.is_dir():
                assert mode(path) == folder, path
            elif path.name in ("reshard_manifest.json", "model.safetensors.index.json"):
                assert mode(path) in (file, file & ~umask & 0o666), "new files: what umask and the source allow"
            else:
                assert mode(path) == file, path


def test_a_file_is_for_those_who_may_read_all_that_it_is_made_from(source: Path, tmp_path: Path) -> None:
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 2
    shards[0].chmod(0o640)
    shards[1].chmod(0o604)
    (source / "tokenizer.json").chmod(0o755)
    (source / "config.json").chmod(0o600)
    run_well("zigzag", "--src", source, "--out", tmp_path / "out", "--ep", 3)
    assert {mode(path) for path in (tmp_path / "out").glob("model-ep*")} == {0o600}
    assert mode(tmp_path / "out" / "tokenizer.json") == 0o755
    assert mode(tmp_path / "out" / "config.json") == 0o600
    assert mode(tmp_path / "out" / "reshard_manifest.json") == 0o600, "it holds config.json and the headers"


def test_nobody_else_may_read_a_file_while_it_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_modes(source, 0o600, 0o700)
    out, seen = tmp_path / "out", set()
    (tmp_path / "out").mkdir(mode=0o755)

    def look(count: int) -> None:
        seen.update(mode(path) for path in out.glob("*.partial"))

    write_file = reshard.execute.run.write_file

    def write_and_look(*arguments: Any) -> Any:
        *others, progress = arguments
        return write_file(*others, lambda count: (look(count), progress(count)))

    monkeypatch.setattr(reshard.execute.run, "write_file", write_and_look)
    run_well("zigzag", "--src", source, "--out", out, *OPTIONS, "--workers", 1)
    assert seen == {0o600}
    assert mode(out) == 0o755, "a folder that was there keeps its permissions"


def test_what_a_link_leads_to_decides(source: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in source.glob("*.safetensors"):
        shutil.move(path, blobs / path.name)
        path.symlink_to(blobs / path.name)
        (blobs / path.name).chmod(0o640)
    run_well("zigzag", "--src", source, "--out", tmp_path / "out", *OPTIONS)
    assert {mode(path) for path in (tmp_path / "out").glob("*.safetensors")} == {0o640}
