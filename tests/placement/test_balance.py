"""Balanced placement: known answers, all placements of few experts, and learned routing that it was not made from."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoints import Spec, build
from command_line import run, run_well
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_resharded, owner, zigzag
from safetensors.torch import load_file
from scratch import checkpoint
from torch import Tensor
from traces import write_trace

from reshard import read_checkpoint, read_model
from reshard.commands.original import place_experts, read_original
from reshard.errors import OutputError
from reshard.placement import balance, swaps
from reshard.placement.balance import Batches, gather, packed, placement_of, search, slowest, spread
from reshard.placement.permutations import rank_of_each
from reshard.placement.steps import DEFAULT_MIX, Step
from reshard.placement.strategies import Balanced
from reshard.placement.swaps import Aim
from reshard.placement.time_model import ExpertShape, GpuProfile, Kernels, read_gpu
from reshard.traffic.effect import Effect, effect

LEARNED = load_file(Path(__file__).parents[1] / "data" / "routing.safetensors")
EXPERTS = 64
EXPERTS_OF_SOURCE = 8
BATCH_SIZES = (64, 512, 4096)
# A GPU on which time is pairs: it reads and starts in no time, and its tiles have one row.
_NO_MORE = Kernels(source="", launch=0.0, read_share=1.0, flops_share=1.0, rows_share=1.0, tile=1)
PAIRS = Aim(
    tuple(Step("prefill", size) for size in BATCH_SIZES),
    ExpertShape(1, 1, 1, 1, "bf16"),
    GpuProfile(source="", bandwidth=1e30, flops={"bf16": 1.0}, link=1.0, kernels=_NO_MORE),
)


def balanced(ids_TK: Tensor, experts: int, ranks: int, nodes: int = 1) -> tuple[int, ...]:
    """By pairs, in consecutive batches of BATCH_SIZES."""
    return balance.balanced(ids_TK, experts, ranks, PAIRS, nodes)


def batches(ids_TK: Tensor, experts: int, ranks: int) -> Batches:
    return swaps.batches(ids_TK, experts, ranks, PAIRS)


def as_place_does(source: Path, ids_TK: Tensor, ranks: int, nodes: int = 1) -> tuple[int, ...]:
    """With the aim that the command line has unless told otherwise."""
    aim = Aim(DEFAULT_MIX, read_original(source).sizes.expert, read_gpu("H200"))
    return balance.balanced(ids_TK, EXPERTS_OF_SOURCE, ranks, aim, nodes)


def ranks_of(physical_to_logical: Sequence[int], ep_size: int) -> Tensor:
    """rank_E of a placement."""
    return torch.tensor(rank_of_each(physical_to_logical, ep_size))


def drawn(seed: int, experts: int, top_k: int, tokens: int = 1024, stretch: int = 64) -> Tensor:
    """Traffic [T, K] whose experts are liked unequally, and in each stretch of tokens in another way."""
    generator = torch.Generator().manual_seed(seed)
    liking_TE = torch.randn(-(-tokens // stretch), experts, generator=generator).repeat_interleave(stretch, 0)[:tokens]
    liking_TE = liking_TE + torch.randn(experts, generator=generator)
    chance_TE = torch.rand(tokens, experts, generator=generator)
    return (liking_TE - chance_TE.log().neg().log()).topk(top_k, dim=1).indices


def seen(ids_TK: Tensor, physical_to_logical: tuple[int, ...], ranks: int, nodes: int = 1) -> Effect:
    return effect(ids_TK, physical_to_logical, ranks, nodes, [size for size in BATCH_SIZES if size <= len(ids_TK)])


def unevenness(ids_TK: Tensor, physical_to_logical: tuple[int, ...], ranks: int) -> float:
    found = seen(ids_TK, physical_to_logical, ranks).imbalance
    return sum(found) / len(found)


def held(physical_to_logical: tuple[int, ...], ranks: int) -> list[set[int]]:
    """The logical experts of each rank."""
    experts = len(physical_to_logical)
    sets: list[set[int]] = [set() for _ in range(ranks)]
    for physical, logical in enumerate(physical_to_logical):
        sets[owner(physical, experts, ranks)].add(logical)
    return sets


def linear_of(experts: int, ranks: int) -> tuple[int, ...]:
    return tuple(range(experts))


def zigzag_of(experts: int, ranks: int) -> tuple[int, ...]:
    return tuple(zigzag(experts, ranks))


# Known answers


def test_uniform_routing_is_spread_evenly_and_what_is_used_together_stays_together() -> None:
    ids_TK = torch.arange(4096 * 4).view(-1, 4) % 16  # a token's experts are 0 to 3, or 4 to 7, and so on
    assert seen(ids_TK, balanced(ids_TK, 16, 4), 4) == Effect((1.0, 1.0, 1.0), 1.0, 1.0, (1.0,) * 4)


def test_of_one_hot_group_every_rank_gets_a_part() -> None:
    ids_TK = torch.tensor([[4, 5], [6, 7]]).repeat(2048, 1)
    placed = balanced(ids_TK, 16, 4)
    assert [len(experts & {4, 5, 6, 7}) for experts in held(placed, 4)] == [1, 1, 1, 1]
    assert unevenness(ids_TK, placed, 4) == 1
    assert unevenness(ids_TK, tuple(range(16)), 4) == 4


def test_beside_one_hot_expert_nobody_has_work() -> None:
    others = torch.arange(4096).unsqueeze(1) % 12 + 1  # 13, 14 and 15 are never chosen
    placed = balanced(torch.cat([torch.zeros_like(others), others], dim=1), 16, 4)
    assert {0, 13, 14, 15} in held(placed, 4)


def test_experts_that_are_used_at_the_same_time_are_kept_apart_though_all_are_used_alike() -> None:
    sets = torch.randperm(16, generator=torch.Generator().manual_seed(0)).view(4, 4)
    token_T = torch.arange(8192)
    ids_TK = sets[token_T // 64 % 4, token_T % 4].unsqueeze(1)  # for 64 tokens one set of experts, then another
    assert unevenness(ids_TK, balanced(ids_TK, 16, 4), 4) == 1
    for blind in (linear_of(16, 4), zigzag_of(16, 4), packed([1.0] * 16, 4)):
        assert unevenness(ids_TK, blind, 4) > 1.2


def test_ranks_may_hold_unequal_numbers_of_experts() -> None:
    placed = balanced(drawn(0, 10, 2), 10, 4)
    assert [len(experts) for experts in held(placed, 4)] == [3, 3, 2, 2]
    assert sorted(placed) == list(range(10))
    first, second = slice(0, 3), slice(3, 6)
    assert sorted(placed[first]) == list(placed[first]) and sorted(placed[second]) == list(placed[second])


def test_tokens_are_kept_on_a_node_first_and_balanced_within_it() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs_TK = torch.rand(8192, 8, generator=generator).topk(2, dim=1).indices
    ids_TK = 2 * pairs_TK + torch.arange(8192).unsqueeze(1) % 2  # even experts for one token, odd ones for the next
    with_nodes, without = (balanced(ids_TK, 16, 4, nodes) for nodes in (2, 1))
    assert seen(ids_TK, with_nodes, 4, 2).nodes == 1 < seen(ids_TK, linear_of(16, 4), 4, 2).nodes
    assert unevenness(ids_TK, with_nodes, 4) <= unevenness(ids_TK, without, 4) + 0.01


def test_the_same_trace_gives_the_same_placement() -> None:
    assert balanced(drawn(1, 16, 2), 16, 4) == balanced(drawn(1, 16, 2), 16, 4) != balanced(drawn(2, 16, 2), 16, 4)


def test_all_of_a_long_trace_is_looked_at() -> None:
    early, late = torch.arange(4), torch.arange(4, 8)
    ids_TK = torch.cat([early.repeat(balance.TOKENS // 2), late.repeat(balance.TOKENS // 2)]).unsqueeze(1)
    assert len(ids_TK) > 2 * balance.TOKENS
    placed = held(balanced(ids_TK, 16, 4), 4)
    assert all(len(experts & set(half.tolist())) == 1 for experts in placed for half in (early, late))


# Every placement there is


@cache
def all_placements(experts: int, ranks: int) -> Tensor:
    """The rank of each expert in every placement, [N, E]."""
    sizes = [experts // ranks + (rank < experts % ranks) for rank in range(ranks)]
    every = itertools.product(range(ranks), repeat=experts)
    return torch.tensor([rank_E for rank_E in every if [rank_E.count(rank) for rank in range(ranks)] == sizes])


def least(ids_TK: Tensor, experts: int, ranks: int) -> float:
    """The best value of what is minimized, counted in another way than the package does."""
    rank_NE = all_placements(experts, ranks)
    chosen_TE = torch.nn.functional.one_hot(ids_TK, experts).sum(dim=1).double()
    sizes = [size for size in BATCH_SIZES if size <= len(ids_TK)] + [len(ids_TK)]  # shorter than the longest batch
    value_N = torch.zeros(len(rank_NE), dtype=torch.double)
    for size in sizes:
        count_BE = torch.stack([chosen_TE[start : start + size].sum(dim=0) for start in range(0, len(ids_TK), size)])
        load_NBR = torch.einsum("be,ner->nbr", count_BE, torch.nn.functional.one_hot(rank_NE, ranks).double())
        value_N += (load_NBR.amax(dim=2) / load_NBR.mean(dim=2)).mean(dim=1) / len(sizes)
    return float(value_N.min())


@pytest.mark.parametrize(("experts", "ranks"), [(6, 2), (7, 2), (8, 2), (9, 2), (6, 3), (7, 3), (8, 3), (9, 3)])
def test_the_search_finds_the_best_of_all_placements(experts: int, ranks: int) -> None:
    for seed in range(12):
        ids_TK = drawn(seed, experts, 1 + seed % 3)
        traffic = batches(ids_TK, experts, ranks)
        found = slowest(search([ranks_of(packed([1.0] * experts, ranks), ranks)], traffic, ranks), traffic, ranks)
        assert found == pytest.approx(least(ids_TK, experts, ranks), abs=1e-4), f"seed {seed}"


def test_one_descent_alone_does_not_find_it_always() -> None:
    """A control: the cases above are not so easy that anything would do."""
    missed = 0
    for seed in range(12):
        ids_TK = drawn(seed, 9, 1 + seed % 3)
        traffic = batches(ids_TK, 9, 3)
        end_E = spread(ranks_of(packed([1.0] * 9, 3), 3), traffic, 3)
        missed += slowest(end_E, traffic, 3) > least(ids_TK, 9, 3) + 1e-3
    assert missed


cases = st.tuples(st.integers(0, 1000), st.integers(6, 12), st.sampled_from([(2, 1), (3, 1), (4, 1), (4, 2), (6, 3)]))


def swapped(physical_to_logical: tuple[int, ...], one: int, other: int) -> tuple[int, ...]:
    exchange = {one: other, other: one}
    return tuple(exchange.get(expert, expert) for expert in physical_to_logical)


@settings(max_examples=30, deadline=None)
@given(cases)
def test_no_swap_is_left_that_lowers_the_slowest_rank(case: tuple[int, int, tuple[int, int]]) -> None:
    seed, experts, (ranks, _) = case
    ids_TK = drawn(seed, experts, 2, tokens=512)
    traffic = batches(ids_TK, experts, ranks)
    placed = placement_of(spread(ranks_of(tuple(range(experts)), ranks), traffic, ranks))
    assert slowest(ranks_of(placed, ranks), traffic, ranks) == pytest.approx(unevenness(ids_TK, placed, ranks))
    for one, other in itertools.combinations(range(experts), 2):
        assert unevenness(ids_TK, swapped(placed, one, other), ranks) > unevenness(ids_TK, placed, ranks) - 1e-4


@settings(max_examples=30, deadline=None)
@given(cases)
def test_no_swap_is_left_that_lowers_fan_out_when_balance_does_not_matter(
    case: tuple[int, int, tuple[int, int]],
) -> None:
    seed, experts, (ranks, nodes) = case
    ids_TK = drawn(seed, experts, 3, tokens=512)
    even = Batches(torch.zeros(experts, 1), torch.ones(1))  # no load at all
    placed = placement_of(gather(ranks_of(tuple(range(experts)), ranks), ids_TK, even, ranks, nodes, 1.0))

    def far(physical_to_logical: tuple[int, ...]) -> float:
        found = seen(ids_TK, physical_to_logical, ranks, nodes)
        return found.ranks + (3 * found.nodes if nodes > 1 else 0)

    for one, other in itertools.combinations(range(experts), 2):
        assert far(swapped(placed, one, other)) > far(placed) - balance.WORTH - 1e-6


@settings(max_examples=20, deadline=None)
@given(cases, st.floats(0, 0.3))
def test_fan_out_is_lowered_no_further_than_balance_allows(case: tuple[int, int, tuple[int, int]], room: float) -> None:
    seed, experts, (ranks, nodes) = case
    ids_TK = drawn(seed, experts, 3, tokens=512)
    traffic = batches(ids_TK, experts, ranks)
    before = spread(ranks_of(tuple(range(experts)), ranks), traffic, ranks)
    ceiling = slowest(before, traffic, ranks) + room
    after = gather(before, ids_TK, traffic, ranks, nodes, ceiling)
    assert slowest(after, traffic, ranks) <= ceiling + 1e-4
    found, was = (seen(ids_TK, placement_of(rank_E), ranks, nodes) for rank_E in (after, before))
    assert (found.nodes, found.ranks) <= (was.nodes, was.ranks)


# Tokens that a placement was not made from


def eplb(ids_TK: Tensor, experts: int, ranks: int) -> tuple[int, ...]:
    """EPLB's packing without replicas, written from DeepSeek's description: the heaviest to the lightest with room."""
    weights = torch.bincount(ids_TK.flatten(), minlength=experts).tolist()
    packs: list[list[int]] = [[] for _ in range(ranks)]
    room = [experts // ranks + (rank < experts % ranks) for rank in range(ranks)]
    for weight, expert in sorted(((-weight, expert) for expert, weight in enumerate(weights))):
        assert weight <= 0
        lightest = None
        for rank in range(ranks):
            sum_here = sum(weights[other] for other in packs[rank])
            if len(packs[rank]) < room[rank] and (lightest is None or sum_here < lightest[0]):
                lightest = sum_here, rank
        assert lightest is not None
        packs[lightest[1]].append(expert)
    return tuple(expert for pack in packs for expert in sorted(pack))


def learned() -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """Layer, the tokens a placement is made from, others of the same text, and tokens of another kind."""
    halves = []
    for layer, (ids_TK, other_TK) in enumerate(zip(LEARNED["python"].long(), LEARNED["prose"].long(), strict=True)):
        first, second = ids_TK.chunk(2)
        halves += [(layer, first, second, other_TK), (layer, second, first, other_TK)]
    return halves


def worse_on_unseen(place: Callable[[Tensor, int, int], tuple[int, ...]], ranks: int) -> list[str]:
    """Where placements are less even than zigzag, or than EPLB's packing, on tokens they were not made from."""
    failures = []
    for layer, made_from, unseen, _ in learned():
        mine = unevenness(unseen, place(made_from, EXPERTS, ranks), ranks)
        rivals = {"zigzag": zigzag_of(EXPERTS, ranks), "eplb": eplb(made_from, EXPERTS, ranks)}
        for name, rival in rivals.items():
            if mine > unevenness(unseen, rival, ranks) + 1e-9:
                failures.append(f"layer {layer}, {ranks} ranks: worse than {name}")
    return failures


