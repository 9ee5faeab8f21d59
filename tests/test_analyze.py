"""`reshard analyze`: known answers, brute force, and the command on whole checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import Spec, build
from command_line import run, run_well
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import owner

from reshard.analysis import Effect, effect, mean_effect
from reshard.placement import zigzag

EXPERTS, RANKS, GROUP = 16, 4, 4
LINEAR = tuple(range(EXPERTS))
ZIGZAG = zigzag(EXPERTS, RANKS)


def of(ids: list[list[int]], placement: tuple[int, ...], batches: tuple[int, ...] = (4,), nodes: int = 1) -> Effect:
    return effect(torch.tensor(ids), placement, RANKS, nodes, batches)


def test_uniform_traffic_is_even_under_any_placement() -> None:
    ids = [[(4 * token + k) % EXPERTS for k in range(4)] for token in range(4)]
    assert of(ids, LINEAR) == Effect((1.0,), 1.0, 1.0)
    assert of(ids, ZIGZAG) == Effect((1.0,), 4.0, 1.0)


def test_one_hot_group_is_one_rank_s_under_linear_and_everyone_s_under_zigzag() -> None:
    ids = [[4, 5, 6, 7]] * 8
    assert of(ids, LINEAR) == Effect((4.0,), 1.0, 1.0)
    assert of(ids, ZIGZAG) == Effect((1.0,), 4.0, 1.0)


def test_one_hot_expert_is_one_rank_s_under_any_placement() -> None:
    ids = [[9]] * 8
    assert of(ids, LINEAR) == of(ids, ZIGZAG) == Effect((4.0,), 1.0, 1.0)


def test_small_batches_are_less_even_than_large_ones() -> None:
    ids = [[token % EXPERTS] for token in range(64)]
    assert of(ids, LINEAR, (1, 4, 16, 64)).imbalance == (4.0, 4.0, 1.0, 1.0)


def test_a_token_s_nodes_are_those_of_its_ranks() -> None:
    assert of([[0, 4, 8, 12]] * 4, LINEAR, nodes=2) == Effect((1.0,), 4.0, 2.0)
    assert of([[0, 1, 4, 5]] * 4, LINEAR, nodes=2) == Effect((2.0,), 2.0, 1.0)


def test_the_mean_over_layers_is_the_mean_of_each_number() -> None:
    assert mean_effect([Effect((1.0, 2.0), 3.0, 1.0), Effect((3.0, 4.0), 5.0, 2.0)]) == Effect((2.0, 3.0), 4.0, 1.5)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_effects_agree_with_counting_by_hand(data: st.DataObject) -> None:
    experts = data.draw(st.integers(4, 20), label="experts")
    nodes, per_node = data.draw(st.sampled_from([(1, 2), (1, 3), (2, 1), (2, 2)]), label="nodes")
    ranks = nodes * per_node
    size = data.draw(st.integers(1, 5), label="batch")
    tokens = data.draw(st.integers(size, 12), label="tokens")
    top_k = data.draw(st.integers(1, 3), label="top_k")
    placement = data.draw(st.permutations(range(experts)))
    ids = [data.draw(st.permutations(range(experts)))[:top_k] for _ in range(tokens)]
    rank_of = {logical: owner(physical, experts, ranks) for physical, logical in enumerate(placement)}
    uneven = []
    for first in range(0, tokens - size + 1, size):
        loads = [0] * ranks
        for token in ids[first : first + size]:
            for expert in token:
                loads[rank_of[expert]] += 1
        uneven.append(max(loads) / (size * top_k / ranks))
    reached = [{rank_of[expert] for expert in token} for token in ids]
    found = effect(torch.tensor(ids), placement, ranks, nodes, (size,))
    assert found.imbalance[0] == pytest.approx(sum(uneven) / len(uneven))
    assert found.ranks == pytest.approx(sum(map(len, reached)) / tokens)
    assert found.nodes == pytest.approx(sum(len({r // per_node for r in some}) for some in reached) / tokens)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("analyze") / "source"
    build(Spec("deepseek_v3", experts=EXPERTS), directory)
    return directory


def test_linear_and_zigzag_are_told_apart_for_every_layer(source: Path) -> None:
    found = json.loads(run_well("analyze", source, "--ep", RANKS, "--nodes", 2, "--batch", 16, "--json"))
    assert [candidate["strategy"] for candidate in found["candidates"]] == ["linear", "zigzag", "node-zigzag"]
    layers = json.loads(run_well("inspect", source, "--json"))["moe_layers"]
    for candidate in found["candidates"]:
        assert list(candidate["layers"]) == layers
        means = [layer["imbalance"][0] for layer in candidate["layers"].values()]
        assert candidate["mean"]["imbalance"][0] == pytest.approx(sum(means) / len(means))
        assert all(1 <= mean <= RANKS for mean in means)
    ranks = {candidate["strategy"]: candidate["mean"]["ranks"] for candidate in found["candidates"]}
    assert ranks["zigzag"] != ranks["linear"]
    nodes = {candidate["strategy"]: candidate["mean"]["nodes"] for candidate in found["candidates"]}
    assert nodes["node-zigzag"] == nodes["linear"], "groups stay on their node"
    assert "lower bound" in found["traffic"]


def test_the_choices_are_those_of_the_checkpoint_s_gates(source: Path) -> None:
    from reshard import read_checkpoint, read_model
    from reshard.router import Router, read_routers, route
    from reshard.traffic import random_traffic

    checkpoint = read_checkpoint(source)
    model = read_model(checkpoint)
    traffic = random_traffic(checkpoint, model, 64, 7, lambda layers: None)
    for number, layer in enumerate(model.layers):
        files = {tensor.name: source / tensor.file for tensor in layer.router}
        router = next(read_routers(layer, files, torch.float64))
        hidden = torch.randn(64, router.weight_EH.shape[1], generator=torch.Generator().manual_seed(7 + number))
        expected = route(hidden.double(), router, model.routing).experts_TK
        assert torch.equal(traffic.ids[layer.name].sort(dim=1).values, expected.sort(dim=1).values)
        flipped = Router(-router.weight_EH, router.logit_bias_E, router.correction_E)
        assert not torch.equal(expected, route(hidden.double(), flipped, model.routing).experts_TK)


def test_the_same_seed_gives_the_same_numbers_and_another_gives_others(source: Path) -> None:
    first, again, other = (
        run_well("analyze", source, "--ep", RANKS, "--tokens", 256, "--seed", seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("family", ["deepseek_v4", "gpt_oss", "qwen3_moe", "llama4"])
def test_every_kind_of_router_can_be_analyzed(family: str, tmp_path: Path) -> None:
    build(Spec(family, experts=8), tmp_path / "source")
    text = run_well("analyze", tmp_path / "source", "--ep", 4, "--tokens", 64)
    assert "zigzag" in text
    assert "512 tokens" not in text, "a batch that cannot be had is left out"


def test_a_placement_from_a_file_is_one_more_row(source: Path, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps({"physical_to_logical": list(ZIGZAG)}))
    arguments = ("analyze", source, "--ep", RANKS, "--map", tmp_path / "map.json", "--json")
    found = {row["strategy"]: row["mean"] for row in json.loads(run_well(*arguments))["candidates"]}
    assert found["file"] == found["zigzag"] != found["linear"]


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--ep", 1], 1, "--ep must be from 2 to the 16 experts"),
        (["--ep", 4, "--nodes", 3], 1, "--nodes must divide the 4 EP ranks"),
        (["--ep", 4, "--tokens", 4], 1, "no batch of 8, 64, 512, 4096 tokens can be had from 4"),
        (["--ep", 4, "--tokens", 0], 2, "--tokens"),
        ([], 2, "--ep"),
    ],
)
def test_what_cannot_be_analyzed_is_refused(options: list[object], status: int, words: str, source: Path) -> None:
    result = run("analyze", source, *options)
    assert result.exit_code == status
    assert words in result.output


def test_an_output_is_refused(source: Path, tmp_path: Path) -> None:
    run_well("zigzag", "--src", source, "--ep", 4, "--out", tmp_path / "out")
    result = run("analyze", tmp_path / "out", "--ep", 4)
    assert result.exit_code == 1
    assert "already resharded" in result.output
