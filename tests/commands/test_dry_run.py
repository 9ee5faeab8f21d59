"""`--dry-run` makes the run's own checks, with the run's own numbers, and ends as the run would; it changes nothing."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from checkpoints import Spec
from command_line import run, run_well
from filesystems import mounted
from interruption import Cut, cut_after
from oracle import tree
from scratch import checkpoint

from reshard import zigzag

RANKS = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 18 MB."""
    return checkpoint(tmp_path_factory, Spec("deepseek_v3", experts=8, layers=3, scale=16, aligned=True))


def command(source: Path, out: Path, *more: object) -> list[object]:
    return ["zigzag", "--src", source, "--ep", RANKS, "--out", out, *more]


def assert_both_refuse(arguments: list[object], *words: str) -> str:
    """Insist that the run and its rehearsal fail with the same line; return it."""
    rehearsed, tried = run(*arguments, "--dry-run"), run(*arguments)
    assert rehearsed.exit_code == tried.exit_code == 1, rehearsed.output
    assert rehearsed.stderr == tried.stderr
    assert len(tried.stderr.splitlines()) == 1
    for word in words:
        assert word in tried.stderr
    return tried.stderr


def test_a_disk_that_is_too_small_fails_with_the_numbers_of_the_run(source: Path, tmp_path: Path) -> None:
    with mounted("ext4", tmp_path, 24) as disk:
        line = assert_both_refuse(command(source, disk.path / "out"), "free some space")
        needed, free = map(int, re.findall(r"(\d+) bytes, (\d+) are free", line)[0])
        result = run(*command(source, disk.path / "out", "--dry-run", "--json"))
        assert result.exit_code == 1
        report = json.loads(result.stdout)
        assert (report["space_needed"], report["space_free"]) == (needed, free)
        assert "NOT ENOUGH" in run(*command(source, disk.path / "out", "--dry-run")).stdout
        assert not (disk.path / "out").exists()
    with mounted("ext4", tmp_path / "larger", 64) as disk:  # the control
        assert "NOT ENOUGH" not in run_well(*command(source, disk.path / "out", "--dry-run"))
        run_well(*command(source, disk.path / "out"))


def test_a_resumed_run_needs_only_the_rest(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = command(source, out, "--max-shard-size", "1MB", "--json", "--dry-run")
    before = json.loads(run_well(*arguments))["space_needed"]
    with pytest.raises(Cut):
        zigzag(source, out, RANKS, max_shard_size=10**6, workers=1, progress=cut_after(10))
    left = tree(out)
    assert json.loads(run_well(*arguments))["space_needed"] < before - (4 << 20)
    assert json.loads(run_well(*arguments, "--restart"))["space_needed"] == before
    assert tree(out) == left


def test_a_parent_that_cannot_be_written_to_is_noticed(source: Path, tmp_path: Path) -> None:
    with mounted("ext4", tmp_path, 64) as disk:
        (disk.path / "folder").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", disk.path], check=True)
        for out in (disk.path / "out", disk.path / "a" / "b", disk.path / "folder"):
            assert_both_refuse(command(source, out), "no permission to write to", str(disk.path))
        subprocess.run(["mount", "-o", "remount,rw", disk.path], check=True)
        run_well(*command(source, disk.path / "out", "--dry-run"))


def test_an_unfinished_run_that_it_cannot_resume_is_noticed_and_one_that_it_can_is_not(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Cut):
        zigzag(source, out, RANKS, workers=1, progress=cut_after(2))
    assert_both_refuse(command(source, out, "--max-shard-size", "2MB"), "other options")
    with (out / ".reshard-journal").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert_both_refuse(command(source, out), "another run of reshard is writing there")
    run_well(*command(source, out, "--max-shard-size", "2MB", "--dry-run", "--restart"))
    run_well(*command(source, out, "--dry-run"))
    run_well(*command(source, out))


def test_what_is_not_empty_is_noticed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("used", "file", "link"):
        assert_both_refuse(command(source, tmp_path / name), str(tmp_path / name))
    mine = shutil.copytree(source, tmp_path / "source")
    assert_both_refuse(command(mine, mine / "out"), "never written to")