@pytest.mark.parametrize("ranks", [4, 8, 12, 16])
def test_on_unseen_tokens_it_is_never_worse_than_zigzag_or_eplb(ranks: int) -> None:
    assert not worse_on_unseen(balanced, ranks)


def test_with_nodes_unseen_tokens_reach_no_more_of_them_than_under_linear() -> None:
    """And ranks are more even than under linear, which keeps a token's experts together as well."""
    for layer, made_from, unseen, _ in learned()[1:3]:
        placed, linear = balanced(made_from, EXPERTS, 8, 2), linear_of(EXPERTS, 8)
        mine, theirs = (seen(unseen, placement, 8, 2).nodes for placement in (placed, linear))
        assert mine <= 1.005 * theirs, f"layer {layer}"
        assert unevenness(unseen, placed, 8) < unevenness(unseen, linear, 8), f"layer {layer}"


@pytest.mark.parametrize("place", [lambda ids, experts, ranks: linear_of(experts, ranks), eplb], ids=["linear", "eplb"])
def test_the_rivals_do_not_pass_that_test(place: Callable[[Tensor, int, int], tuple[int, ...]]) -> None:
    failures = [failure for ranks in (4, 8, 12, 16) for failure in worse_on_unseen(place, ranks)]
    assert len(failures) > 3


