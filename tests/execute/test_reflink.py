"""Sharing disk blocks with the source: XFS and Btrfs copy next to nothing, others all; both outputs are right."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from checkpoints import Spec, build
from command_line import run, run_well
from filesystems import Mounted, mounted
from oracle import assert_identical_trees, assert_resharded, read_safetensors, tree

from reshard import OutputError, read_checkpoint, read_model, verify, write_resharding
from reshard.commands.original import read_original
from reshard.commands.outline import Writing
from reshard.commands.resharding import Resharding, plan_resharding
from reshard.placement.permutations import zigzag
from reshard.placement.strategies import Placed
from reshard.plan.extents import shareable
from reshard.plan.files import Digests, Range
from reshard.plan.layouts import by_rank, output_files, shared_size, why_not_shared
from reshard.plan.sharing import Sharing
from reshard.record.manifest import Layout, Manifest, encode_manifest

RANKS = 2
LARGE = 1 << 16
METADATA = 3 << 20  # bytes: what a file system needs for the records of some hundred extents, and rounds up to


def build_large(directory: Path, family: str = "deepseek_v3", **options: Any) -> Path:
    """A checkpoint whose experts are large enough to share, tensors in the order of layers."""
    build(Spec(family, experts=16, layers=3, scale=16, aligned=True, **{"shuffled": False, **options}), directory)
    return directory


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """A file system that shares blocks, with a checkpoint `source` on it."""
    with mounted(request.param, tmp_path_factory.mktemp("disk"), 1024) as found:
        build_large(found.path / "source")
        yield found


@pytest.fixture
def out(disk: Mounted) -> Iterator[Path]:
    """A directory on `disk` to write to."""
    yield disk.path / "out"
    for name in ("out", "back", "staged"):
        shutil.rmtree(disk.path / name, ignore_errors=True)


def zigzag_report(source: Path, out: Path, *options: object) -> dict[str, Any]:
    """Run zigzag; its report."""
    report: dict[str, Any] = json.loads(
        run_well("zigzag", "--src", source, "--ep", RANKS, "--out", out, "--json", *options)
    )
    return report


@pytest.mark.parametrize("layout", ["source", "ranks"])
@pytest.mark.parametrize("digests", ["all", "copied"])
def test_an_output_takes_hardly_any_room_and_is_right(disk: Mounted, out: Path, layout: str, digests: str) -> None:
    source = disk.path / "source"
    before, used = tree(source), disk.used()
    report = zigzag_report(source, out, "--layout", layout, "--reflink", "always", "--digests", digests)
    grown = disk.used() - used
    assert report["shared_size"] > 0.9 * report["output_size"]
    assert grown <= report["output_size"] - report["shared_size"] + METADATA
    assert grown < 0.2 * report["output_size"]
    assert_resharded(source, out, RANKS, by_rank=layout == "ranks", undigested=report["undigested_tensors"])
    assert (report["undigested_tensors"] == 0) == (digests == "all")
    run_well("verify", out)
    run_well("verify", out, "--src", source)
    used = disk.used()
    restored = json.loads(run_well("restore", out, "--out", disk.path / "back", "--reflink", "always", "--json"))
    assert restored["shared_size"] > 0.9 * restored["output_size"]
    assert disk.used() - used < 0.2 * restored["output_size"]
    assert_identical_trees(source, disk.path / "back")
    assert tree(source) == before


def test_by_default_blocks_are_shared_and_by_rank_digests_taken_of_all(disk: Mounted, out: Path) -> None:
    report = zigzag_report(disk.path / "source", out)
    assert report["shared_size"] > 0.9 * report["output_size"]
    assert report["undigested_tensors"] == 0
    shutil.rmtree(out)
    report = zigzag_report(disk.path / "source", out, "--layout", "source")
    assert report["undigested_tensors"] > 100
    shutil.rmtree(out)
    text = run_well("zigzag", "--src", disk.path / "source", "--ep", RANKS, "--out", out, "--layout", "source")
    assert "share disk blocks with" in text
    assert "have no digest" in text


@pytest.mark.parametrize("digests", ["all", "copied"])
def test_nothing_is_shared_where_the_user_says_never(disk: Mounted, out: Path, digests: str) -> None:
    used = disk.used()
    report = zigzag_report(disk.path / "source", out, "--layout", "source", "--reflink", "never", "--digests", digests)
    assert report["shared_size"] == 0
    assert disk.used() - used > 0.95 * report["output_size"]
    assert_resharded(disk.path / "source", out, RANKS, by_rank=False, undigested=report["undigested_tensors"])


def test_a_stage_shares_too(disk: Mounted, out: Path) -> None:
    zigzag_report(disk.path / "source", out)
    used = disk.used()
    report = json.loads(
        run_well("stage", out, "--ranks", "1", "--out", disk.path / "staged", "--reflink", "always", "--json")
    )
    assert report["shared_size"] > 0.9 * report["output_size"]
    assert disk.used() - used < 0.2 * report["output_size"]
    run_well("verify", disk.path / "staged")
    for path in (disk.path / "staged").glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_rows_of_fused_experts_are_shared_each_for_itself(disk: Mounted, out: Path) -> None:
    source = build_large(disk.path / "fused", "llama4", files=1)
    report = zigzag_report(source, out, "--layout", "source", "--reflink", "always")
    assert report["shared_size"] > 0.8 * report["output_size"]
    assert_resharded(source, out, RANKS, by_rank=False, undigested=report["undigested_tensors"])
    shutil.rmtree(source)


def flip(path: Path, tensor: str) -> None:
    """Flip a bit in the middle of a tensor."""
    found = read_safetensors(path)[1][tensor]
    with path.open("r+b") as file:
        file.seek(found.start + len(found.data) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def test_a_flipped_bit_in_a_tensor_without_digest_is_found_with_the_source_and_not_claimed_without(
    disk: Mounted, out: Path
) -> None:
    source = disk.path / "source"
    for digests in ("copied", "all"):
        zigzag_report(source, out, "--layout", "source", "--digests", digests)
        path = sorted(out.glob("*.safetensors"))[1]
        name = next(
            name for name, found in read_safetensors(path)[1].items() if ".experts." in name and len(found.data) > LARGE
        )
        flip(path, name)
        alone, beside = run("verify", out), run("verify", out, "--src", source)
        assert beside.exit_code == 1
        assert name in beside.stdout
        assert alone.exit_code == (0 if digests == "copied" else 1)
        assert ("were not read" in alone.output) == (digests == "copied")
        shutil.rmtree(out)


def test_blocks_are_only_shared_where_every_file_lies_on_the_same_file_system(
    disk: Mounted, out: Path, tmp_path: Path
) -> None:
    source = disk.path / "linked"
    shutil.copytree(disk.path / "source", source)
    first = min(source.glob("*.safetensors"))
    shutil.move(first, tmp_path / first.name)
    first.symlink_to(tmp_path / first.name)
    report = zigzag_report(source, out, "--layout", "source")
    assert report["shared_size"] == 0
    assert "on another file system" in report["why_not_shared"]
    assert_resharded(source, out, RANKS, by_rank=False)
    shutil.rmtree(source)


def test_where_blocks_cannot_be_shared_always_is_refused_and_auto_copies(tmp_path: Path) -> None:
    source = build_large(tmp_path / "source")
    arguments = ["zigzag", "--src", source, "--ep", RANKS, "--out", tmp_path / "out", "--layout", "source"]
    refused = run(*arguments, "--reflink", "always")
    if refused.exit_code == 0:
        pytest.skip("the tests' own file system shares blocks")
    assert refused.exit_code == 1
    assert "cannot share blocks" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert "copied: this file system has no reflinks" in run_well(*arguments)
    assert_resharded(source, tmp_path / "out", RANKS, by_rank=False)


def test_restore_refuses_an_output_that_was_made_with_digests_none(tmp_path: Path) -> None:
    """Version 0.1 wrote such outputs: tensors of 64 KiB and more have no digest, and share no blocks either."""
    source, out = build_large(tmp_path / "source"), tmp_path / "out"
    zigzag_report(source, out, "--reflink", "never")
    run_well("restore", out, "--out", tmp_path / "control")
    path = out / "reshard_manifest.json"
    manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    files = [
        msgspec.structs.replace(record, digest=None, tensors=dict.fromkeys(record.tensors))
        if record.tensors
        else record
        for record in manifest.files
    ]
    path.write_bytes(encode_manifest(msgspec.structs.replace(manifest, files=files)))
    run_well("verify", out, "--src", source)
    refused = run("restore", out, "--out", tmp_path / "back")
    assert refused.exit_code == 1
    assert "--digests none" in refused.output
    assert not (tmp_path / "back").exists()


def test_always_is_refused_where_there_is_nothing_to_share(disk: Mounted, out: Path, tmp_path: Path) -> None:
    build(Spec("deepseek_v3"), disk.path / "small")
    for layout, why in (("source", "too small"), ("ranks", "--layout source")):
        arguments = ["zigzag", "--src", disk.path / "small", "--ep", RANKS, "--out", out, "--layout", layout]
        refused = run(*arguments, "--reflink", "always")
        assert refused.exit_code == 1
        assert why in refused.stderr
        run_well(*arguments)
        shutil.rmtree(out)
    shutil.rmtree(disk.path / "small")


def test_a_file_system_that_changes_its_mind_is_copied_to_unless_sharing_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("reshard.execute.syscalls.share", refuse)
    source = build_large(tmp_path / "source")
    original = read_original(source)
    placed = Placed(dict.fromkeys(original.shape.layers, zigzag(original.num_experts, RANKS)))

    def plan(layout: Layout, sharing: Sharing) -> Resharding:
        writing = Writing(layout=layout, sharing=sharing, digests=Digests.COPIED)
        return plan_resharding(original, "zigzag", RANKS, placed, writing)

    layouts: tuple[Layout, ...] = ("ranks", "source")
    number = errno.EOPNOTSUPP
    for layout in layouts:
        out = tmp_path / f"by-{layout}"
        outcome = write_resharding(plan(layout, Sharing(4096)), out)
        assert (outcome.shared, outcome.undigested) == (0, 0)
        assert not verify(out, source).problems
    with pytest.raises(OutputError, match="not supported"):
        write_resharding(plan("source", Sharing(4096, required=True)), tmp_path / "always")
    number = errno.ENOSPC
    with pytest.raises(OutputError, match="No space"):
        write_resharding(plan("source", Sharing(4096)), tmp_path / "full")


@pytest.mark.parametrize("shuffled", [False, True])
def test_by_rank_large_tensors_lie_on_blocks_as_in_the_source(shuffled: bool, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(build_large(tmp_path / "source", shuffled=shuffled))
    model = read_model(checkpoint)
    order = dict.fromkeys((layer.name for layer in model.layers), zigzag(16, RANKS))
    for block_size in (512, 4096, 1 << 16):
        for most in (300_000, 5_000_000):
            shards = by_rank(checkpoint, model, order, RANKS, max_shard_size=most, block_size=block_size)
            files = output_files(shards, checkpoint, model, order, Digests.ALL)
            seen: list[str] = []
            for file in files:
                at = 0
                for part in file.parts:
                    if isinstance(part.content, Range) and part.content.size >= LARGE:
                        assert (at - part.content.offset) % block_size == 0
                    at += part.content.size
                    seen += [part.tensor] if part.tensor else []
                tensors = [part.content.size for part in file.parts[1:]]
                assert sum(tensors) <= most or len(tensors) == 1
            assert len(seen) == len(set(seen)) == len(checkpoint.tensors)
            shared = sum(extent.size for file in files for extent in shareable(file.parts, block_size))
            assert shared_size(shards, model, order, block_size) == shared
            assert shared > 0
            too_many = why_not_shared(shards, checkpoint, model, order, RANKS, block_size) is not None
            assert too_many == (len(files) > 8 * (RANKS + 1) * len(checkpoint.shards))
            assert not too_many or most < 1_000_000 or block_size > 4096


def test_files_are_not_cut_for_sharing_where_it_gains_little(tmp_path: Path) -> None:
    build(Spec("deepseek_v3"), tmp_path / "small")  # the control: its tensors are all too small
    for source, worth in ((build_large(tmp_path / "large"), True), (tmp_path / "small", False)):
        original = read_original(source)
        order = dict.fromkeys(original.shape.layers, zigzag(original.num_experts, RANKS))
        resharding = plan_resharding(original, "zigzag", RANKS, Placed(order), Writing(sharing=Sharing(4096)))
        assert (resharding.plan.sharing.block_size is not None) == worth
        assert ("could share blocks" in resharding.plan.sharing.why_not) != worth


def test_a_source_file_named_like_a_rank_s_is_refused_where_it_would_keep_its_name(tmp_path: Path) -> None:
    source = tmp_path / "source"
    build(Spec("qwen3_moe"), source)
    index = source / "model.safetensors.index.json"
    for number, path in enumerate(sorted(source.glob("*.safetensors")), start=1):
        renamed = path.rename(source / f"model-ep00-of-02-{number:05}-of-00003.safetensors")
        index.write_text(index.read_text().replace(path.name, renamed.name))
    arguments = ["zigzag", "--src", source, "--ep", 2, "--layout"]
    refused = run(*arguments, "source", "--out", tmp_path / "out")
    assert refused.exit_code == 1
    assert "named like a file of one EP rank" in refused.stderr
    run_well(*arguments, "ranks", "--out", tmp_path / "out")
