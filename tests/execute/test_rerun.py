"""A finished command that is run again succeeds and writes nothing, and an interrupted one goes on as it began."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Spec, build
from command_line import run, run_well
from forgery import forge
from interruption import Cut, cut_after, is_loadable
from oracle import assert_identical_trees, read_safetensors
from scratch import checkpoint
from traces import write_trace

import reshard.execute.journal
from reshard import Balanced, OutputError, Zigzag, place, zigzag

JOURNAL = ".reshard-journal"
MANIFEST = "reshard_manifest.json"
EXPERTS = 8
LAYERS = ("model.layers.1.mlp", "model.layers.2.mlp")
SHARD_SIZE = 4_000
OPTIONS = ("--ep", 4, "--max-shard-size", SHARD_SIZE)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    return checkpoint(tmp_path_factory, Spec("deepseek_v3", experts=EXPERTS, layers=3))


@pytest.fixture
def mine(source: Path, tmp_path: Path) -> Path:
    """A copy of it, with its times."""
    return shutil.copytree(source, tmp_path / "source")


@pytest.fixture
def out(mine: Path, tmp_path: Path) -> Path:
    """A finished output."""
    run_well("zigzag", "--src", mine, "--out", tmp_path / "out", *OPTIONS)
    return tmp_path / "out"


def state(directory: Path) -> dict[str, tuple[int, int, int]]:
    """All that writing would change: inode, time and size of every file and folder."""
    paths = [directory, *directory.rglob("*")]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def record_traffic(trace: Path, seed: int) -> Path:
    """Add a recording of 6000 tokens, most of which choose a few experts."""
    chance = random.Random(seed)
    weights = [chance.random() ** 4 for _ in range(EXPERTS)]
    tokens = [chance.choices(range(EXPERTS), weights)[0] for _ in range(6000)]
    chosen = [(token, (token + 1 + chance.randrange(EXPERTS - 1)) % EXPERTS) for token in tokens]
    return write_trace(trace, dict.fromkeys(LAYERS, chosen), EXPERTS)


@pytest.mark.parametrize(
    "more",
    [
        ("zigzag",),
        ("zigzag", "--layout", "source"),
        ("place", "--strategy", "node-zigzag", "--nodes", 2),
        ("place", "--strategy", "file", "--map", "{map}"),
        ("place", "--strategy", "balanced", "--trace", "{trace}"),
    ],
)
def test_a_finished_command_says_that_all_is_done_and_writes_nothing(
    more: tuple[str, ...], source: Path, tmp_path: Path
) -> None:
    (tmp_path / "map").write_text(json.dumps({"physical_to_logical": [7, 6, 5, 4, 3, 2, 1, 0]}))
    record_traffic(tmp_path / "trace", 0)
    out = tmp_path / "out"
    words = [str(word).format(map=tmp_path / "map", trace=tmp_path / "trace") for word in more]
    command = [*words, "--src", source, "--out", out, *OPTIONS]
    assert "already complete" not in run_well(*command)
    before = state(out)
    said = run_well(*command)
    assert "already complete" in said
    assert "no tensor was read" in said
    report = json.loads(run_well(*command, "--json"))
    assert report["already_complete"]
    assert report["output_size"] == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    run_well(*command, "--dry-run")
    assert state(out) == before


@pytest.mark.parametrize(
    "command",
    [
        ("zigzag", "--ep", 3, "--max-shard-size", SHARD_SIZE),
        ("zigzag", "--ep", 4),
        ("zigzag", *OPTIONS, "--layout", "source"),
        ("place", *OPTIONS, "--strategy", "node-zigzag", "--nodes", 2),
        # the same bytes, under another name in the contract
        ("place", *OPTIONS, "--strategy", "file", "--map", "{out}/reshard_manifest.json"),
    ],
)
def test_other_options_find_nothing_complete(command: tuple[Any, ...], mine: Path, out: Path) -> None:
    before = state(out)
    words = [str(word).format(out=out) for word in command]
    for more in ([], ["--dry-run"]):
        refused = run(*words, "--src", mine, "--out", out, *more)
        assert refused.exit_code == 1
        assert "other options" in refused.stderr
        assert "--restart" in refused.stderr
    assert state(out) == before


def test_a_source_written_over_with_other_weights_of_the_same_shapes_finds_nothing_complete(
    mine: Path, out: Path
) -> None:
    path = max(mine.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused = run("zigzag", "--src", mine, "--out", out, *OPTIONS)
    assert refused.exit_code == 1
    assert "source has changed since" in refused.stderr
    run_well("zigzag", "--src", mine, "--out", out, *OPTIONS, "--restart")
    run_well("verify", out, "--src", mine)


def test_an_output_of_an_older_version_is_not_taken_for_complete(mine: Path, out: Path) -> None:
    forge(out, lambda manifest: manifest.pop("fingerprint"))
    run_well("verify", out, "--src", mine)
    assert run("zigzag", "--src", mine, "--out", out, *OPTIONS).exit_code == 1
    run_well("zigzag", "--src", mine, "--out", out, *OPTIONS, "--restart")
    assert "already complete" in run_well("zigzag", "--src", mine, "--out", out, *OPTIONS)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def up_projections(path: Path) -> list[str]:
    """The experts' tensors of this name in a file: all have the same shape."""
    return sorted(name for name in read_safetensors(path)[1] if ".experts." in name and name.endswith("up_proj.weight"))


