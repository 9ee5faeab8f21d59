"""Choosing copies: every expert is served once, by its own slot, and close to the optimum that a flow solver finds."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from copies_oracle import batches, busiest, least, random_placement
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from reshard.placement.copies import with_copies
from reshard.placement.copy_choice import (
    BY_ACTIVE,
    BY_PAIRS,
    BY_TIME,
    LARGE_BATCH,
    MAX_ROUNDS,
    SMALL_BATCH,
    choose_copies,
    fixed_slots,
    schedule,
    serving_slots,
)

LEARNED = load_file(Path(__file__).parents[1] / "data" / "routing.safetensors")
EXPERTS = 64


def test_an_expert_goes_to_the_less_loaded_of_its_ranks() -> None:
    placement = [0, 1, 2, 4, 3, 4]  # rank 0: experts 0, 1, 2; rank 1: experts 4, 3, 4 again
    prepared = schedule([0, 1, 4, 2, 3, 4], 5, 2)
    for active, slot_of_4 in (([1, 1, 0, 0, 1], 5), ([0, 0, 1, 1, 1], 2), ([1, 0, 1, 1, 1], 2)):
        chosen_E = choose_copies(torch.tensor([active]), prepared)[0].tolist()
        assert chosen_E == [0, 1, 3, 4, slot_of_4]
    assert schedule(placement, 5, 2).round_E.tolist() == [-1] * 5  # copies on one rank are no choice


def test_experts_of_one_round_share_no_rank_and_every_copy_has_its_turn() -> None:
    placement = random_placement(0, 64, 8, 4)
    prepared = schedule(placement, 64, 8)
    for turn, (expert_R, next_R) in enumerate(zip(prepared.expert_GR.tolist(), prepared.next_GR.tolist(), strict=True)):
        for rank, expert in enumerate(expert_R):
            here = [at for at, other in enumerate(expert_R) if expert >= 0 and other == expert]
            slots = [slot for slot in prepared.slot_EC[expert].tolist() if slot >= 0]
            assert expert < 0 or (prepared.round_E[expert] == turn and here == sorted(slot // 12 for slot in slots))
            seen, at = [], rank
            while at not in seen:
                seen.append(at)
                at = next_R[at]
            assert sorted(seen) == (here or [rank])
    scheduled = [expert for expert in range(64) if prepared.round_E[expert] >= 0]
    assert scheduled == [expert for expert in range(64) if placement.count(expert) > 1]
    assert sorted(prepared.fixed_RF[prepared.fixed_RF >= 0].tolist() + scheduled) == list(range(64))


cases = st.tuples(st.integers(0, 10**6), st.sampled_from([(8, 2, 2), (12, 4, 3), (16, 3, 1), (24, 6, 5), (64, 8, 8)]))


@settings(max_examples=25, deadline=None)
@given(cases)
def test_every_expert_is_served_by_one_of_its_own_slots(case: tuple[int, tuple[int, int, int]]) -> None:
    seed, (experts, ranks, spare) = case
    placement = random_placement(seed, experts - experts % ranks, ranks, spare, most=ranks)
    experts -= experts % ranks
    weight_BE = torch.randint(0, 3, (16, experts), generator=torch.Generator().manual_seed(seed))
    prepared = schedule(placement, experts, ranks)
    slot_BE = choose_copies(weight_BE, prepared)
    assert torch.equal(torch.tensor(placement)[slot_BE], torch.arange(experts).expand(16, -1))
    assert torch.equal(slot_BE, choose_copies(weight_BE, prepared))
    active_BE = (weight_BE > 0).long()
    loads = busiest(choose_copies(active_BE, prepared), active_BE, placement, ranks)
    for load, active in zip(loads, active_BE.tolist(), strict=True):
        assert load >= least(active, placement, ranks)


def test_small_batches_even_out_active_experts_and_large_ones_time() -> None:
    """Rank 0 has experts 0, 1 and 4, rank 1 has 2, 3 and 4; expert 4 goes where there is less of what counts."""
    prepared = schedule([0, 1, 4, 2, 3, 4], 5, 2)
    on_0, on_1 = 2, 5
    tiled = torch.tensor([[1, 1, 900, 0, 5]])  # active: 2 against 1; tiles: 2 against 15
    filled = torch.tensor([[30, 30, 64, 0, 5]])  # the same; tiles: 2 against 1, tokens: 60 against 64
    small, large = SMALL_BATCH, LARGE_BATCH + 1
    assert [serving_slots(tiled, prepared, tokens)[0, 4] for tokens in (small, large)] == [on_1, on_0]
    assert [serving_slots(filled, prepared, tokens)[0, 4] for tokens in (small, large)] == [on_1, on_1]
    assert choose_copies(BY_PAIRS.of(filled), prepared)[0, 4] == on_0


def test_ranks_that_route_their_own_tokens_choose_in_large_batches_only_and_by_pairs() -> None:
    """In small ones their copies must be the same. Rank 0 has experts 0, 1 and 4, rank 1 has 2, 3 and 4."""
    prepared = schedule([0, 1, 4, 2, 3, 4], 5, 2)
    on_0, on_1 = 2, 5
    fixed = int(fixed_slots(prepared)[4])
    counts = [[9, 9, 0, 0, 5], [0, 0, 9, 9, 5]]
    for tokens in (1, SMALL_BATCH, SMALL_BATCH + 1, LARGE_BATCH):
        slot_BE = serving_slots(torch.tensor(counts), prepared, tokens, same_tokens=False)
        assert slot_BE[:, 4].tolist() == [fixed, fixed]
    assert serving_slots(torch.tensor(counts), prepared, SMALL_BATCH)[:, 4].tolist() == [on_1, on_0], "a control"
    filled = torch.tensor([[30, 30, 64, 0, 5]])  # tiles: 2 against 1, pairs: 60 against 64
    assert serving_slots(filled, prepared, LARGE_BATCH + 1, same_tokens=False)[0, 4] == on_0
    assert serving_slots(filled, prepared, LARGE_BATCH + 1)[0, 4] == on_1


@pytest.mark.parametrize("seed", range(8))
def test_for_one_token_and_in_between_each_expert_has_a_fixed_copy_and_ranks_equally_many(seed: int) -> None:
    experts, ranks, spare = 256, 8, 8
    placement = random_placement(seed, experts, ranks, spare, most=2)
    prepared = schedule(placement, experts, ranks)
    count_BE = torch.randint(0, 50, (8, experts), generator=torch.Generator().manual_seed(seed))
    for tokens in (1, SMALL_BATCH + 1, LARGE_BATCH):
        slot_BE = serving_slots(count_BE, prepared, tokens)
        assert all(torch.equal(slot_E, fixed_slots(prepared)) for slot_E in slot_BE)
        assert (slot_BE[0] // (len(placement) // ranks)).bincount().tolist() == [experts // ranks] * ranks
    for tokens in (2, SMALL_BATCH, LARGE_BATCH + 1):
        assert not torch.equal(serving_slots(count_BE, prepared, tokens)[0], fixed_slots(prepared)), "a control"


@pytest.mark.parametrize(("count", "time", "pairs"), [(0, 0, 0), (1, 8, 1), (64, 8, 64), (65, 13, 65), (192, 18, 192)])
def test_what_an_expert_adds_to_its_rank(count: int, time: int, pairs: int) -> None:
    count_E = torch.tensor([count])
    assert [weight.of(count_E).item() for weight in (BY_ACTIVE, BY_TIME, BY_PAIRS)] == [count > 0, time, pairs]


def test_experts_beyond_the_last_round_keep_their_first_slot() -> None:
    experts = 2 * (MAX_ROUNDS + 9)
    order = list(range(experts))
    prepared = schedule(order + order, experts, 2)  # both ranks have every expert
    assert len(prepared.expert_GR) == MAX_ROUNDS
    assert int((prepared.round_E < 0).sum()) == experts - MAX_ROUNDS
    weight_BE = torch.ones(1, experts, dtype=torch.long)
    slot_BE = choose_copies(weight_BE, prepared)
    assert slot_BE[0, prepared.round_E < 0].tolist() == [e for e in order if prepared.round_E[e] < 0]


@pytest.mark.parametrize("least_active", [False, True])
def test_the_flow_solver_finds_what_trying_every_choice_finds(least_active: bool) -> None:
    """A control of the oracle."""
    for seed in range(20):
        placement = random_placement(seed, 8, 4, 1)
        draw = random.Random(seed)
        active = [int(draw.random() < (0.4 if least_active else 0.9)) for _ in range(8)]
        ranks_of = [[slot // 3 for slot, e in enumerate(placement) if e == expert and active[e]] for expert in range(8)]
        every = itertools.product(*[ranks for ranks in ranks_of if ranks])
        best = min(max(map(choice.count, range(4))) for choice in every)
        assert least(active, placement, 4) == best


def test_the_choice_is_close_to_the_optimum_on_learned_routing() -> None:
    ids_TK = LEARNED["python"][0]
    placement = with_copies(ids_TK, EXPERTS, 8, 4, sizes=(8, 16))
    prepared = schedule(placement, EXPERTS, 8)
    active_BE = torch.cat([batches(ids_TK, size, 40, EXPERTS) for size in (8, 16, 32)])
    first_slots = torch.tensor([placement.index(expert) for expert in range(EXPERTS)]).expand_as(active_BE)
    chosen, one_sweep, without_choice = (
        busiest(slot_BE, active_BE, placement, 8)
        for slot_BE in (choose_copies(active_BE, prepared), choose_copies(active_BE, prepared, 1), first_slots)
    )
    optimum = [least(active, placement, 8) for active in active_BE.tolist()]
    assert {load - best for load, best in zip(chosen, optimum, strict=True)} <= {0, 1}
    assert sum(chosen) <= 1.02 * sum(optimum)
    assert sum(chosen) < sum(one_sweep) < 0.95 * sum(without_choice)
