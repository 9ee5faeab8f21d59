"""Placing copies: every placement of few experts, other ways to choose what is copied, and held-out learned routing."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from copies import eplb
from copies_oracle import batches, busiest, least
from safetensors.torch import load_file
from torch import Tensor

from reshard.errors import OutputError
from reshard.placement.copies import active, first, placement_of, sampled, searched, with_copies
from reshard.placement.copy_choice import choose_copies, schedule
from reshard.placement.permutations import zigzag
from reshard.placement.spare import copies_fault, evenly_copied
from reshard.placement.time_model import ExpertShape, expert_times, read_gpu

LEARNED = load_file(Path(__file__).parents[1] / "data" / "routing.safetensors")
EXPERTS, RANKS, SPARE = 64, 8, 4
SIZES = (4, 16)


def halves(layer: int) -> tuple[Tensor, Tensor]:
    """The first half of the learned choices of a layer, to place by, and the second, to judge on."""
    ids_TK = LEARNED["python"][layer].long()
    return ids_TK[: len(ids_TK) // 2], ids_TK[len(ids_TK) // 2 :]


@cache
def placed(layer: int) -> tuple[int, ...]:
    return with_copies(halves(layer)[0], EXPERTS, RANKS, SPARE, sizes=SIZES)


def optimum(placement: Sequence[int], layer: int, ranks: int = RANKS) -> float:
    """The busiest rank's active experts in held-out batches after the best choice, by the flow solver; mean."""
    active_BE = torch.cat([batches(halves(layer)[1], size, 40, EXPERTS) for size in SIZES])
    return sum(least(active, placement, ranks) for active in active_BE.tolist()) / len(active_BE)


def top_experts_everywhere(load_E: Sequence[float], ranks: int, spare: int) -> tuple[int, ...]:
    """Zigzag, and the most used experts on every rank; the last free slots get the next ones."""
    hottest = sorted(range(len(load_E)), key=lambda expert: -load_E[expert])
    held = [[expert for expert in range(len(load_E)) if expert % ranks == rank] for rank in range(ranks)]
    for of_rank in held:
        of_rank += [expert for expert in hottest if expert not in of_rank][:spare]
    return tuple(expert for of_rank in held for expert in of_rank)


@pytest.mark.parametrize("layer", [0, 1])
def test_on_held_out_batches_nothing_else_leaves_the_busiest_rank_less(layer: int) -> None:
    load_E = halves(layer)[0].flatten().bincount(minlength=EXPERTS).tolist()
    found = optimum(placed(layer), layer)
    assert found < optimum(eplb(load_E, RANKS, RANKS * SPARE), layer)
    assert found < 0.95 * optimum(top_experts_everywhere(load_E, RANKS, SPARE), layer)
    assert found < 0.9 * optimum(zigzag(EXPERTS, RANKS), layer)


def test_the_copies_that_eplb_makes_are_the_published_ones() -> None:
    """A control of the rival: the example in EPLB's readme, one layer of 12 experts, 4 copies, on 8 GPUs."""
    load = [90.0, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]
    found = eplb(load, 8, 4)
    assert sorted(found) == sorted([*range(12), 5, 10, 1, 4])


# Every placement there is


def all_placements(experts: int, ranks: int, slots: int) -> Iterator[tuple[int, ...]]:
    """Every way to fill the ranks' slots so that no expert is missing, but for the order of ranks."""
    each = list(itertools.combinations(range(experts), slots))
    for held in itertools.combinations_with_replacement(each, ranks):
        if len(set(itertools.chain(*held))) == experts:
            yield tuple(itertools.chain(*held))


