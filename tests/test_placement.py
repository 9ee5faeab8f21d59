"""Placements as pure functions, against the words of the design spelled out by brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.placement import invert, is_permutation, rank_slots, zigzag

sizes = st.integers(2, 64).flatmap(lambda experts: st.tuples(st.just(experts), st.integers(1, experts)))


@given(sizes)
def test_slot_j_of_rank_r_holds_expert_r_plus_j_times_ranks(size: tuple[int, int]) -> None:
    experts, ranks = size
    physical_to_logical = zigzag(experts, ranks)
    for rank, slots in enumerate(rank_slots(experts, ranks)):
        assert [physical_to_logical[slot] for slot in slots] == [e for e in range(experts) if e % ranks == rank]


@given(sizes)
def test_ranks_own_consecutive_slots_the_first_of_them_one_more(size: tuple[int, int]) -> None:
    experts, ranks = size
    slots = rank_slots(experts, ranks)
    assert [slot for owned in slots for slot in owned] == list(range(experts))
    assert [len(owned) for owned in slots] == [experts // ranks + (rank < experts % ranks) for rank in range(ranks)]


@given(st.permutations(range(20)))
def test_inverting_twice_changes_nothing(permutation: list[int]) -> None:
    inverse = invert(permutation)
    assert [inverse[value] for value in permutation] == list(range(20))
    assert invert(inverse) == tuple(permutation)


@pytest.mark.parametrize("values", [[0, 0], [1, 2], [0, 2], [-1, 0]])
def test_what_misses_or_repeats_an_expert_is_no_permutation(values: list[int]) -> None:
    assert is_permutation([2, 0, 1])
    assert not is_permutation(values)
