"""A run cut short at any point: nothing loadable is left, and the same command ends as if nothing had happened."""

from __future__ import annotations

import fcntl
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from checkpoints import Spec, build
from interruption import Cut, cut_after, cut_before, is_loadable, resumed_after_every_cut
from oracle import assert_identical_trees, tree
from scratch import checkpoint

from reshard import OutputError, restore, verify, zigzag

JOURNAL = ".reshard-journal"
SHARD_SIZE = 1_000  # makes some eighty files


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    return checkpoint(tmp_path_factory, Spec("deepseek_v3", experts=8, layers=3))


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its output, made without interruption."""
    out = tmp_path_factory.mktemp("resume") / "whole"
    zigzag(source, out, 3, max_shard_size=SHARD_SIZE)
    return out


def test_a_run_cut_anywhere_is_taken_up_and_ends_the_same(source: Path, whole: Path, tmp_path: Path) -> None:
    write = partial(zigzag, source, ep_size=3, max_shard_size=SHARD_SIZE)
    resumed = resumed_after_every_cut(whole, tmp_path / "out", 3, write, lambda out: write(out).resumed)
    assert len(resumed) > 20
    assert resumed[0] == 0
    assert resumed[-1] > 40


@pytest.mark.parametrize("name", ["reshard_manifest.json", "model.safetensors.index.json", "config.json"])
def test_a_run_cut_before_a_last_file_is_not_loadable_and_ends_the_same(
    name: str, source: Path, whole: Path, tmp_path: Path
) -> None:
    with cut_before(name):
        zigzag(source, tmp_path / "out", 3, max_shard_size=SHARD_SIZE)
    assert not (tmp_path / "out" / "config.json").exists()
    zigzag(source, tmp_path / "out", 3, max_shard_size=SHARD_SIZE)
    assert_identical_trees(whole, tmp_path / "out")


def test_restore_is_taken_up_too(source: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Cut):
        restore(whole, tmp_path / "back", progress=cut_after(5), workers=1)
    assert not is_loadable(tmp_path / "back")
    assert restore(whole, tmp_path / "back").resumed > 0
    assert_identical_trees(source, tmp_path / "back")


def test_a_journal_whose_last_line_is_cut_short_is_read_up_to_it(source: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Cut):
        zigzag(source, out, 3, max_shard_size=SHARD_SIZE, progress=cut_after(20), workers=1)
    journal = (out / JOURNAL).read_bytes()
    (out / JOURNAL).write_bytes(journal[:-30])
    complete = journal.count(b"\n") - 1
    assert zigzag(source, out, 3, max_shard_size=SHARD_SIZE).resumed == complete - 1
    assert_identical_trees(whole, out)


def test_a_journal_cut_short_is_taken_up_more_than_once(source: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(3):
        with pytest.raises(Cut):
            zigzag(source, out, 3, max_shard_size=SHARD_SIZE, progress=cut_after(12), workers=1)
        with (out / JOURNAL).open("ab") as journal:
            journal.write(b'{"name":"model-')
    assert zigzag(source, out, 3, max_shard_size=SHARD_SIZE).resumed > 12
    assert_identical_trees(whole, out)


def test_a_run_that_comes_late_does_not_write_into_a_finished_output(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    # as if the other had finished just after it looked
    monkeypatch.setattr("reshard.commands.writing.finished_output", lambda out: None)
    monkeypatch.setattr("reshard.execute.ready.check_out", lambda out, replace: None)
    with pytest.raises(OutputError, match="no longer empty"):
        zigzag(source, out, 2)
    assert_identical_trees(whole, out)


def test_an_output_in_a_folder_that_the_source_links_to_is_refused(tmp_path: Path) -> None:
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    build(Spec("qwen3_moe"), source)
    elsewhere.mkdir()
    (source / "linked").symlink_to(elsewhere)
    with pytest.raises(OutputError, match="never written to"):
        zigzag(source, elsewhere / "out", 2)
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    "names", [("big.bin", "big.bin.partial"), ("config.json.partial/x",), ("model-shared.partial", "y")]
)
def test_names_that_a_run_itself_uses_are_refused_where_they_would_collide(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    build(Spec("qwen3_moe"), source)
    for name in names:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    if names[0].startswith("model-shared"):  # the control: a name that looks like one and collides with none
        zigzag(source, tmp_path / "out", 2)
        return
    with pytest.raises(OutputError, match=r"rename the source's"):
        zigzag(source, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_a_file_that_lost_bytes_since_is_written_again(source: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Cut):
        zigzag(source, out, 3, max_shard_size=SHARD_SIZE, progress=cut_after(20), workers=1)
    complete = sorted(out.glob("*.safetensors"))
    complete[0].write_bytes(complete[0].read_bytes()[:-1])
    assert zigzag(source, out, 3, max_shard_size=SHARD_SIZE).resumed == len(complete) - 1
    assert_identical_trees(whole, out)


def test_a_second_run_at_the_same_time_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Cut):
        zigzag(source, out, 3, max_shard_size=SHARD_SIZE, progress=cut_after(5), workers=1)
    before = tree(out)
    with (out / JOURNAL).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for restart in (False, True):
            with pytest.raises(OutputError, match="another run"):
                zigzag(source, out, 3, max_shard_size=SHARD_SIZE, restart=restart)
    assert tree(out) == before
    zigzag(source, out, 3, max_shard_size=SHARD_SIZE)  # the control: let go, it goes on


def test_restart_removes_what_the_unfinished_run_wrote_and_nothing_else(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Cut):
        zigzag(source, out, 3, max_shard_size=SHARD_SIZE, progress=cut_after(30), workers=1)
    (out / "mine.txt").write_text("not reshard's")
    zigzag(source, out, 2, restart=True)
    assert (out / "mine.txt").read_text() == "not reshard's"
    assert not list(out.glob("model-ep*-of-03-*"))
    assert [problem.split(":")[0] for problem in verify(out, source).problems] == [str(out / "mine.txt")]
    (out / "mine.txt").unlink()
    assert not verify(out, source).problems


def test_a_journal_that_names_files_elsewhere_removes_nothing_there(source: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("keep")
    (tmp_path / "out").mkdir()
    opening = {"fingerprint": "x", "names": ["../victim", str(victim)]}
    (tmp_path / "out" / JOURNAL).write_text(json.dumps(opening) + "\n")
    zigzag(source, tmp_path / "out", 2, restart=True)
    assert victim.read_text() == "keep"
