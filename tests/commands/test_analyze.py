"""`reshard analyze`: known answers, brute force, and the command on whole checkpoints."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from checkpoints import Spec, build
from command_line import run, run_well
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import owner
from scratch import checkpoint
from torch import Tensor
from traces import write_trace

import reshard.traffic.effect
from reshard.checkpoint.directory import read_checkpoint
from reshard.errors import OutputError
from reshard.model.layers import read_model
from reshard.placement.permutations import zigzag
from reshard.placement.strategies import STRATEGIES, Balanced, MoeShape, Offer, Placed, Zigzag
from reshard.placement.time_model import ExpertShape
from reshard.traffic.effect import Coselection, Effect, coselection, effect, mean_coselection, mean_effect

EXPERTS, RANKS, GROUP = 16, 4, 4
LINEAR = tuple(range(EXPERTS))
ZIGZAG = zigzag(EXPERTS, RANKS)


def of(ids: list[list[int]], placement: tuple[int, ...], batches: tuple[int, ...] = (4,), nodes: int = 1) -> Effect:
    return effect(torch.tensor(ids), placement, RANKS, nodes, batches)


def test_uniform_traffic_is_even_under_any_placement() -> None:
    ids = [[(4 * token + k) % EXPERTS for k in range(4)] for token in range(4)]
    assert of(ids, LINEAR) == Effect((1.0,), 1.0, 1.0, (1.0,) * 4)
    assert of(ids, ZIGZAG) == Effect((1.0,), 4.0, 1.0, (1.0,) * 4)


def test_one_hot_group_is_one_rank_s_under_linear_and_everyone_s_under_zigzag() -> None:
    ids = [[4, 5, 6, 7]] * 8
    assert of(ids, LINEAR) == Effect((4.0,), 1.0, 1.0, (0.0, 4.0, 0.0, 0.0))
    assert of(ids, ZIGZAG) == Effect((1.0,), 4.0, 1.0, (1.0,) * 4)


def test_one_hot_expert_is_one_rank_s_under_any_placement() -> None:
    ids = [[9]] * 8
    assert of(ids, LINEAR) == Effect((4.0,), 1.0, 1.0, (0.0, 0.0, 4.0, 0.0))
    assert of(ids, ZIGZAG) == Effect((4.0,), 1.0, 1.0, (0.0, 4.0, 0.0, 0.0))


def test_small_batches_are_less_even_than_large_ones() -> None:
    ids = [[token % EXPERTS] for token in range(64)]
    assert of(ids, LINEAR, (1, 4, 16, 64)).imbalance == (4.0, 4.0, 1.0, 1.0)


def test_fewer_tokens_than_a_batch_are_refused() -> None:
    with pytest.raises(OutputError, match="3 tokens are too few for a batch of 4"):
        of([[0], [1], [2]], LINEAR, (1, 4))


def test_a_token_s_nodes_are_those_of_its_ranks() -> None:
    apart, near = of([[0, 4, 8, 12]] * 4, LINEAR, nodes=2), of([[0, 1, 4, 5]] * 4, LINEAR, nodes=2)
    assert (apart.ranks, apart.nodes) == (4.0, 2.0)
    assert (near.ranks, near.nodes) == (2.0, 1.0)


def test_the_mean_over_layers_is_the_mean_of_each_number_and_of_the_busiest_ranks() -> None:
    first, second = Effect((1.0, 2.0), 3.0, 1.0, (1.5, 0.5)), Effect((3.0, 4.0), 5.0, 2.0, (0.25, 1.75))
    assert mean_effect([first, second]) == Effect((2.0, 3.0), 4.0, 1.5, (1.625, 0.375))


def lifts(found: Coselection) -> list[list[float | None]]:
    """How much more often than by chance, None where chance allows for none."""
    return [
        [share / expected if expected else None for share, expected in zip(*rows, strict=True)]
        for rows in zip(found.share, found.expected, strict=True)
    ]


def test_every_pair_as_often_as_any_other_is_chance() -> None:
    found = coselection(torch.tensor(list(itertools.combinations(range(EXPERTS), 3))), EXPERTS, 4)
    assert lifts(found) == [pytest.approx([1.0] * 4)] * 4


def test_groups_that_tokens_keep_to_are_wanted_together_however_often_they_are_wanted() -> None:
    for hot in (1, 5):
        ids = [[0, 1, 2], [1, 2, 3], [0, 2, 3], [0, 1, 3]] * hot + [[4, 6, 7], [4, 5, 7], [4, 5, 6], [5, 6, 7]]
        found = lifts(coselection(torch.tensor(ids), 8, 2))
        assert found[0][1] == found[1][0] == 0
        assert found[0][0] is not None
        assert found[0][0] > 1
        assert found[1][1] is not None
        assert found[1][1] > 1


def test_one_hot_group_is_a_matter_of_how_often_and_not_of_together() -> None:
    ids = [list(token) for token in itertools.combinations(range(4, 8), 2)]
    found = coselection(torch.tensor(ids), EXPERTS, 4)
    assert lifts(found)[1] == [None, pytest.approx(1.0), None, None]
    assert found.share[1] == (0.0, 1.0, 0.0, 0.0)


def test_a_single_expert_is_chosen_with_no_other() -> None:
    found = coselection(torch.tensor([[3], [9]]), EXPERTS, 4)
    assert found.share == found.expected == ((0.0,) * 4,) * 4


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_coselection_agrees_with_counting_by_hand(data: st.DataObject) -> None:
    experts = data.draw(st.integers(4, 14), label="experts")
    runs = data.draw(st.integers(1, 4), label="runs")
    top_k = data.draw(st.integers(2, 4), label="top_k")
    ids = data.draw(st.lists(st.permutations(range(experts)).map(lambda order: order[:top_k]), min_size=1, max_size=9))
    popularity = Counter(itertools.chain.from_iterable(ids))
    share, expected = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for e, f in itertools.permutations(range(experts), 2):
        where = owner(e, experts, runs), owner(f, experts, runs)
        share[where] += sum(e in token and f in token for token in ids)
        expected[where] += popularity[e] * popularity[f]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reshard.traffic.effect, "_CHUNK", data.draw(st.sampled_from([1, 3, 1 << 13]), label="chunk"))
        found = coselection(torch.tensor(ids), experts, runs)
    for counted, matrix in ((share, found.share), (expected, found.expected)):
        total = sum(counted.values())
        for where in itertools.product(range(runs), repeat=2):
            assert matrix[where[0]][where[1]] == pytest.approx(counted[where] / total)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_mean_of_coselections_is_the_mean_of_each_number(layers: int) -> None:
    found = [Coselection(((n / 10, 0.5), (0.25, 0.0)), ((0.25,) * 2,) * 2) for n in range(layers)]
    assert mean_coselection(found).share == ((pytest.approx((layers - 1) / 20), 0.5), (0.25, 0.0))
    assert mean_coselection(found).expected == ((0.25,) * 2,) * 2


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reshard.traffic.effect, "_CHUNK", data.draw(st.sampled_from([1, 4, 1 << 13]), label="chunk"))
        found = effect(torch.tensor(ids), placement, ranks, nodes, (size,))
    loads = Counter(rank_of[expert] for token in ids for expert in token)
    assert found.loads == pytest.approx([loads[rank] * ranks / (tokens * top_k) for rank in range(ranks)])
    assert found.imbalance[0] == pytest.approx(sum(uneven) / len(uneven))
    assert found.ranks == pytest.approx(sum(map(len, reached)) / tokens)
    assert found.nodes == pytest.approx(sum(len({r // per_node for r in some}) for some in reached) / tokens)


def test_copies_load_ranks_by_the_copies_that_each_batch_chooses() -> None:
    """Rank 0 has experts 0, 1 and 2; rank 1 has 2, 3 and 0: each batch may put 0 and 2 on different ranks."""
    placement, ids = [0, 1, 2, 2, 3, 0], torch.tensor([[0, 2]] * 2048)
    found = effect(ids, placement, 2, 1, (1, 512, 1024))
    assert (found.imbalance, found.loads, found.ranks) == ((1.0, 1.0, 1.0), (1.0, 1.0), 2.0)
    one_expert = effect(torch.tensor([[0]] * 2048), placement, 2, 1, (1, 512, 1024))
    assert one_expert.imbalance == (2.0, 2.0, 2.0), "one copy serves a batch"
    by_turns = torch.tensor([[0, 1], [3, 3]] * 1024)[:, :1]  # 0 and 3 in turns: rank 1 has 3, so 0 goes to rank 0
    assert effect(by_turns, placement, 2, 1, (2, 1024)).imbalance == (1.0, 1.0)
    assert effect(ids, [0, 2, 1, 3], 2, 1, (1, 512, 1024)).imbalance == (2.0, 2.0, 2.0), "a control: no copies"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory, Spec("deepseek_v3", experts=EXPERTS))


def test_linear_and_zigzag_are_told_apart_for_every_layer(source: Path) -> None:
    found = json.loads(run_well("analyze", source, "--ep", RANKS, "--nodes", 2, "--batch", 16, "--json"))
    assert [candidate["strategy"] for candidate in found["candidates"]] == ["linear", "zigzag", "node-zigzag"]
    layers = json.loads(run_well("inspect", source, "--json"))["moe_layers"]
    for candidate in found["candidates"]:
        assert list(candidate["layers"]) == list(found["together"]["layers"]) == layers
        means = [layer["imbalance"][0] for layer in candidate["layers"].values()]
        assert candidate["mean"]["imbalance"][0] == pytest.approx(sum(means) / len(means))
        assert all(1 <= mean <= RANKS for mean in means)
        assert all(sum(layer["loads"]) == pytest.approx(RANKS) for layer in candidate["layers"].values())
    ranks = {candidate["strategy"]: candidate["mean"]["ranks"] for candidate in found["candidates"]}
    assert ranks["zigzag"] != ranks["linear"]
    nodes = {candidate["strategy"]: candidate["mean"]["nodes"] for candidate in found["candidates"]}
    assert nodes["node-zigzag"] == nodes["linear"], "groups stay on their node"
    assert "random hidden states" in found["traffic"]
    assert not found["recorded"]
    assert found["advice"]["strategy"] is None
    assert found["together"]["are_groups"]
    assert found["together"]["ranges"] == [[0, 3], [4, 7], [8, 11], [12, 15]]
    same_group = [found["together"]["mean"]["share"][group][group] for group in range(4)]
    assert sum(same_group) > sum(found["together"]["mean"]["expected"][group][group] for group in range(4))


def test_batches_are_all_powers_of_two_that_the_tokens_allow_and_the_table_has_some_of_them(source: Path) -> None:
    arguments = ("analyze", source, "--ep", RANKS, "--tokens", 1100)
    assert json.loads(run_well(*arguments, "--json"))["batch_sizes"] == [2**exponent for exponent in range(11)]
    headings = [line.split() for line in run_well(*arguments).splitlines()]
    assert ["2", "16", "128", "1024", "ranks"] in headings


def test_the_table_has_the_numbers_and_says_what_they_mean(source: Path) -> None:
    arguments = ("analyze", source, "--ep", RANKS, "--nodes", 2, "--batch", 64, "--tokens", 512)
    found = json.loads(run_well(*arguments, "--json"))
    linear, zigzag_, _ = (candidate["mean"] for candidate in found["candidates"])
    text = run_well(*arguments)
    for mean in (linear, zigzag_):
        row = f"{mean['imbalance'][0]:9.3f} {mean['ranks']:9.2f}{mean['nodes']:8.2f}".split()
        assert row in [line.split()[1:] for line in text.splitlines()]
    load = [f"{mean['imbalance'][0]:.2f}x" for mean in (zigzag_, linear)]
    assert f"at 64 tokens the busiest rank has {load[0]} the mean load (linear: {load[1]})" in text
    change = 100 * (zigzag_["ranks"] / linear["ranks"] - 1)
    assert change < -1
    assert f"reaches {zigzag_['ranks']:.2f} ranks (linear: {linear['ranks']:.2f}): {-change:.0f} % less data" in text
    assert "across nodes" in text


def test_layers_prints_the_table_of_each(source: Path) -> None:
    arguments = ("analyze", source, "--ep", RANKS, "--batch", 64, "--tokens", 512)
    found = json.loads(run_well(*arguments, "--json"))
    text = run_well(*arguments, "--layers")
    whole, _, serving = run_well(*arguments).partition("\n\nTo serve")
    assert text.startswith(whole)
    assert text.endswith(serving)
    for layer, effects in found["candidates"][1]["layers"].items():
        of_layer = text.partition(f"\n{layer}:\n")[2].partition("\n\n")[0]
        assert f"{effects['imbalance'][0]:.3f}" in of_layer


def test_the_placements_are_those_asked_for_and_the_first_is_what_others_are_compared_with(source: Path) -> None:
    asked = ("--placement", "zigzag", "--placement", "linear", "--placement", "zigzag")
    arguments = ("analyze", source, "--ep", RANKS, "--nodes", 2, *asked)
    found = json.loads(run_well(*arguments, "--json"))
    assert [candidate["strategy"] for candidate in found["candidates"]] == ["zigzag", "linear"]
    assert "linear instead of zigzag:" in run_well(*arguments)


@pytest.mark.parametrize(("name", "option"), [("node-zigzag", "--nodes"), ("file", "--map")])
def test_a_placement_needs_its_option(name: str, option: str, source: Path) -> None:
    result = run("analyze", source, "--ep", RANKS, "--placement", name)
    assert result.exit_code == 2
    assert f"--placement {name} needs {option}" in result.output


def test_a_model_without_groups_is_told_apart_by_as_many_runs_as_ranks(tmp_path: Path) -> None:
    build(Spec("qwen3_moe", experts=10), tmp_path / "source")
    found = json.loads(run_well("analyze", tmp_path / "source", "--ep", 4, "--tokens", 64, "--json"))
    assert not found["together"]["are_groups"]
    assert found["together"]["ranges"] == [[0, 2], [3, 5], [6, 7], [8, 9]]


class Traces:
    """A trace of the model in `source`, in `directory`."""

    def __init__(self, directory: Path, source: Path) -> None:
        self.directory = directory
        self.layers = [layer.name for layer in read_model(read_checkpoint(source)).layers]

    def put(self, ids: list[list[int]], layers: list[str] | None = None) -> None:
        write_trace(self.directory, dict.fromkeys(layers or self.layers, ids), EXPERTS)


@pytest.fixture
def traces(tmp_path: Path, source: Path) -> Traces:
    return Traces(tmp_path, source)


def test_a_trace_is_what_placements_are_judged_by(traces: Traces, source: Path, tmp_path: Path) -> None:
    traces.put([[4, 5]] * 100)
    arguments = ("analyze", source, "--ep", RANKS, "--trace", tmp_path)
    found = json.loads(run_well(*arguments, "--json"))
    assert found["tokens"] == 100
    assert found["traffic"] == f"tokens recorded in {tmp_path}"
    assert found["recorded"]
    means = {candidate["strategy"]: candidate["mean"] for candidate in found["candidates"]}
    assert means["linear"] == {"imbalance": [4.0] * 7, "ranks": 1.0, "nodes": 1.0, "loads": [4.0, 0.0, 0.0, 0.0]}
    assert means["zigzag"] == {"imbalance": [2.0] * 7, "ranks": 2.0, "nodes": 1.0, "loads": [2.0, 2.0, 0.0, 0.0]}


def test_layers_that_a_trace_lacks_are_left_out_by_name(traces: Traces, source: Path, tmp_path: Path) -> None:
    traces.put([[4, 5]] * 100, traces.layers[:-1])
    arguments = ("analyze", source, "--ep", RANKS, "--trace", tmp_path)
    found = json.loads(run_well(*arguments, "--json"))
    assert found["unrecorded"] == traces.layers[-1:]
    assert list(found["candidates"][0]["layers"]) == traces.layers[:-1]
    assert f"left out, since not recorded: {traces.layers[-1]}" in run_well(*arguments)


def test_of_a_longer_trace_a_part_is_used_and_that_is_said(traces: Traces, source: Path, tmp_path: Path) -> None:
    traces.put([[0, 1]] * 500 + [[4, 5]] * 500)
    arguments = ("analyze", source, "--ep", RANKS, "--trace", tmp_path, "--tokens", 300, "--batch", 100, "--json")
    found = json.loads(run_well(*arguments))
    assert found["tokens"] == 300
    assert found["traffic"].endswith(", sampled evenly from 1000")
    loads = found["candidates"][0]["layers"][traces.layers[0]]["loads"]
    assert loads == pytest.approx([2.0, 2.0, 0.0, 0.0]), "as many of each half"


def test_tokens_that_a_placement_was_made_from_do_not_judge_it(
    traces: Traces, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Made(Balanced):  # of any trace, however short
        name = "made"

        def place(self, model: MoeShape, expert: ExpertShape, traffic: Mapping[str, Tensor]) -> Placed:
            return Zigzag(self.ep_size).place(model)

    def offer(share: float) -> Offer:
        return Offer(lambda ep_size, options: Made(ep_size, tmp_path, share=share), needs=("trace",))

    arguments = ("analyze", source, "--ep", RANKS, "--trace", tmp_path, "--json")
    traces.put([[0, 1]] * 50 + [[4, 5]] * 51)
    assert json.loads(run_well(*arguments))["tokens"] == 101
    monkeypatch.setitem(STRATEGIES, "made", offer(0.5))
    found = json.loads(run_well(*arguments))
    assert [candidate["strategy"] for candidate in found["candidates"]] == ["linear", "zigzag", "made"]
    assert found["tokens"] == 50
    assert found["traffic"].endswith("after the first 50%, which made was made from")
    assert found["candidates"][0]["layers"][traces.layers[0]]["loads"] == [0.0, 4.0, 0.0, 0.0]
    monkeypatch.setitem(STRATEGIES, "made", offer(1.0))
    result = run(*arguments)
    assert result.exit_code == 1
    assert "record more" in result.output


def test_a_directory_without_a_trace_is_refused(source: Path, tmp_path: Path) -> None:
    result = run("analyze", source, "--ep", RANKS, "--trace", tmp_path)
    assert result.exit_code == 1
    assert str(tmp_path) in result.output


def test_the_choices_are_those_of_the_checkpoint_s_gates(source: Path) -> None:
    from reshard.model.router import Router, load_tensor, read_routers, route
    from reshard.traffic.choices import random_traffic

    checkpoint = read_checkpoint(source)
    model = read_model(checkpoint)
    traffic = random_traffic(checkpoint, model, 64, 7, lambda layers: None)
    for number, layer in enumerate(model.layers):
        tensors = {tensor.name: load_tensor(checkpoint.source, tensor) for tensor in layer.router}
        router = next(read_routers(layer, tensors.__getitem__, torch.float64))
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
        (["--ep", 1], 2, "--ep"),
        (["--ep", 17], 1, "--ep must be from 2 to the 16 experts"),
        (["--ep", 4, "--nodes", 3], 2, "--nodes must divide the 4 EP ranks"),
        (["--ep", 4, "--tokens", 4, "--batch", 8, "--batch", 64], 2, "--batch 64 is more than --tokens 4"),
        (["--ep", 4, "--batch", 8192], 1, "4096 tokens are too few for a batch of 8192"),
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


def test_it_ends_with_the_commands_that_serve_the_original_so(traces: Traces, source: Path, tmp_path: Path) -> None:
    traces.put([[4, 5]] * 10_000)
    serve = f"vllm serve {source} --tensor-parallel-size {RANKS} --enable-expert-parallel"
    arguments = ["analyze", source, "--ep", RANKS, "--nodes", 2, "--trace", tmp_path]
    commands = json.loads(run_well(*arguments, "--json"))["serve"]
    assert commands == {
        "linear": [serve],
        "zigzag": [f"RESHARD_PLACEMENT=zigzag {serve}"],
        "node-zigzag": [f"RESHARD_PLACEMENT=node-zigzag:2 {serve}"],
        "balanced": [
            f"reshard export {source} --to vllm --ep {RANKS} --strategy balanced --nodes 2 --trace {tmp_path} "
            "--out balanced.json",
            f"RESHARD_PLACEMENT=balanced.json {serve}",
        ],
    }
    text = run_well(*arguments)
    assert all(command in text for found in commands.values() for command in found)
    made = commands["balanced"][0].replace("balanced.json", str(tmp_path / "balanced.json")).split()[1:]
    run_well(*made)
    assert json.loads((tmp_path / "balanced.json").read_text())["strategy"] == "balanced"