def test_most_of_what_zigzag_leaves_uneven_is_gone_and_on_another_kind_of_text_part_of_it() -> None:
    mine, theirs, mine_on_other, theirs_on_other = (0.0,) * 4
    for _, made_from, unseen, other in learned():
        placed, dealt = balanced(made_from, EXPERTS, 8), zigzag_of(EXPERTS, 8)
        mine, theirs = mine + unevenness(unseen, placed, 8) - 1, theirs + unevenness(unseen, dealt, 8) - 1
        mine_on_other += unevenness(other, placed, 8) - 1
        theirs_on_other += unevenness(other, dealt, 8) - 1
    assert mine < 0.8 * theirs
    assert mine_on_other < theirs_on_other


@pytest.mark.parametrize("ranks", [8, 16])
def test_packing_is_eplb_s(ranks: int) -> None:
    for _, made_from, _, _ in learned():
        loads = made_from.flatten().bincount(minlength=EXPERTS).tolist()
        assert packed(loads, ranks) == eplb(made_from, EXPERTS, ranks)


def test_a_search_that_does_not_hold_on_unseen_tokens_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def misled(starts: list[Tensor], traffic: Batches, ep_size: int) -> Tensor:
        """Half of the most used experts on one rank."""
        return ranks_of(traffic.load_EB.sum(dim=1).argsort(descending=True).tolist(), ep_size)

    monkeypatch.setattr(balance, "search", misled)
    for _, made_from, _, _ in learned()[:1]:
        assert balanced(made_from, EXPERTS, 8) in (zigzag_of(EXPERTS, 8), eplb(made_from, EXPERTS, 8))


