"""The command line, end to end: zigzag makes what the oracle expects, verify agrees, restore undoes it exactly.

The controls show that the oracle and `verify` can say no: each spoils a good output in one way.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
from checkpoints import FAMILIES, Spec, build
from command_line import run, run_well
from forgery import record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interruption import is_loadable
from oracle import assert_identical_trees, assert_resharded, linear, read_safetensors, tree
from scratch import memory_disk

from reshard import OutputError, write_resharding
from reshard.commands.original import read_original
from reshard.commands.resharding import plan_resharding
from reshard.commands.restore import _Restoration
from reshard.placement.strategies import Placed

FLIPS = 150


def assert_round_trip(
    spec: Spec, ranks: int, max_shard_kb: int, directory: Path, layout: Literal["ranks", "source"] = "ranks"
) -> None:
    """Build, zigzag, judge, verify with and without the source, restore, compare."""
    source, output, restored = directory / "source", directory / "output", directory / "restored"
    build(spec, source)
    before = tree(source)
    options = ["--max-shard-size", f"{max_shard_kb}KB", "--layout", layout]
    run_well("zigzag", "--src", source, "--ep", ranks, "--out", output, *options)
    assert_resharded(source, output, ranks, by_rank=layout == "ranks")
    for path in output.glob("*.safetensors") if layout == "ranks" else ():
        sizes = [len(tensor.data) for tensor in read_safetensors(path)[1].values()]
        assert sum(sizes) <= max_shard_kb * 1000 or len(sizes) == 1, f"{path.name} holds {sum(sizes)} bytes"
    run_well("verify", output)
    run_well("verify", output, "--src", source)
    run_well("restore", output, "--out", restored)
    assert_identical_trees(source, restored)
    assert tree(source) == before, "the source has changed"


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Any checkpoint that a family allows."""
    name = draw(st.sampled_from(sorted(FAMILIES)))
    family = FAMILIES[name]
    n_group = draw(st.integers(2, 5))
    grouped = st.integers(2, 5).map(lambda size: n_group * size)
    experts = draw(grouped if family.group_limited else st.integers(3, 24) | st.just(32))
    return Spec(
        name,
        experts=experts,
        layers=draw(st.integers(2, 4)),
        top_k=draw(st.integers(1, 2)),
        n_group=n_group,
        topk_group=draw(st.integers(1, n_group - 1)),
        quantization=draw(st.sampled_from(family.quantizations)),
        router_dtype=draw(st.sampled_from(["BF16", "F32"])),
        token_table_dtype=draw(st.sampled_from(["I64", "I32"])),
        bias_vl=name == "deepseek_v4" and draw(st.booleans()),
        files=draw(st.integers(1, 5)),
        shuffled=draw(st.booleans()),
        header_padding=draw(st.integers(0, 9)),
        spaced_header=draw(st.booleans()),
        metadata=draw(st.sampled_from(["none", "same", "varied"])),
        indent=draw(st.sampled_from([2, 4])),
        final_newline=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    spec=specs(),
    data=st.data(),
    max_shard_kb=st.sampled_from([3, 20, 10**6]),
    layout=st.sampled_from(["ranks", "ranks", "source"]),
)
def test_any_checkpoint_is_resharded_exactly_and_restored_byte_for_byte(
    spec: Spec, data: st.DataObject, max_shard_kb: int, layout: Literal["ranks", "source"]
) -> None:
    ranks = data.draw(st.integers(2, min(spec.experts, 12)), label="ranks")
    with tempfile.TemporaryDirectory(dir=memory_disk()) as directory:
        assert_round_trip(spec, ranks, max_shard_kb, Path(directory), layout)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_no_ep_size_divides_evenly_make_the_round_trip(family: str, tmp_path: Path) -> None:
    assert_round_trip(Spec(family, experts=8), 3, 20, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_may_stay_those_of_the_source(family: str, tmp_path: Path) -> None:
    assert_round_trip(Spec(family, experts=8), 3, 20, tmp_path, "source")


@pytest.mark.parametrize("quantization", ["fp8", "awq", "compressed-tensors", "modelopt"])
def test_every_quantization_of_experts_makes_the_round_trip(quantization: str, tmp_path: Path) -> None:
    assert_round_trip(Spec("deepseek_v2", experts=12, quantization=quantization), 5, 10**6, tmp_path)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a group-limited `source` and its `output` for 3 EP ranks."""
    directory = tmp_path_factory.mktemp("good")
    build(Spec("deepseek_v3", experts=8, layers=2), directory / "source")
    run_well("zigzag", "--src", directory / "source", "--ep", 3, "--out", directory / "output")
    return directory


@pytest.fixture
def spoilt(good: Path, tmp_path: Path) -> Path:
    """A copy of the good output to spoil."""
    return shutil.copytree(good / "output", tmp_path / "output")


def find_tensors(output: Path, suffix: str) -> list[tuple[Path, int, int]]:
    """File, start and size of all tensors whose name ends so."""
    return [
        (path, tensor.start, len(tensor.data))
        for path in sorted(output.glob("*.safetensors"))
        for name, tensor in sorted(read_safetensors(path)[1].items())
        if name.endswith(suffix)
    ]


def swap(path: Path, first: int, second: int, size: int) -> None:
    """Exchange two ranges of a file."""
    data = bytearray(path.read_bytes())
    data[first : first + size], data[second : second + size] = (
        data[second : second + size],
        data[first : first + size],
    )
    path.write_bytes(data)


def swap_experts(output: Path) -> None:
    """Exchange the data of two experts of one rank."""
    (path, first, size), (other_path, second, _), *_ = find_tensors(output, ".down_proj.weight")
    assert path == other_path
    swap(path, first, second, size)


def swap_gate_rows(output: Path) -> None:
    """Exchange the first two rows of a router."""
    path, start, size = find_tensors(output, ".mlp.gate.weight")[0]
    swap(path, start, start + size // 8, size // 8)


def swap_ranks(output: Path) -> None:
    """Exchange the names of two ranks' files."""
    first, second = (min(output.glob(f"model-ep0{rank}-*.safetensors")) for rank in (0, 1))
    aside = first.rename(output / "aside")
    second.rename(first)
    aside.rename(second)


def drop_contract(output: Path) -> None:
    """Make config.json say nothing of the placement."""
    config = json.loads((output / "config.json").read_bytes())
    del config["expert_placement"]
    (output / "config.json").write_text(json.dumps(config))


def test_the_oracle_accepts_a_good_output(good: Path) -> None:
    assert_resharded(good / "source", good / "output", 3)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (swap_experts, r"down_proj\.weight in model-ep00-of-03-\S+ has other bytes"),
        (swap_gate_rows, r"mlp\.gate\.weight in model-shared-\S+ has other bytes"),
        (swap_ranks, r"is in model-ep0\d-\S+, but belongs to rank"),
        (drop_contract, "without a contract"),
    ],
)
def test_the_oracle_rejects_a_spoilt_output(
    spoil: Callable[[Path], None], complaint: str, good: Path, spoilt: Path
) -> None:
    spoil(spoilt)
    with pytest.raises(AssertionError, match=complaint):
        assert_resharded(good / "source", spoilt, 3)