def best_choices(placement: Sequence[int], active_BE: Tensor, experts: int, ranks: int) -> Tensor:
    """The busiest rank's active experts in each batch after the best of all choices."""
    slots = len(placement) // ranks
    ranks_of = [[slot // slots for slot, other in enumerate(placement) if other == expert] for expert in range(experts)]
    choice_CE = torch.tensor(list(itertools.product(*ranks_of)))
    load_BCR = torch.einsum("be,cer->bcr", active_BE, torch.nn.functional.one_hot(choice_CE, ranks).float())
    return load_BCR.amax(dim=2).amin(dim=1)


def test_the_search_ends_close_to_the_best_of_all_placements() -> None:
    ratios, starts = [], []
    for seed, (experts, ranks, spare) in itertools.product(range(4), [(6, 2, 1), (6, 3, 1), (6, 3, 2)]):
        liking = torch.randn(experts, generator=torch.Generator().manual_seed(seed))
        chance = torch.rand(512, experts, generator=torch.Generator().manual_seed(seed))
        ids_TK = (liking - chance.log().neg().log()).topk(2, dim=1).indices
        sample = sampled(ids_TK, experts, ranks, (2, 3))
        active_BE, number_B = (sample.weight_BE > 0).float().unique(dim=0, return_counts=True)
        start_ER = first(sample.weight_BE.sum(dim=0), ranks, spare)

        every = [*all_placements(experts, ranks, experts // ranks + spare)]
        every += [placement_of(searched(start_ER, sample)), placement_of(start_ER)]
        values = [float(best_choices(placement, active_BE, experts, ranks) @ number_B.float()) for placement in every]
        ratios.append(values[-2] / min(values))
        starts.append(values[-1] / min(values))
    assert max(ratios) < 1.02
    assert max(starts) > 1.02  # a control: the start alone is further away


def test_by_time_too_the_search_ends_close_to_the_best_of_all_placements() -> None:
    """An expert with many tokens takes several tiles; a large share of what ranks do does not depend on experts."""
    expert, gpu = ExpertShape(hidden=7168, intermediate=2048, top_k=2, size=44_050_944, dtype="fp8"), read_gpu("H200")
    ratios, starts = [], []
    for seed, (experts, ranks, spare) in itertools.product(range(3), [(6, 2, 1), (6, 3, 1), (6, 3, 2)]):
        liking = torch.randn(experts, generator=torch.Generator().manual_seed(seed))
        chance = torch.rand(512, experts, generator=torch.Generator().manual_seed(seed))
        ids_TK = (liking - chance.log().neg().log()).topk(2, dim=1).indices
        sample = sampled(
            ids_TK, experts, ranks, (2, 256), lambda count: expert_times(count, expert, gpu), lambda _: 1e-4
        )
        start_ER = first(sample.weight_BE.sum(dim=0), ranks, spare)
        found = placement_of(searched(start_ER, sample))
        values = [
            float(best_choices(placement, sample.weight_BE, experts, ranks) @ sample.share_B)
            for placement in [*all_placements(experts, ranks, experts // ranks + spare), placement_of(start_ER), found]
        ]
        starts.append(values[-2] / min(values))
        ratios.append(values[-1] / min(values))
    assert max(ratios) < 1.06, "the search takes experts for divisible, and six are few"
    assert sum(ratios) < 1.01 * len(ratios)
    assert sum(starts) > sum(ratios) + 0.04, f"a control: the start alone is further away: {ratios} {starts}"


def test_a_batch_size_counts_by_the_part_of_its_time_that_its_experts_take() -> None:
    """Two sizes by hand: a unit of work for each active expert, and a fixed part that outweighs the small one's."""
    ids_TK = torch.tensor([[0, 1], [2, 3]] * 64)
    even = sampled(ids_TK, 4, 2, (1, 64))
    small, large = 8192 // 1, 8192 // 64
    mean_B = even.weight_BE.sum(dim=1) / 2
    assert float(even.share_B @ mean_B) == pytest.approx(1)
    assert float(even.share_B[:small] @ mean_B[:small]) == pytest.approx(0.5), "all sizes count alike"
    fixed = sampled(ids_TK, 4, 2, (1, 64), fixed=lambda tokens: 9.0 if tokens == 1 else 2.0)
    parts = 1 / (1 + 9), 2 / (2 + 2)  # a rank has one active expert of two, or two of four
    assert float(fixed.share_B[:small] @ mean_B[:small]) == pytest.approx(parts[0] / sum(parts), rel=0.01)
    assert len(fixed.share_B) == small + large


@pytest.mark.parametrize(
    ("experts", "ranks", "spare"), [(256, 8, 8), (256, 8, 2), (64, 8, 4), (60, 6, 0), (12, 3, 8), (8, 2, 3)]
)
def test_evenly_spread_copies_take_as_many_experts_of_each_rank(experts: int, ranks: int, spare: int) -> None:
    placement = evenly_copied(experts, ranks, spare)
    assert copies_fault(placement, experts, ranks, spare) is None
    slots = experts // ranks + spare
    zigzag_slots = [expert for expert in range(experts) if expert in placement[(expert % ranks) * slots :][:slots]]
    assert zigzag_slots == list(range(experts))
    number = [placement.count(expert) for expert in range(experts)]
    of_rank = [sum(number[rank::ranks]) for rank in range(ranks)]
    assert max(of_rank) == min(of_rank) == slots
    assert max(number) - min(number) <= 1


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        ([0, 1, 2, 2, 3], "expected 6 slots, found 5"),
        ([0, 1, 2, 2, 1, 0], "expected each of the experts 0 to 3"),
        ([0, 1, 1, 2, 3, 0], r"no expert twice on a rank, found \[0, 1, 1\] on rank 0"),
    ],
)
def test_what_is_no_placement_with_copies_is_found(placement: list[int], words: str) -> None:
    assert copies_fault([0, 1, 2, 2, 3, 0], 4, 2, 1) is None
    assert re.search(words, copies_fault(placement, 4, 2, 1) or "")


# What a placement is


@pytest.mark.parametrize(("experts", "ranks", "spare"), [(64, 8, 4), (64, 16, 2), (60, 6, 0), (12, 3, 8), (8, 8, 3)])
def test_each_rank_has_its_slots_and_none_an_expert_twice(experts: int, ranks: int, spare: int) -> None:
    ids_TK = torch.rand(512, experts, generator=torch.Generator().manual_seed(0)).topk(4, dim=1).indices
    placement = with_copies(ids_TK, experts, ranks, spare, sizes=(4,))
    slots = experts // ranks + spare
    held = [placement[rank * slots : (rank + 1) * slots] for rank in range(ranks)]
    assert len(placement) == experts + ranks * spare
    assert all(list(of_rank) == sorted(set(of_rank)) for of_rank in held)
    assert set(placement) == set(range(experts))
    assert placement == with_copies(ids_TK, experts, ranks, spare, sizes=(4,))


def test_the_search_helps_with_more_ranks_than_sets_can_be_listed_for() -> None:
    ids_TK = halves(0)[0]
    sample = sampled(ids_TK, EXPERTS, 16, SIZES)
    start_ER = first(sample.weight_BE.sum(dim=0), 16, 2)
    found = placement_of(searched(start_ER, sample))
    assert optimum(found, 0, 16) < 0.99 * optimum(placement_of(start_ER), 0, 16)


def test_a_weight_for_pairs_copies_other_experts_than_one_for_active_experts() -> None:
    """Half of all pairs go to expert 0, and experts are active alike: only by pairs is expert 0 worth two copies."""
    generator = torch.Generator().manual_seed(0)
    others_TK = 1 + torch.rand(4096, 15, generator=generator).topk(3, dim=1).indices
    ids_TK = torch.where(torch.rand(4096, 3, generator=generator) < 0.5, 0, others_TK)
    by_pairs = with_copies(ids_TK, 16, 4, 1, sizes=(64,), weigh=lambda count_BE: count_BE)
    by_active = with_copies(ids_TK, 16, 4, 1, sizes=(64,), weigh=active)
    assert by_pairs != by_active


@pytest.mark.parametrize(("ranks", "spare"), [(3, 1), (4, 13), (4, -1)])
def test_what_cannot_be_placed_is_an_error_that_says_why(ranks: int, spare: int) -> None:
    with pytest.raises(OutputError, match="spare slots on each of"):
        with_copies(torch.zeros(8, 2, dtype=torch.long), 16, ranks, spare)


def test_chosen_copies_leave_the_busiest_rank_less_than_stock_eplb_does() -> None:
    """EPLB's map picks a copy by a token's position, so more copies are active."""
    ids_TK = halves(0)[1]
    placement = placed(0)
    slots = [[slot for slot, expert in enumerate(placement) if expert == e] for e in range(EXPERTS)]
    prepared = schedule(placement, EXPERTS, RANKS)
    chosen, by_position = 0, 0
    for start in range(0, 1600, 16):
        batch = ids_TK[start : start + 16]
        used = {slots[e][2654435769 * t % 2**32 % len(slots[e])] for t, row in enumerate(batch.tolist()) for e in row}
        by_position += max(sum(slot // 12 == rank for slot in used) for rank in range(RANKS))
        active_BE = torch.zeros(1, EXPERTS, dtype=torch.long).scatter_(1, batch.reshape(1, -1), 1)
        chosen += busiest(choose_copies(active_BE, prepared), active_BE, placement, RANKS)[0]
    assert chosen < 0.8 * by_position
