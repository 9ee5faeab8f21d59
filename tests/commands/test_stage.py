"""A node's share of an output: exactly the files that it needs, each of them right, and no word of others."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jsonschema
import pytest
from checkpoints import FAMILIES, Spec, build
from command_line import run, run_well
from interruption import Cut, cut_before, is_loadable, resumed_after_every_cut
from oracle import assert_identical_trees, assert_resharded, read_safetensors, tree
from safetensors import safe_open

from reshard import stage
from reshard.record.manifest import manifest_schema

INDEX = "model.safetensors.index.json"
MANIFEST = "reshard_manifest.json"
REWRITTEN = (MANIFEST,)
RANK_FILE = re.compile(r"model-ep(\d+)-of-\d+-\d{5}-of-\d{5}\.safetensors")
JOURNAL = ".reshard-journal"
SPLIT = [name for name, family in FAMILIES.items() if family.fused is None]
FUSED = [name for name, family in FAMILIES.items() if family.fused is not None]
FLIPS = 90


def complaint(*arguments: object, status: int = 1) -> str:
    """What `reshard` says on failing with this exit status, on either stream."""
    result = run(*arguments)
    assert result.exit_code == status, f"reshard {' '.join(map(str, arguments))}: {result.output}"
    return result.output


def make(family: str, directory: Path, ranks: int, experts: int = 8) -> Path:
    """A `source` and its `output`, in several files a rank, below `directory`; the output."""
    build(Spec(family, experts=experts), directory / "source")
    output = directory / "output"
    arguments = ["--src", directory / "source", "--ep", ranks, "--out", output, "--max-shard-size", "3KB", "--quiet"]
    run_well("zigzag", *arguments)
    return output


def share(output: Path, ranks: set[int]) -> dict[str, str]:
    """The files and folders of `output` that those EP ranks need, with their digests, by the names of files alone."""
    return {
        name: digest
        for name, digest in tree(output).items()
        if not (match := RANK_FILE.fullmatch(name)) or int(match[1]) in ranks
    }


def without(names: tuple[str, ...], files: dict[str, str]) -> dict[str, str]:
    """`files` but for those of these names."""
    return {name: digest for name, digest in files.items() if name not in names}


def assert_indexed(staged: Path) -> None:
    """The index is the whole output's: it names every tensor that is there, and where, and safetensors opens it."""
    weight_map = json.loads((staged / INDEX).read_bytes())["weight_map"]
    files = {path.name: read_safetensors(path)[1] for path in staged.glob("*.safetensors")}
    for tensor, file in weight_map.items():
        if file in files:
            with safe_open(staged / file, framework="pt") as opened:
                assert list(opened.get_slice(tensor).get_shape()) == list(files[file][tensor].shape)
    there = {tensor: file for file, tensors in files.items() for tensor in tensors}
    assert there.items() <= weight_map.items()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a `source`, its `output` for 5 EP ranks of 8 experts, and `staged`: ranks 1, 2 and 4 of it."""
    directory = tmp_path_factory.mktemp("stage")
    make("deepseek_v3", directory, ranks=5)
    run_well("stage", directory / "output", "--ranks", "1-2,4", "--out", directory / "staged")
    return directory


@pytest.fixture
def spoilt(good: Path, tmp_path: Path) -> Path:
    """A copy of the staged directory to spoil."""
    return shutil.copytree(good / "staged", tmp_path / "staged")


@pytest.mark.parametrize("family", SPLIT)
def test_a_staged_directory_has_the_files_of_its_ranks_and_verifies(family: str, tmp_path: Path) -> None:
    output, staged = make(family, tmp_path, ranks=3), tmp_path / "staged"
    run_well("stage", output, "--ranks", "0,2", "--out", staged)
    expected = share(output, {0, 2})
    assert len(expected) < len(tree(output))
    assert tree(staged).keys() == expected.keys()
    assert without(REWRITTEN, tree(staged)) == without(REWRITTEN, expected)
    assert_indexed(staged)
    run_well("verify", staged)
    assert "every tensor" in run_well("verify", staged, "--src", tmp_path / "source")
    manifest = json.loads((staged / MANIFEST).read_bytes())
    jsonschema.validate(manifest, manifest_schema())
    whole = json.loads((output / MANIFEST).read_bytes())
    assert manifest.pop("staged_ranks") == [0, 2]
    assert "staged_ranks" not in whole
    for record in (manifest, whole):
        del record["digest"]
        record["files"] = [file for file in record["files"] if file["name"] != INDEX]
    assert manifest == whole


def test_the_stages_of_all_ranks_make_up_the_whole_output(good: Path, tmp_path: Path) -> None:
    union = tmp_path / "union"
    for ranks in ("0-1", "2", "3-4"):
        run_well("stage", good / "output", "--ranks", ranks, "--out", tmp_path / ranks)
        shutil.copytree(tmp_path / ranks, union, dirs_exist_ok=True)
    for name in REWRITTEN:
        shutil.copy(good / "output" / name, union)
    assert_identical_trees(good / "output", union)
    run_well("verify", union, "--src", good / "source")


def test_staging_all_ranks_copies_the_whole_output_and_says_so(good: Path, tmp_path: Path) -> None:
    assert "the whole output is copied" in run_well("stage", good / "output", "--ranks", "0-4", "--out", tmp_path / "s")
    assert_identical_trees(good / "output", tmp_path / "s")


@pytest.mark.parametrize("family", FUSED)
def test_fused_experts_are_staged_whole_with_a_word_on_why(family: str, tmp_path: Path) -> None:
    output = make(family, tmp_path, ranks=3)
    said = run_well("stage", output, "--ranks", "1", "--out", tmp_path / "staged")
    assert "fused into one tensor a layer" in said
    assert_identical_trees(output, tmp_path / "staged")
    assert_resharded(tmp_path / "source", tmp_path / "staged", 3)


def test_verify_finds_and_names_every_flipped_bit_and_every_absent_file(spoilt: Path) -> None:
    chance = random.Random(0)
    files = [path for path in sorted(spoilt.rglob("*")) if path.is_file()]
    run_well("verify", spoilt)
    for path in files:
        data = path.read_bytes()
        name = path.relative_to(spoilt).as_posix()
        for position in [chance.randrange(len(data)) for _ in range(max(2, FLIPS // len(files))) if data]:
            flipped = bytearray(data)
            flipped[position] ^= 1 << chance.randrange(8)
            path.write_bytes(flipped)
            assert name in complaint("verify", spoilt), f"a bit flipped in byte {position} of {name}"
        path.unlink()
        assert f"{name}: " in complaint("verify", spoilt)
        path.write_bytes(data)
    run_well("verify", spoilt)


@pytest.mark.parametrize(("expert", "status"), [(1, 1), (6, 1), (3, 0)])
def test_verify_compares_the_tensors_that_are_there_with_the_source(
    expert: int, status: int, good: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(good / "source", tmp_path / "source")
    path, tensor = next(
        (path, tensor)
        for path in sorted(other.glob("*.safetensors"))
        for name, tensor in read_safetensors(path)[1].items()
        if name.endswith(f"layers.1.mlp.experts.{expert}.up_proj.weight")
    )
    data = bytearray(path.read_bytes())
    data[tensor.start] ^= 1
    path.write_bytes(data)
    result = run("verify", good / "staged", "--src", other)
    assert result.exit_code == status, result.output
    assert (f"experts.{expert}.up_proj.weight" in result.output) == bool(status)


def test_a_file_of_another_rank_is_looked_at_where_there_is_one(good: Path, spoilt: Path) -> None:
    strange = next(path for path in (good / "output").iterdir() if path.name.startswith("model-ep00"))
    shutil.copy(strange, spoilt)
    run_well("verify", spoilt)
    data = bytearray(strange.read_bytes())
    data[-1] ^= 1
    (spoilt / strange.name).write_bytes(data)
    assert "bytes are not those that were written" in complaint("verify", spoilt)


def test_restore_says_which_ranks_are_missing(good: Path, tmp_path: Path) -> None:
    said = complaint("restore", good / "staged", "--out", tmp_path / "back")
    assert "EP ranks 0,3 are missing; restore needs the whole output" in said
    assert not (tmp_path / "back").exists()


def test_inspect_says_which_ranks_are_staged(good: Path) -> None:
    assert "staged       EP ranks 1-2,4;" in run_well("inspect", good / "staged")
    assert json.loads(run_well("inspect", good / "staged", "--json"))["staged_ranks"] == [1, 2, 4]
    assert "staged" not in run_well("inspect", good / "output")


@pytest.mark.parametrize("ranks", ["", "x", "1,", "-1", "2-1", "1-", "1..3", "1 2", "²", "1e1", "999999", "1,,2"])
def test_ranks_that_are_none_are_a_mistake_in_the_command(ranks: str, good: Path, tmp_path: Path) -> None:
    said = complaint("stage", good / "output", f"--ranks={ranks}", "--out", tmp_path / "out", status=2)
    assert "write them like 0-3,6" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("ranks", "absent"), [("5", 5), ("0-7", 5), ("0,99", 99)])
def test_ranks_that_the_output_does_not_have_are_refused(ranks: str, absent: int, good: Path, tmp_path: Path) -> None:
    said = complaint("stage", good / "output", "--ranks", ranks, "--out", tmp_path / "out")
    assert f"5 EP ranks, 0-4; it has no rank {absent}" in said
    assert not (tmp_path / "out").exists()


def test_ranks_may_be_named_twice_and_in_any_order(good: Path, tmp_path: Path) -> None:
    run_well("stage", good / "output", "--ranks", "4,1-2,2,1", "--out", tmp_path / "out", "--quiet")
    assert_identical_trees(good / "staged", tmp_path / "out")


def test_some_of_the_ranks_of_a_staged_directory_can_be_staged_again_and_no_others(good: Path, tmp_path: Path) -> None:
    run_well("stage", good / "staged", "--ranks", "1,4", "--out", tmp_path / "again")
    run_well("stage", good / "output", "--ranks", "1,4", "--out", tmp_path / "directly")
    assert_identical_trees(tmp_path / "directly", tmp_path / "again")
    run_well("stage", good / "staged", "--ranks", "1-2,4", "--out", tmp_path / "copy")
    assert_identical_trees(good / "staged", tmp_path / "copy")
    said = complaint("stage", good / "staged", "--ranks", "0-1,3", "--out", tmp_path / "out")
    assert "it holds EP ranks 1-2,4, not 0,3; stage these from the whole output" in said


def flip(path: Path) -> None:
    """Change a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    """Cut a file's last byte off."""
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("spoil", [flip, shorten, Path.unlink])
@pytest.mark.parametrize(
    "kind", ["config.json", INDEX, MANIFEST, "inference/model.py", "model-shared-*", "model-ep01-*"]
)
def test_damage_is_noticed_while_staging_and_nothing_loadable_is_left(
    kind: str, spoil: Callable[[Path], None], good: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(good / "output", tmp_path / "output")
    path = min(output.glob(kind))
    spoil(path)
    assert path.name in complaint("stage", output, "--ranks", "0-1", "--out", tmp_path / "out")
    assert not is_loadable(tmp_path / "out")
    # what the ranks do not need may be damaged
    if kind == "model-ep01-*":
        run_well("stage", output, "--ranks", "2,3", "--out", tmp_path / "others")
        run_well("verify", tmp_path / "others")


def test_a_damaged_file_that_was_replaced_is_staged_afresh(good: Path, tmp_path: Path) -> None:
    output = shutil.copytree(good / "output", tmp_path / "output")
    path = min(output.glob("model-ep01-*"))
    flip(path)
    arguments = ["stage", output, "--ranks", "1-2,4", "--out", tmp_path / "out"]
    assert "replace it, then stage again with --restart" in complaint(*arguments)
    shutil.copy2(good / "output" / path.name, path)
    run_well(*arguments, "--restart")
    assert_identical_trees(good / "staged", tmp_path / "out")


def test_a_run_cut_anywhere_is_taken_up_and_ends_the_same(good: Path, tmp_path: Path) -> None:
    def finish(out: Path) -> int:
        report = json.loads(run_well("stage", good / "output", "--ranks", "1-2,4", "--out", out, "--json"))
        return int(report["resumed_files"])

    write = partial(stage, good / "output", ranks=[1, 2, 4])
    resumed = resumed_after_every_cut(good / "staged", tmp_path / "out", 4, write, finish)
    assert resumed[0] < 3
    assert resumed[-1] > 10


@pytest.mark.parametrize("name", [MANIFEST, INDEX, "config.json"])
def test_a_run_cut_before_a_last_file_is_not_loadable_and_ends_the_same(name: str, good: Path, tmp_path: Path) -> None:
    with cut_before(name):
        stage(good / "output", tmp_path / "out", [1, 2, 4])
    assert not (tmp_path / "out" / "config.json").exists()
    assert "resumed" in run_well("stage", good / "output", "--ranks", "1-2,4", "--out", tmp_path / "out")
    assert_identical_trees(good / "staged", tmp_path / "out")


def test_other_ranks_do_not_take_up_an_unfinished_run(good: Path, tmp_path: Path) -> None:
    def progress(_: int) -> None:
        raise Cut

    with pytest.raises(Cut):
        stage(good / "output", tmp_path / "out", [0], progress=progress)
    assert "other options" in complaint("stage", good / "output", "--ranks", "1-2,4", "--out", tmp_path / "out")
    run_well("stage", good / "output", "--ranks", "1-2,4", "--out", tmp_path / "out", "--restart")
    assert_identical_trees(good / "staged", tmp_path / "out")


def test_the_output_is_never_written_to(good: Path, tmp_path: Path) -> None:
    before = tree(good / "output")
    for out in (good / "output", good / "output" / "below"):
        assert "the source is never written to" in complaint("stage", good / "output", "--ranks", "0", "--out", out)
    assert tree(good / "output") == before


def test_json_and_quiet_are_as_elsewhere(good: Path, tmp_path: Path) -> None:
    output = good / "output"
    report = json.loads(run_well("stage", output, "--ranks", "0", "--out", tmp_path / "json", "--json"))
    assert report["staged_ranks"] == [0]
    assert report["output_size"] == sum(
        path.stat().st_size for path in (tmp_path / "json").rglob("*") if path.is_file()
    )
    assert run_well("stage", output, "--ranks", "0", "--out", tmp_path / "quiet", "--quiet") == ""
    said = run_well("stage", output, "--ranks", "0-2", "--out", tmp_path / "said")
    assert "staged EP ranks 0-2 of 5: " in said
    assert f"reshard verify {tmp_path / 'said'}" in said
