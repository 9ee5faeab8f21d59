"""What some file systems refuse: locks, syncing a directory, changing permissions. Each is a case, not a crash."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import Spec
from command_line import run, run_well
from interruption import Cut, cut_after, is_loadable
from oracle import assert_identical_trees, tree
from scratch import checkpoint

from reshard import OutputError, zigzag

JOURNAL, LOCK = ".reshard-journal", ".reshard-lock"
SHARD_SIZE = 2_000
Refusal = Callable[..., Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    return checkpoint(tmp_path_factory, Spec("deepseek_v3", experts=8, layers=3))


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its output, from a file system that can do all."""
    out = tmp_path_factory.mktemp("file-systems") / "whole"
    zigzag(source, out, 3, max_shard_size=SHARD_SIZE)
    return out


def command(source: Path, out: Path) -> list[object]:
    return ["zigzag", "--src", source, "--out", out, "--ep", 3, "--max-shard-size", SHARD_SIZE]


@contextmanager
def refusing(module: Any, name: str, number: int, when: Callable[..., bool] = lambda *_: True) -> Iterator[None]:
    """A block in which a system call fails with this error number for some arguments."""
    call = getattr(module, name)

    def refuse(*arguments: Any) -> Any:
        if when(*arguments):
            raise OSError(number, os.strerror(number))
        return call(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, refuse)
        yield


def is_directory(fd: int) -> bool:
    return stat.S_ISDIR(os.fstat(fd).st_mode)


NO_LOCKS = [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL]


@pytest.mark.parametrize("number", NO_LOCKS)
def test_without_locks_a_file_is_the_lock_and_the_summary_says_so_once(
    number: int, source: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with refusing(fcntl, "flock", number):
        said = run_well(*command(source, out))
    assert said.count("has no locks") == 1
    assert f"{out / LOCK} is the lock" in said
    assert tree(out) == tree(whole)


def test_without_locks_a_second_run_is_refused_and_a_killed_one_leaves_a_lock_that_only_the_user_may_break(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with refusing(fcntl, "flock", errno.ENOSYS):

        def try_again(written: int) -> None:
            before = tree(out)
            for more in ([], ["--restart"], ["--dry-run"]):
                refused = run(*command(source, out), *more)
                assert refused.exit_code == 1
                assert str(out / LOCK) in refused.stderr
                assert f"process {os.getpid()} on {os.uname().nodename}" in refused.stderr
            assert tree(out) == before
            raise Cut

        with pytest.raises(Cut):
            zigzag(source, out, 3, max_shard_size=SHARD_SIZE, workers=1, progress=try_again)
        assert not (out / LOCK).exists(), "a run that ends lets go of it, whatever ended it"
        (out / LOCK).write_text("process 1 on another\n")  # as a run leaves it that was killed
        refused = run(*command(source, out))
        assert "process 1 on another" in refused.stderr
        assert "remove this file" in refused.stderr
        assert not is_loadable(out)
        (out / LOCK).unlink()
        run_well(*command(source, out))
    assert_identical_trees(whole, out)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_directories_are_not_synced_a_run_goes_on_and_says_so_once(
    number: int, source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, synced = tmp_path / "out", []
    monkeypatch.setattr(os, "sync", lambda: synced.append((out / JOURNAL).exists()))
    with refusing(os, "fsync", number, is_directory):
        report = json.loads(run_well(*command(source, out), "--json"))
        assert [str(out) in note and "does not sync directories" in note for note in report["file_system_notes"]] == [
            True
        ]
        assert synced == [True], "all that the run wrote is on disk before its journal goes"
        back = tmp_path / "back"
        assert run_well("restore", out, "--out", back).count("does not sync directories") == 1
    assert_identical_trees(whole, out)
    assert_identical_trees(source, back)
    assert json.loads(run_well(*command(source, tmp_path / "again"), "--json"))["file_system_notes"] == []


def test_a_name_that_was_lost_for_want_of_a_synced_directory_is_written_again(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    """What a power cut may leave there: the journal has a file, and the directory has not."""
    out = tmp_path / "out"
    with refusing(os, "fsync", errno.EINVAL, is_directory), pytest.raises(Cut):
        zigzag(source, out, 3, max_shard_size=SHARD_SIZE, workers=1, progress=cut_after(20))
    min(out.glob("*.safetensors")).unlink()
    zigzag(source, out, 3, max_shard_size=SHARD_SIZE)
    assert_identical_trees(whole, out)


@pytest.mark.parametrize(
    ("module", "name", "when"),
    [
        (fcntl, "flock", lambda *_: True),
        (os, "fsync", is_directory),
        (os, "fsync", lambda fd: not is_directory(fd)),
        (os, "mkdir", lambda *_: True),
    ],
)
def test_a_call_that_fails_is_told_with_a_path_and_what_to_do(
    module: Any, name: str, when: Callable[..., bool], source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with refusing(module, name, errno.EIO, when):
        failed = run(*command(source, out))
        assert failed.exit_code == 1
        assert len(failed.stderr.splitlines()) == 1
        assert "Input/output error" in failed.stderr
        assert str(tmp_path) in failed.stderr
        assert "rerun the command" in failed.stderr or "choose another --out" in failed.stderr
        with pytest.raises(OutputError):
            zigzag(source, out, 3, max_shard_size=SHARD_SIZE)
    assert not is_loadable(out)


@pytest.mark.parametrize("name", ["chmod", "posix_fadvise"])
def test_what_only_helps_may_be_refused(name: str, source: Path, whole: Path, tmp_path: Path) -> None:
    with refusing(os, name, errno.EOPNOTSUPP):
        run_well(*command(source, tmp_path / "out"))
    assert_identical_trees(whole, tmp_path / "out")


def test_a_sparse_source_on_a_read_only_image_is_read(whole: Path, source: Path, tmp_path: Path) -> None:
    """Squashfs refuses to sync its files; nothing of them is waiting to be written."""
    fstat = os.fstat

    def is_source(fd: int) -> bool:
        return Path(f"/proc/self/fd/{fd}").resolve().is_relative_to(source)

    def sparse(fd: int) -> Any:
        status = fstat(fd)
        if not is_source(fd):
            return status
        kept = {name: getattr(status, name) for name in ("st_mode", "st_size", "st_mtime_ns", "st_uid")}
        return SimpleNamespace(**kept, st_blocks=0)

    with refusing(os, "fsync", errno.EINVAL, is_source), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fstat", sparse)
        run_well(*command(source, tmp_path / "out"))
    assert tree(tmp_path / "out") == tree(whole)