def swap_names(path: Path) -> None:
    """Exchange the names of two tensors of the same shape in a header."""
    data = path.read_bytes()
    first, second = (f'"{name}"'.encode() for name in up_projections(path)[:2])
    assert len(first) == len(second)
    header = 8 + int.from_bytes(data[:8], "little")
    changed = data[:header].replace(first, b"?").replace(second, first).replace(b"?", second)
    path.write_bytes(changed + data[header:])


@pytest.mark.parametrize("damage", [Path.unlink, cut_short, swap_names])
def test_a_damaged_output_is_not_called_complete_and_restart_writes_it_anew(
    damage: Callable[[Path], None], mine: Path, out: Path, tmp_path: Path
) -> None:
    good = shutil.copytree(out, tmp_path / "good")
    path = next(path for path in sorted(out.glob("model-ep0*")) if len(up_projections(path)) > 1)
    damage(path)
    refused = run("zigzag", "--src", mine, "--out", out, *OPTIONS)
    assert refused.exit_code == 1
    assert path.name in refused.stderr
    assert "--restart" in refused.stderr
    run_well("zigzag", "--src", mine, "--out", out, *OPTIONS, "--restart")
    assert_identical_trees(good, out)


def test_restart_replaces_a_finished_output_of_the_same_source_and_leaves_none_of_its_files(
    mine: Path, out: Path, tmp_path: Path
) -> None:
    run_well("zigzag", "--src", mine, "--out", tmp_path / "other", "--ep", 3)
    run_well("zigzag", "--src", mine, "--out", out, "--ep", 3, "--restart")
    assert_identical_trees(tmp_path / "other", out)


def test_restart_leaves_an_output_of_another_source_alone(out: Path, tmp_path: Path) -> None:
    build(Spec("qwen3_moe", experts=EXPERTS), tmp_path / "another")
    before = state(out)
    for more in ([], ["--dry-run"]):
        refused = run("zigzag", "--src", tmp_path / "another", "--out", out, "--ep", 4, "--restart", *more)
        assert refused.exit_code == 1
        assert f"made from {tmp_path / 'source'}" in refused.stderr
    assert state(out) == before