def test_the_oracle_rejects_zigzag_where_linear_placement_is_due(good: Path) -> None:
    with pytest.raises(AssertionError, match="has other bytes"):
        assert_resharded(good / "source", good / "output", 3, placement=linear)


def positions_to_flip(path: Path, count: int, chance: random.Random) -> list[int]:
    """Byte positions of a file: at least one in a safetensors file's length, header and data each."""
    size = path.stat().st_size
    positions = [chance.randrange(size) for _ in range(count)]
    if path.suffix == ".safetensors":
        start = min(tensor.start for tensor in read_safetensors(path)[1].values())
        positions[:3] = chance.randrange(8), chance.randrange(8, start), chance.randrange(start, size)
    return positions


def test_verify_finds_and_names_every_flipped_bit(spoilt: Path) -> None:
    chance = random.Random(0)
    files = [path for path in sorted(spoilt.rglob("*")) if path.is_file() and path.stat().st_size]
    run_well("verify", spoilt)
    for path in files:
        data = path.read_bytes()
        for position in positions_to_flip(path, max(3, FLIPS // len(files)), chance):
            flipped = bytearray(data)
            flipped[position] ^= 1 << chance.randrange(8)
            path.write_bytes(flipped)
            name = path.relative_to(spoilt).as_posix()
            result = run("verify", spoilt)
            assert result.exit_code == 1, f"a bit flipped in byte {position} of {name}: {result.output}"
            assert name in result.output, f"{name} is not named: {result.output}"
        path.write_bytes(data)
    run_well("verify", spoilt)


@pytest.mark.parametrize("part", [".experts.5.up_proj.weight", ".mlp.gate.weight", ".o_proj.weight"])
def test_verify_against_another_source_fails(part: str, good: Path, tmp_path: Path) -> None:
    other = shutil.copytree(good / "source", tmp_path / "source")
    path, start, size = find_tensors(other, part)[0]
    swap(path, start, start + size // 2, size // 2)
    assert run("verify", good / "output", "--src", other).exit_code == 1


def build_output(family: str, directory: Path) -> None:
    """A `source` of that family and its `output` for 3 EP ranks."""
    build(Spec(family, experts=8, layers=2), directory / "source")
    run_well("zigzag", "--src", directory / "source", "--ep", 3, "--out", directory / "output")


def bits_to_flip(path: Path) -> list[tuple[int, int]]:
    """Bytes and a bit of each: a file's ends and middle; a safetensors file's length, header, and data likewise."""
    edges = [0, path.stat().st_size]
    if path.suffix == ".safetensors":
        edges[1:1] = [8, min(tensor.start for tensor in read_safetensors(path)[1].values())]
    found = {at for start, end in pairwise(edges) for at in (start, (start + end) // 2, end - 1)}
    return [(at, number % 8) for number, at in enumerate(sorted(found))]


def assert_restore_refuses_flipped_bits(directory: Path) -> int:
    """Flip bits in each file of `output` that restore reads, one at a time; how many."""
    source, output, restored = directory / "source", directory / "output", directory / "restored"
    originals = {"config.json", "model.safetensors.index.json"} & set(tree(source))
    flipped = 0
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        rewritten = name in originals and (source / name).read_bytes() != path.read_bytes()
        if not path.is_file() or not path.stat().st_size or rewritten:
            continue  # what was rewritten is taken from the manifest
        data = path.read_bytes()
        for position, bit in bits_to_flip(path):
            path.write_bytes(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
            result = run("restore", output, "--out", restored)
            assert result.exit_code == 1, f"bit {bit} flipped in byte {position} of {name}: {result.output}"
            assert name in result.output
            assert not is_loadable(restored)
            shutil.rmtree(restored, ignore_errors=True)
            flipped += 1
        path.write_bytes(data)
    run_well("restore", output, "--out", restored)
    return flipped


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "gpt_oss"])
def test_restore_refuses_every_file_with_a_flipped_bit_and_leaves_nothing_loadable(family: str, tmp_path: Path) -> None:
    build_output(family, tmp_path)
    assert assert_restore_refuses_flipped_bits(tmp_path) > 40


@pytest.mark.parametrize("check", ["check", "check_rewritten"])
def test_without_one_of_its_checks_restore_would_let_a_flipped_bit_pass(
    check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above."""
    build_output("glm4_moe", tmp_path)
    monkeypatch.setattr(_Restoration, check, lambda self, *records: None)
    with pytest.raises(AssertionError, match="flipped in byte"):
        assert_restore_refuses_flipped_bits(tmp_path)


def test_verify_finds_a_header_that_was_changed_together_with_its_digests(good: Path, spoilt: Path) -> None:
    path, start, _ = find_tensors(spoilt, ".down_proj.weight")[0]
    data = path.read_bytes()
    header = data[:start]
    name = header.index(b'.down_proj.weight"')
    shape = header.index(b'"shape":[', name) + len(b'"shape":[')
    end = header.index(b"]", shape)
    rows, columns = header[shape:end].split(b",")
    assert rows != columns
    forged = data[:shape] + columns + b"," + rows + data[end:]
    path.write_bytes(forged)
    record(spoilt, path.name)
    run_well("verify", spoilt)
    result = run("verify", spoilt, "--src", good / "source")
    assert result.exit_code == 1
    assert ".down_proj.weight" in result.output


@pytest.mark.parametrize("name", ["hf_quant_config.json", "modeling_extra.py", "deep/er.json"])
def test_verify_reports_a_file_that_the_manifest_does_not_have(name: str, spoilt: Path) -> None:
    (spoilt / name).parent.mkdir(exist_ok=True)
    (spoilt / name).write_text("{}")
    result = run("verify", spoilt)
    assert result.exit_code == 1
    assert name in result.output


def test_verify_lets_be_what_a_download_leaves_in_hidden_folders(spoilt: Path) -> None:
    (spoilt / ".cache" / "huggingface").mkdir(parents=True)
    (spoilt / ".cache" / "huggingface" / "lock").write_text("")
    run_well("verify", spoilt)


@pytest.mark.parametrize("permutation", [(0, 0, 1, 2, 3, 4, 5, 6), (0, 1, 2, 3), tuple(range(9))])
def test_what_is_no_permutation_is_refused_before_anything_is_planned(permutation: tuple[int, ...], good: Path) -> None:
    original = read_original(good / "source")
    placement = {layer.name: permutation for layer in original.model.layers}
    with pytest.raises(OutputError, match="permutation"):
        plan_resharding(original, "mine", 2, Placed(placement))
    with pytest.raises(OutputError, match="placement for each"):
        plan_resharding(original, "mine", 2, Placed({}))


def test_layers_may_each_have_their_own_permutation(good: Path, tmp_path: Path) -> None:
    original = read_original(good / "source")
    chance = random.Random(0)
    placement = {layer.name: tuple(chance.sample(range(8), 8)) for layer in original.model.layers}
    assert len(set(placement.values())) > 1
    write_resharding(plan_resharding(original, "mine", 3, Placed(placement)), tmp_path / "output")
    run_well("verify", tmp_path / "output", "--src", good / "source")
    run_well("restore", tmp_path / "output", "--out", tmp_path / "restored")
    assert_identical_trees(good / "source", tmp_path / "restored")
