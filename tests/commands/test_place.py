"""`reshard place`: strategies through the front door, judged by the oracle."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Spec, build
from command_line import run, run_well
from oracle import EXPERT, FUSED, assert_identical_trees, assert_resharded, linear, read_safetensors
from scratch import checkpoint

EXPERTS = 8


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 experts in 4 groups, two MoE layers and a dense one before them."""
    return checkpoint(tmp_path_factory, Spec("deepseek_v3", experts=EXPERTS))


def modules(source: Path) -> list[str]:
    """The MoE modules, in the order of layers."""
    names = (name for path in source.glob("*.safetensors") for name in read_safetensors(path)[1])
    found = {match["module"] for name in names if (match := EXPERT.fullmatch(name) or FUSED.fullmatch(name))}
    return sorted(found, key=lambda module: [int(part) for part in module.split(".") if part.isdigit()])


def random_map(source: Path, seed: int = 0) -> dict[str, list[int]]:
    """Another permutation for each MoE module."""
    chance = random.Random(seed)
    placement = {module: chance.sample(range(EXPERTS), EXPERTS) for module in modules(source)}
    assert len({tuple(permutation) for permutation in placement.values()}) > 1
    return placement


def place(source: Path, out: Path, *options: object, ep: int = 4) -> None:
    run_well("place", "--src", source, "--ep", ep, "--out", out, *options)


def assert_right(source: Path, out: Path, placement: Any, strategy: str, *, by_rank: bool = True, ep: int = 4) -> None:
    assert_resharded(source, out, ep, placement, strategy=strategy, by_rank=by_rank)
    run_well("verify", out)
    run_well("verify", out, "--src", source)
    restored = out.parent / f"{out.name}-restored"
    run_well("restore", out, "--out", restored)
    assert_identical_trees(source, restored)


def node_zigzag_by_hand(experts: int, ranks: int) -> list[int]:
    """Of two nodes: the first half of the experts to the first, dealt to its ranks, the other half to the other."""
    half, dealt = experts // 2, ranks // 2
    return [node * half + e for node in (0, 1) for rank in range(dealt) for e in range(half) if e % dealt == rank]


def test_zigzag_is_the_short_form_of_placing_by_zigzag(source: Path, tmp_path: Path) -> None:
    place(source, tmp_path / "placed", "--strategy", "zigzag")
    run_well("zigzag", "--src", source, "--ep", 4, "--out", tmp_path / "zigzagged")
    assert_identical_trees(tmp_path / "zigzagged", tmp_path / "placed")