def test_a_restart_that_is_cut_short_leaves_nothing_loadable_and_is_resumed(
    mine: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = shutil.copytree(out, tmp_path / "good")
    unlink, left = Path.unlink, 12

    def unlink_some(path: Path, missing_ok: bool = False) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Cut
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(Path, "unlink", unlink_some)
        zigzag(mine, out, 4, max_shard_size=SHARD_SIZE, restart=True)
    assert not is_loadable(out)
    assert list(out.glob("model-ep*"))
    zigzag(mine, out, 4, max_shard_size=SHARD_SIZE, restart=True)
    assert_identical_trees(good, out)


def test_a_finished_stage_is_complete_for_the_same_ranks_only(out: Path, tmp_path: Path) -> None:
    staged = tmp_path / "staged"
    run_well("stage", out, "--ranks", "0-1", "--out", staged)
    before = state(staged)
    assert "already complete" in run_well("stage", out, "--ranks", "0-1", "--out", staged)
    for more in ([], ["--restart"]):
        refused = run("stage", out, "--ranks", "0-2", "--out", staged, *more)
        assert refused.exit_code == 1
        assert "other options" in refused.stderr
    assert state(staged) == before
    good = shutil.copytree(staged, tmp_path / "good")
    cut_short(min(staged.glob("model-ep01-*")))
    assert run("stage", out, "--ranks", "0-1", "--out", staged).exit_code == 1
    run_well("stage", out, "--ranks", "0-1", "--out", staged, "--restart")
    assert_identical_trees(good, staged)


def test_a_finished_restore_is_compared_byte_by_byte_and_never_removed(mine: Path, out: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    run_well("restore", out, "--out", back)
    before = state(back)
    assert "already complete" in run_well("restore", out, "--out", back)
    assert "already complete" in run_well("restore", out, "--out", mine), "the source itself is complete too"
    refused = run("restore", out, "--out", back, "--restart")
    assert refused.exit_code == 1
    assert state(back) == before
    for path in (max(back.glob("*.safetensors"), key=lambda path: path.stat().st_size), back / "tokenizer.json"):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        refused = run("restore", out, "--out", back)
        assert refused.exit_code == 1
        assert path.name in refused.stderr
        path.write_bytes(data)
    (back / "more.txt").write_text("mine")
    assert run("restore", out, "--out", back).exit_code == 1


def test_a_balanced_run_goes_on_with_the_placement_that_it_began_with(source: Path, tmp_path: Path) -> None:
    trace, out = record_traffic(tmp_path / "trace", 0), tmp_path / "out"
    place(source, tmp_path / "whole", Balanced(4, trace), max_shard_size=SHARD_SIZE)
    with pytest.raises(Cut):
        place(source, out, Balanced(4, trace), max_shard_size=SHARD_SIZE, progress=cut_after(20), workers=1)
    record_traffic(trace, 1)
    command = ["place", "--strategy", "balanced", "--src", source, "--out", out, *OPTIONS, "--trace"]
    for other in ([record_traffic(tmp_path / "another", 0)], [trace, "--nodes", 2]):
        refused = run(*command, *other)
        assert refused.exit_code == 1, "the control: other options"
        assert "other options" in refused.stderr
    said = run_well(*command, trace)
    assert "resumed an interrupted run" in said
    assert "an earlier run of this command made" in said
    assert_identical_trees(tmp_path / "whole", out)
    assert "already complete" in run_well(*command, trace)
    run_well(*command, trace, "--restart")
    placements = [
        json.loads((directory / MANIFEST).read_bytes())["physical_to_logical"]
        for directory in (tmp_path / "whole", out)
    ]
    assert placements[0] != placements[1], "the control: the new traffic asks for another placement"


def test_a_placement_file_that_changed_is_not_taken_from_the_journal(source: Path, tmp_path: Path) -> None:
    map_file, out = tmp_path / "map.json", tmp_path / "out"
    command = ["place", "--strategy", "file", "--map", map_file, "--src", source, "--out", out, *OPTIONS]
    map_file.write_text(json.dumps({"physical_to_logical": [7, 6, 5, 4, 3, 2, 1, 0]}))
    run_well(*command)
    map_file.write_text(json.dumps({"physical_to_logical": [0, 2, 4, 6, 1, 3, 5, 7]}))
    assert run(*command).exit_code == 1


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 30])
def test_a_write_to_the_journal_that_falls_short_loses_nothing(
    fails: bool, cut: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fails`: the disk is full after the part that was written; otherwise the next write goes on."""
    out, write, writes = tmp_path / "out", os.write, 0

    def write_less(fd: int, data: bytes) -> int:
        nonlocal writes
        if Path(f"/proc/self/fd/{fd}").resolve().name != JOURNAL:
            return write(fd, data)
        writes += 1
        if writes == 6 and fails and cut:
            return write(fd, bytes(data)[:cut])
        if writes in (6, 7) and fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, bytes(data)[: cut or None] if writes % 3 == 0 else data)

    with monkeypatch.context() as patch:
        patch.setattr(reshard.execute.journal.os, "write", write_less)
        if fails:
            with pytest.raises(OutputError, match="rerun the command to resume"):
                zigzag(source, out, 4, max_shard_size=SHARD_SIZE, workers=1)
        else:
            with pytest.raises(Cut):
                zigzag(source, out, 4, max_shard_size=SHARD_SIZE, workers=1, progress=cut_after(20))
    assert writes > 5
    complete = len(list(out.glob("*.safetensors")))
    resumed = zigzag(source, out, 4, max_shard_size=SHARD_SIZE).resumed
    assert complete - 2 * fails <= resumed <= complete, "at most what was written when the disk was full"
    assert resumed >= 3
    zigzag(source, tmp_path / "whole", 4, max_shard_size=SHARD_SIZE)
    assert_identical_trees(tmp_path / "whole", out)


def test_a_damaged_line_in_a_journal_costs_only_what_comes_after_it(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Cut):
        place(source, out, Zigzag(4), max_shard_size=SHARD_SIZE, progress=cut_after(20), workers=1)
    lines = (out / JOURNAL).read_bytes().splitlines(keepends=True)
    (out / JOURNAL).write_bytes(b"".join([*lines[:4], lines[4][:20] + lines[5], *lines[6:]]))
    assert zigzag(source, out, 4, max_shard_size=SHARD_SIZE).resumed == 3
    run_well("verify", out, "--src", source)
