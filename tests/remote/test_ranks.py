"""`--ranks`: what one node needs, straight from the source, and what `stage` would copy from the whole output."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from checkpoints import Spec, build
from command_line import run, run_well
from hub_outputs import MANIFEST, committed, refused
from hub_server import Hub, serving
from interruption import Cut, cut_after
from oracle import assert_identical_trees, tree
from scratch import checkpoint

from reshard import OutputError, zigzag

REPO = "org/model"
WIDE = Spec("deepseek_v3", experts=8, layers=3, scale=16, aligned=True, shuffled=False)  # 18 MB


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    return committed(checkpoint(tmp_path_factory, WIDE), tmp_path_factory.mktemp("ranks") / "source")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another, of the same names and smaller tensors."""
    return checkpoint(tmp_path_factory, Spec("deepseek_v3", experts=8, layers=3, shuffled=False, aligned=True))


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its output for four ranks."""
    out = tmp_path_factory.mktemp("ranks") / "whole"
    run_well("zigzag", "--src", source, "--ep", 4, "--reflink", "never", "--out", out)
    return out


@pytest.fixture
def hub(tmp_path: Path, source: Path) -> Iterator[Hub]:
    """A server that has the checkpoint."""
    with serving(tmp_path / "cache") as server:
        server.add(REPO, source)
        yield server


def zigzag_ranks(src: object, ranks: str, out: Path, *more: object) -> str:
    """Write what these ranks need."""
    return run_well("zigzag", "--src", src, "--ep", 4, "--ranks", ranks, "--reflink", "never", "--out", out, *more)


def without_manifest(directory: Path) -> dict[str, str]:
    """Every file but the manifest, with its digest."""
    return {name: digest for name, digest in tree(directory).items() if name != MANIFEST}


@pytest.mark.parametrize("ranks", ["0-1", "3", "0,2"])
def test_the_ranks_files_are_those_that_stage_copies(ranks: str, source: Path, whole: Path, tmp_path: Path) -> None:
    zigzag_ranks(source, ranks, tmp_path / "out")
    run_well("stage", whole, "--ranks", ranks, "--out", tmp_path / "staged")
    assert without_manifest(tmp_path / "out") == without_manifest(tmp_path / "staged")
    ours, theirs = (json.loads((tmp_path / name / MANIFEST).read_bytes()) for name in ("out", "staged"))
    here = without_manifest(tmp_path / "out").keys()
    for manifest in (ours, theirs):
        manifest.pop("digest")
        for record in manifest["files"]:
            if record["name"] not in here:
                record["digest"], record["tensors"] = None, dict.fromkeys(record["tensors"])
    assert ours == theirs
    assert "EP ranks" in run_well("verify", tmp_path / "out", "--src", source)


def test_a_flipped_bit_in_a_rank_s_file_is_found(source: Path, tmp_path: Path) -> None:
    zigzag_ranks(source, "1", tmp_path / "out")
    path = next((tmp_path / "out").glob("model-ep01-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "1 problem found" in refused("verify", tmp_path / "out")


def test_only_what_the_ranks_need_is_received(hub: Hub, tmp_path: Path) -> None:
    run_well("inspect", REPO)
    headers = hub.sent
    hub.clear()
    zigzag_ranks(REPO, "1,3", tmp_path / "out")
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*") if path.name != MANIFEST)
    assert hub.sent <= 1.01 * written + headers
    assert hub.sent < 0.9 * sum(path.stat().st_size for path in hub.commits["1" * 40].iterdir() if path.is_file())
    run_well("verify", tmp_path / "out", "--src", REPO)


def test_a_run_is_resumed_for_the_same_ranks_only_and_then_it_is_complete(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Cut):
        zigzag(source, out, 4, ranks=[0, 1], reflink="never", progress=cut_after(6), workers=1)
    line = refused("zigzag", "--src", source, "--ep", 4, "--ranks", "2", "--reflink", "never", "--out", out)
    assert "other options" in line
    zigzag_ranks(source, "0-1", out)
    assert "already complete" in zigzag_ranks(source, "1,0", out)
    assert without_manifest(out).items() <= without_manifest(whole).items()
    line = refused("zigzag", "--src", source, "--ep", 4, "--ranks", "2", "--reflink", "never", "--out", out)
    assert "other options" in line


@pytest.mark.parametrize(("ranks", "options"), [("0-3", []), ("1", ["--layout", "source"])])
def test_where_nothing_is_left_out_the_output_is_whole(
    ranks: str, options: list[str], source: Path, tmp_path: Path
) -> None:
    assert "leaves nothing out" in zigzag_ranks(source, ranks, tmp_path / "out", *options)
    run_well("restore", tmp_path / "out", "--out", tmp_path / "back")


def test_a_node_s_part_is_not_restored_and_a_rank_that_is_none_is_refused(source: Path, tmp_path: Path) -> None:
    zigzag_ranks(source, "0", tmp_path / "out")
    assert "EP ranks 1-3 are missing" in refused("restore", tmp_path / "out", "--out", tmp_path / "back")
    for ranks in ("4", "0-7"):
        line = refused("zigzag", "--src", source, "--ep", 4, "--ranks", ranks, "--out", tmp_path / "other")
        assert "EP ranks, 0-3" in line
    assert not (tmp_path / "other").exists()


def test_fused_experts_are_every_rank_s(tmp_path: Path) -> None:
    build(Spec("gpt_oss", experts=8), tmp_path / "fused")
    assert "leaves nothing out" in zigzag_ranks(tmp_path / "fused", "0", tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# Parts of several runs in one directory
# ---------------------------------------------------------------------------------------------------------------------


def test_merged_parts_are_the_whole_output_in_whatever_order(source: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for ranks, there in (("2", "EP ranks 2 need"), ("0-1", "EP ranks 0-2 need"), ("3", "is what was written")):
        zigzag_ranks(source, ranks, out, "--merge")
        assert there in run_well("verify", out, "--src", source)
    assert_identical_trees(whole, out)
    assert "already complete" in zigzag_ranks(source, "0-1", out, "--merge")
    run_well("restore", out, "--out", tmp_path / "back")
    assert_identical_trees(source, tmp_path / "back")


def test_python_merges_parts_too(small: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    zigzag(small, whole, 4, reflink="never")
    for ranks in ([3], [0, 1, 2]):
        zigzag(small, out, 4, ranks=ranks, merge=True, reflink="never")
    assert_identical_trees(whole, out)
    for ranks in (None, [], [-1], ["0"]):
        with pytest.raises(OutputError, match="--ranks"):
            zigzag(small, out, 4, ranks=ranks, merge=True)


def test_runs_at_the_same_time_merge_their_parts(hub: Hub, source: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "reshard", "zigzag", "--src", REPO, "--ep", "4", "--out", str(tmp_path / "out")]
    runs = [
        subprocess.Popen([*command, "--ranks", ranks, "--merge", "--quiet"], env=environment)
        for ranks in ("0-1", "2-3")
    ]
    assert [process.wait() for process in runs] == [0, 0]
    run_well("zigzag", "--src", REPO, "--ep", 4, "--out", tmp_path / "expected")
    assert_identical_trees(tmp_path / "expected", tmp_path / "out")


def test_a_merge_cut_anywhere_goes_on_with_the_same_command(small: Path, tmp_path: Path) -> None:
    """Cut before each change of a name, until one is cut no more."""
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    run_well("zigzag", "--src", small, "--ep", 4, "--reflink", "never", "--out", whole)
    zigzag_ranks(small, "0-2", begun, "--merge")
    real, cuts = os.rename, 0
    while True:
        out, left, was_cut = shutil.copytree(begun, tmp_path / str(cuts)), cuts, False

        def rename(source: Path, target: Path) -> Path:
            nonlocal left, was_cut
            if source.parent != target.parent or source.name.startswith(".reshard-"):  # not NAME.partial
                left -= 1
                if left < 0:
                    was_cut = True
                    raise Cut
            real(source, target)
            return target

        with pytest.MonkeyPatch.context() as patch, suppress(Cut):
            patch.setattr(Path, "rename", rename)
            zigzag_ranks(small, "3", out, "--merge")
        if not was_cut:
            break
        zigzag_ranks(small, "3", out, "--merge")
        assert_identical_trees(whole, out)
        cuts += 1
    assert cuts == 2  # the rank's file, and the manifest


def test_what_does_not_belong_together_is_not_merged(small: Path, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    zigzag_ranks(source, "0", out, "--merge")
    before = tree(out)
    other = ("zigzag", "--src", source, "--out", out, "--reflink", "never", "--merge", "--ranks", "1")
    assert "no part of this output" in refused(*other, "--ep", 2)
    assert "no part of this output" in refused(*other, "--ep", 4, "--max-shard-size", "300KB")
    assert "other options" in refused(*other[:-2], "--ranks", 1, "--ep", 4, "--restart", "--src", small)
    assert {name: kind for name, kind in tree(out).items() if not name.startswith(".reshard-ranks")} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine\n")
    line = refused("zigzag", "--src", source, "--ep", 4, "--out", tmp_path / "mine", "--ranks", "1", "--merge")
    assert "notes.txt" in line
    assert run("zigzag", "--src", source, "--ep", 4, "--out", out, "--merge").exit_code == 2