# The strategy, `reshard place`, `export` and `analyze`


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 experts in 4 groups, two MoE layers, and an MTP draft that is one more."""
    return checkpoint(tmp_path_factory, Spec("deepseek_v3", experts=EXPERTS_OF_SOURCE))


def recorded(directory: Path, source: Path, *ids: Tensor) -> Path:
    """A trace with these ids of the first layers."""
    layers = read_model(read_checkpoint(source)).layers
    named = {layer.name: ids_TK.tolist() for layer, ids_TK in zip(layers, ids, strict=False)}
    return write_trace(directory / "trace", named, EXPERTS_OF_SOURCE)


def test_place_puts_each_layer_s_experts_where_its_own_traffic_wants_them(source: Path, tmp_path: Path) -> None:
    traffic = [drawn(seed, 8, 2, tokens=4096) for seed in (1, 2, 3)]
    trace = recorded(tmp_path, source, *traffic)
    layers = [layer.name for layer in read_model(read_checkpoint(source)).layers]
    expected = {name: list(as_place_does(source, ids_TK, 4, 2)) for name, ids_TK in zip(layers, traffic, strict=True)}
    assert len({tuple(placed) for placed in expected.values()}) == 3
    arguments = ("--strategy", "balanced", "--trace", trace, "--nodes", 2)
    said = run_well("place", "--src", source, "--ep", 4, "--out", tmp_path / "out", *arguments)
    assert "balanced for 4 EP ranks" in said
    assert "zigzag" not in said
    assert_resharded(source, tmp_path / "out", 4, expected, strategy="balanced")


def test_a_layer_without_traffic_gets_zigzag_and_place_says_so(source: Path, tmp_path: Path) -> None:
    traffic = [drawn(seed, 8, 2, tokens=4096) for seed in (1, 2)]
    trace = recorded(tmp_path, source, *traffic)
    *first, draft = (layer.name for layer in read_model(read_checkpoint(source)).layers)
    arguments = ("--strategy", "balanced", "--trace", trace)
    said = run_well("place", "--src", source, "--ep", 4, "--out", tmp_path / "out", *arguments)
    assert f"note: {trace} has no traffic of {draft}: these layers got zigzag" in said
    expected = {name: list(as_place_does(source, ids_TK, 4)) for name, ids_TK in zip(first, traffic, strict=True)}
    expected[draft] = zigzag(8, 4)
    assert_resharded(source, tmp_path / "out", 4, expected, strategy="balanced")


def test_export_writes_the_same_placement_for_an_engine_without_resharding(source: Path, tmp_path: Path) -> None:
    trace = recorded(tmp_path, source, *[drawn(seed, 8, 2, tokens=4096) for seed in (1, 2, 3)])
    arguments = ("--strategy", "balanced", "--trace", trace)
    run_well("place", "--src", source, "--ep", 4, "--out", tmp_path / "out", *arguments)
    run_well("export", source, "--to", "trtllm", "--ep", 4, *arguments, "--out", tmp_path / "straight.yaml")
    run_well("export", tmp_path / "out", "--to", "trtllm", "--out", tmp_path / "from-output.yaml")
    straight, from_output = ((tmp_path / f"{name}.yaml").read_text() for name in ("straight", "from-output"))
    assert straight == from_output
    run_well("export", source, "--to", "trtllm", "--ep", 4, "--out", tmp_path / "zigzag.yaml")
    assert straight != (tmp_path / "zigzag.yaml").read_text()
    refused = run("export", tmp_path / "out", "--to", "trtllm", *arguments)
    assert refused.exit_code == 1
    assert "leave out --strategy" in refused.output


def test_analyze_makes_it_from_the_first_half_and_judges_all_by_the_second(source: Path, tmp_path: Path) -> None:
    first, second = drawn(1, 8, 2, tokens=4096), drawn(2, 8, 2, tokens=4096)
    trace = recorded(tmp_path, source, torch.cat([first, second]))
    found = json.loads(run_well("analyze", source, "--ep", 4, "--trace", trace, "--batch", 64, "--json"))
    (layer,) = found["candidates"][0]["layers"]
    names = ["linear", "zigzag", "balanced"]
    assert [candidate["strategy"] for candidate in found["candidates"]] == names
    assert found["tokens"] == 4096
    assert found["traffic"].endswith("after the first 50%, which balanced was made from")
    placed = (tuple(range(8)), zigzag_of(8, 4), as_place_does(source, first, 4))
    for candidate, placement in zip(found["candidates"], placed, strict=True):
        expected = effect(second, placement, 4, 1, (64,)).imbalance
        assert candidate["layers"][layer]["imbalance"] == pytest.approx(expected)


def test_analyze_leaves_out_what_a_trace_is_too_short_for_unless_it_was_asked_for(source: Path, tmp_path: Path) -> None:
    arguments = ("analyze", source, "--ep", 4, "--trace", recorded(tmp_path, source, drawn(1, 8, 2, tokens=4096)))
    said = run_well(*arguments)
    assert "left out: balanced: " in said
    assert "2048 tokens in its first 50%, which the placement is made from" in said
    refused = run(*arguments, "--placement", "balanced", "--placement", "linear")
    assert refused.exit_code == 1
    assert "balanced needs at least 4096" in refused.output


def test_a_model_without_expert_groups_is_not_told_that_zigzag_will_not_help(tmp_path: Path) -> None:
    build(Spec("qwen3_moe", experts=8), tmp_path / "source")
    trace = recorded(tmp_path, tmp_path / "source", *[drawn(seed, 8, 2, tokens=4096) for seed in range(9)])
    arguments = ("place", "--src", tmp_path / "source", "--ep", 4, "--out", tmp_path / "out", "--dry-run", "--strategy")
    assert "not expected to help" not in run_well(*arguments, "balanced", "--trace", trace)
    assert "not expected to help" in run_well(*arguments, "zigzag")


def test_layers_are_handed_out_one_by_one_to_whoever_shows_progress(source: Path, tmp_path: Path) -> None:
    trace = recorded(tmp_path, source, *[drawn(seed, 8, 2, tokens=4096) for seed in (1, 2, 3)])
    original, shown = read_original(source), []
    place_experts(original, Balanced(4, trace, progress=lambda names: (shown.append(name) or name for name in names)))
    assert tuple(shown) == original.shape.layers


@pytest.mark.parametrize(
    ("tokens", "ep", "nodes", "words"),
    [(4095, 4, 2, "4095 tokens recorded"), (4096, 4, 3, "4 EP ranks cannot be divided evenly")],
)
def test_what_does_not_fit_is_refused(
    tokens: int, ep: int, nodes: int, words: str, source: Path, tmp_path: Path
) -> None:
    trace = recorded(tmp_path, source, drawn(1, 8, 2, tokens=tokens))
    with pytest.raises(OutputError, match=words):
        place_experts(read_original(source), Balanced(ep, trace, nodes))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--strategy", "balanced"], "--strategy balanced needs --trace"),
        (["--strategy", "zigzag", "--trace", "trace"], "--trace does not go with --strategy zigzag"),
        (
            ["--strategy", "file", "--map", "x.json", "--nodes", 2],
            "--nodes does not go with",
        ),
    ],
)
def test_options_that_do_not_go_with_a_strategy_are_refused(options: list[object], words: str, source: Path) -> None:
    result = run("place", "--src", source, "--ep", 4, "--out", "out", *options)
    assert result.exit_code == 2
    assert words in result.output
