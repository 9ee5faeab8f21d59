"""Holes in a source: weights that were never written, on the file systems that sources lie on."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import hostile
import pytest
from checkpoints import Spec, build
from command_line import run, run_well
from filesystems import mounted

FILE = "model.safetensors"
FILE_SYSTEMS = ["tmpfs", "ext4", "xfs", "btrfs"]


@pytest.fixture(params=FILE_SYSTEMS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty directory on a file system of each kind."""
    if request.param == "tmpfs":
        (tmp_path / "tmpfs").mkdir()
        yield tmp_path / "tmpfs"
        return
    with mounted(request.param, tmp_path, 400) as disk:
        yield disk.path


def make(folder: Path) -> Path:
    """A sound checkpoint of one file, 4 MB, most of it experts."""
    build(Spec("qwen3_moe", files=1, scale=16, layers=2, aligned=True, shuffled=False), folder / "src")
    return folder / "src"


def start_of_data(path: Path) -> int:
    """Where the header ends."""
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def rewrite(path: Path, *written: tuple[int, int], reserve: bool = False) -> None:
    """Replace the file by one with only these ranges written; elsewhere it has holes, or reserved space."""
    data = path.read_bytes()
    path.unlink()
    with path.open("wb") as file:
        if reserve:
            os.posix_fallocate(file.fileno(), 0, len(data))
        file.truncate(len(data))
        for begin, end in written:
            file.seek(begin)
            file.write(data[begin:end])
        file.flush()
        os.fsync(file.fileno())


def zigzag(src: Path, *more: object) -> tuple[object, ...]:
    """Arguments of `reshard zigzag`."""
    return ("zigzag", "--src", src, "--ep", 2, "--out", src.with_name("out"), *more)


def assert_refused(*arguments: object) -> None:
    """One line names file and tensor, and says what to do."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert f"{FILE}: tensor model." in line
    assert "never written" in line
    assert "download the file again" in line
    assert "--allow-holes" in line


@pytest.mark.parametrize("reserve", [False, True])
@pytest.mark.parametrize("was_read", [False, True])
def test_the_rest_of_a_file_that_was_never_written_is_found(reserve: bool, was_read: bool, folder: Path) -> None:
    src = make(folder)
    size = (src / FILE).stat().st_size
    rewrite(src / FILE, (0, size // 2), reserve=reserve)
    if was_read and folder.name == "tmpfs" and reserve:
        pytest.skip("tmpfs cannot tell reserved space that was read from data")
    if was_read:
        (src / FILE).read_bytes()
    assert_refused(*zigzag(src))
    assert_refused(*zigzag(src, "--dry-run"))
    assert not (folder / "out").exists()
    assert "was not all written: a hole" in run_well("inspect", src)


def test_a_hole_of_one_page_inside_a_tensor_is_found(folder: Path) -> None:
    src = make(folder)
    size = (src / FILE).stat().st_size
    hole = size // 2 // 4096 * 4096
    rewrite(src / FILE, (0, hole), (hole + 4096, size))
    assert_refused(*zigzag(src))


def test_a_file_that_was_just_written_has_no_holes(folder: Path) -> None:
    """Before it is on disk, a file system may report it as a hole."""
    src = make(folder)
    run_well(*zigzag(src))
    run_well("verify", folder / "out", "--src", src)


def test_zeros_that_were_written_are_no_holes(folder: Path) -> None:
    src = make(folder)
    path = src / FILE
    start, size = start_of_data(path), path.stat().st_size
    with path.open("r+b") as file:
        file.seek(start + size // 3)
        file.write(bytes(1 << 20))
        os.fsync(file.fileno())
    run_well(*zigzag(src))


def test_allowed_holes_are_the_model_s_zeros(folder: Path) -> None:
    src = make(folder)
    size = (src / FILE).stat().st_size
    rewrite(src / FILE, (0, size // 2))
    out = folder / "out"
    run_well(*zigzag(src, "--allow-holes"))
    assert_refused("verify", out, "--src", src)
    run_well("verify", out, "--src", src, "--allow-holes")


def test_verify_with_the_source_finds_holes_that_came_later(tmp_path: Path) -> None:
    hostile.write_base(tmp_path / "src", hidden=256, inner=128)
    run_well("zigzag", "--src", tmp_path / "src", "--ep", 2, "--out", tmp_path / "out")
    path = tmp_path / "src" / hostile.SHARD
    rewrite(path, (0, path.stat().st_size - 65536))
    result = run("verify", tmp_path / "out", "--src", tmp_path / "src")
    assert result.exit_code == 1
    assert "never written" in result.stderr


def test_gates_that_were_never_written_are_not_analyzed(tmp_path: Path) -> None:
    src = make(tmp_path)
    path = src / FILE
    size = path.stat().st_size
    rewrite(path, (0, start_of_data(path)))
    assert_refused("analyze", src, "--ep", 2, "--tokens", 16)
    shutil.rmtree(src)
    make(tmp_path)
    run_well("analyze", src, "--ep", 2, "--tokens", 16)
    assert path.stat().st_size == size
