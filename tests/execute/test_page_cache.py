"""What a command does to the page cache: a file that others have in memory stays there, and no other file comes in."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import Spec
from command_line import run_well
from scratch import checkpoint

import reshard.execute.sources
from reshard.execute import page_cache
from reshard.execute.page_cache import resident

PAGE = mmap.PAGESIZE


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of some files of many pages."""
    return checkpoint(
        tmp_path_factory, Spec("deepseek_v3", experts=16, layers=3, scale=32, aligned=True, shuffled=False)
    )


@pytest.fixture
def disk(source: Path) -> Iterator[Path]:
    """A folder on a disk, not in memory, with the checkpoint `source` in it."""
    folder = Path(tempfile.mkdtemp(dir="/var/tmp"))
    try:
        shutil.copytree(source, folder / "source")
        yield folder
    finally:
        shutil.rmtree(folder)


def cached(path: Path) -> list[bool]:
    """For each page of a file, whether it is in the page cache."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as memory:
        pages = (ctypes.c_ubyte * -(-size // PAGE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
        return [bool(page & 1) for page in pages]


def share_cached(folder: Path) -> float:
    """The share of the folder's weights that is in the page cache."""
    found = [page for path in folder.glob("*.safetensors") for page in cached(path)]
    return sum(found) / len(found)


def drop(folder: Path) -> None:
    """Take the folder's weights out of the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path, start: int, end: int) -> None:
    """Bring a part of a file into the page cache, and no more."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.seek(start)
        assert len(file.read(end - start)) == end - start


def zigzag(disk: Path, *options: object) -> None:
    run_well("zigzag", "--src", disk / "source", "--ep", 3, "--out", disk / "out", *options)


@pytest.mark.parametrize("layout", ["ranks", "source"])
@pytest.mark.parametrize("before", [0.0, 0.5, 1.0])
def test_what_was_cached_stays_and_nothing_else_does(layout: str, before: float, disk: Path) -> None:
    drop(disk / "source")
    for path in (disk / "source").glob("*.safetensors"):
        size = path.stat().st_size
        read(path, 0, int(size * before) // PAGE * PAGE if before < 1 else size)
    assert share_cached(disk / "source") == pytest.approx(before, abs=0.02)
    zigzag(disk, "--layout", layout, "--workers", 3)
    assert share_cached(disk / "source") == pytest.approx(before, abs=0.02)
    assert share_cached(disk / "out") < 0.02
    run_well("verify", disk / "out")
    assert share_cached(disk / "out") < 0.02
    run_well("restore", disk / "out", "--out", disk / "back")
    assert share_cached(disk / "out") < 0.02
    assert share_cached(disk / "back") < 0.02
    if before == 1:
        run_well("verify", disk / "out", "--src", disk / "source")
        assert share_cached(disk / "source") > 0.98


def test_where_the_kernel_does_not_tell_what_was_cached_all_that_was_read_is_dropped(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the control of the test above: what stays there is gone here."""
    monkeypatch.setattr(reshard.execute.sources, "resident", lambda *arguments: ())
    for path in (disk / "source").glob("*.safetensors"):
        read(path, 0, path.stat().st_size)
    zigzag(disk)
    assert share_cached(disk / "source") < 0.1


def test_each_page_is_asked_about_only_where_some_are_cached(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gigabyte that is not cached would take as long as a whole run that shares its blocks."""
    path = disk / "large.safetensors"
    with path.open("wb") as file:
        file.write(os.urandom(1 << 20))
        file.truncate(1 << 30)
    drop(disk)
    read(path, 5 * PAGE, 7 * PAGE)
    asked, pages = [], page_cache._pages
    monkeypatch.setattr(page_cache, "_pages", lambda file, start, size: asked.append(start) or pages(file, start, size))
    with path.open("rb") as file:
        assert list(resident(file.fileno(), 0, 1 << 30)) == [(5 * PAGE, 7 * PAGE)]
        assert asked == [0], "Linux 6.5 and later tell that the others have none"
        monkeypatch.setattr(page_cache, "_is_absent", lambda *arguments: False)
        assert list(resident(file.fileno(), 0, 1 << 30)) == [(5 * PAGE, 7 * PAGE)]
        assert len(asked) > 2


def test_only_a_file_s_owner_and_who_may_write_to_it_are_told(disk: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("becoming another user takes root")
    path = max((disk / "source").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    read(path, 0, path.stat().st_size)
    with path.open("rb") as file:
        asked = (file.fileno(), 0, path.stat().st_size)
        assert list(resident(*asked)) == [(0, -(-path.stat().st_size // PAGE) * PAGE)]
        os.seteuid(12345)  # the file is root's and 0644
        try:
            assert list(resident(*asked)) == []
        finally:
            os.seteuid(0)