@pytest.mark.parametrize("layout", ["ranks", "source"])
def test_node_zigzag_is_right_in_both_layouts(layout: str, source: Path, tmp_path: Path) -> None:
    place(source, tmp_path / "out", "--strategy", "node-zigzag", "--nodes", 2, "--layout", layout)
    assert_right(source, tmp_path / "out", node_zigzag_by_hand, "node-zigzag", by_rank=layout == "ranks")
    with pytest.raises(AssertionError):
        assert_resharded(source, tmp_path / "out", 4, strategy="node-zigzag", by_rank=layout == "ranks")


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "qwen3_moe", "gpt_oss", "deepseek_v4"])
def test_a_file_may_place_every_layer_in_its_own_way(family: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    build(Spec(family, experts=EXPERTS), source)
    placement = random_map(source)
    (tmp_path / "map.json").write_text(json.dumps({"physical_to_logical": placement}))
    place(source, tmp_path / "out", "--strategy", "file", "--map", tmp_path / "map.json", ep=3)
    assert_right(source, tmp_path / "out", placement, "file", ep=3)


def test_a_file_may_have_one_placement_for_all_layers_and_a_manifest_is_such_a_file(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "map.json").write_text(json.dumps({"physical_to_logical": list(range(EXPERTS))}))
    place(source, tmp_path / "linear", "--strategy", "file", "--map", tmp_path / "map.json")
    assert_right(source, tmp_path / "linear", linear, "file")
    run_well("zigzag", "--src", source, "--ep", 4, "--out", tmp_path / "zigzagged")
    manifest = tmp_path / "zigzagged" / "reshard_manifest.json"
    place(source, tmp_path / "again", "--strategy", "file", "--map", manifest)
    assert_resharded(source, tmp_path / "again", 4, strategy="file")


def test_what_was_placed_is_said(source: Path, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps({"physical_to_logical": random_map(source)}))
    arguments = ("place", "--src", source, "--ep", 4, "--out", tmp_path / "out")
    by_file = run_well(*arguments, "--strategy", "file", "--map", tmp_path / "map.json", "--dry-run")
    assert f"the file's {len(modules(source))} placements for 4 EP ranks" in by_file
    by_node = run_well(*arguments, "--strategy", "node-zigzag", "--nodes", 2)
    assert "node-zigzag for 4 EP ranks" in by_node
    assert "node-zigzag for 4 EP ranks" in run_well("inspect", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--strategy", "node-zigzag"], "--strategy node-zigzag needs --nodes"),
        (["--strategy", "zigzag", "--nodes", 2], "--nodes does not go with --strategy zigzag"),
        (["--strategy", "file"], "--strategy file needs --map"),
        (["--strategy", "node-zigzag", "--nodes", 2, "--map", "x.json"], "--map does not go with"),
        (["--strategy", "node-zigzag", "--nodes", 1], "--nodes"),
        (["--strategy", "node-zigzag", "--nodes", 3], "--nodes must divide the 4 EP ranks of --ep, found 3"),
        (["--strategy", "other"], "--strategy"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[object], words: str, source: Path, tmp_path: Path
) -> None:
    result = run("place", "--src", source, "--ep", 4, "--out", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert words in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "ep", "nodes", "words"),
    [
        ("deepseek_v3", 6, 3, "4 expert groups cannot be divided evenly among 3 nodes"),
        ("deepseek_v3", 6, 2, ""),
        ("qwen3_moe", 4, 2, "no expert groups"),
    ],
)
def test_nodes_that_groups_do_not_fill_evenly_are_refused(
    family: str, ep: int, nodes: int, words: str, tmp_path: Path
) -> None:
    build(Spec(family, experts=EXPERTS), tmp_path / "source")
    arguments = ("--strategy", "node-zigzag", "--nodes", nodes, "--out", tmp_path / "out")
    result = run("place", "--src", tmp_path / "source", "--ep", ep, *arguments)
    if words:
        assert result.exit_code == 1
        assert words in result.output
        assert not (tmp_path / "out").exists()
    else:  # three ranks for each node's four experts: 2, 1, 1 on the one and 2, 1, 1 on the other is not linear's rule
        assert result.exit_code == 1
        assert "the nodes would hold [5, 3] experts" in result.output


GOOD = {"model.layers.1.mlp": list(range(EXPERTS)), "model.layers.2.mlp": list(range(EXPERTS))}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("{", "expected a placement file in JSON"),
        ("[]", "a JSON object with physical_to_logical"),
        ("{}", "a JSON object with physical_to_logical"),
        (json.dumps({"physical_to_logical": 3}), "not a placement file"),
        (
            json.dumps({"physical_to_logical": [0, 1, 2, 3, 4, 5, 6, 6]}),
            "some experts have copies",
        ),
        (json.dumps({"physical_to_logical": [0, 1, 2, 3]}), "permutation of 0 to 7, found [0, 1, 2, 3]"),
        (json.dumps({"physical_to_logical": [True, 0, 2, 3, 4, 5, 6, 7]}), "not a placement file"),
        (
            json.dumps({"physical_to_logical": {**GOOD, "model.layers.0.mlp": [*range(8)]}}),
            "'model.layers.0.mlp' is not a MoE",
        ),
        (json.dumps({"physical_to_logical": dict([*GOOD.items()][:1])}), "'model.layers.2.mlp' has no placement"),
        (json.dumps({"physical_to_logical": {}}), "physical_to_logical has no layer"),
    ],
)
def test_a_map_that_does_not_fit_is_refused_in_one_line_that_names_it(
    text: str | None, words: str, source: Path, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "map.json").write_text(text)
    arguments = ("--strategy", "file", "--map", tmp_path / "map.json", "--out", tmp_path / "out")
    result = run("place", "--src", source, "--ep", 4, *arguments)
    assert result.exit_code == 1
    assert words in result.output
    assert result.output.count("\n") == 1
    assert "map.json" in result.output or "permutation" in words
    assert not (tmp_path / "out").exists()
