"""Placements as pure functions, against the words of the design spelled out by brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.placement.permutations import invert, is_permutation, node_zigzag, rank_slots, zigzag

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


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6))
def test_node_zigzag_leaves_groups_on_their_node_and_deals_them_out_there(
    nodes: int, ranks_of_node: int, experts_of_rank: int
) -> None:
    ranks, experts = nodes * ranks_of_node, nodes * ranks_of_node * experts_of_rank
    physical_to_logical = node_zigzag(experts, ranks, nodes)
    assert is_permutation(physical_to_logical)
    of_node = experts // nodes
    for rank, slots in enumerate(rank_slots(experts, ranks)):
        node, within = divmod(rank, ranks_of_node)
        expected = [e for e in range(experts) if e // of_node == node and e % of_node % ranks_of_node == within]
        assert [physical_to_logical[slot] for slot in slots] == expected


def test_node_zigzag_of_one_node_is_zigzag() -> None:
    assert node_zigzag(12, 4, 1) == zigzag(12, 4)
    assert node_zigzag(16, 4, 2) == (0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)


@given(st.permutations(range(20)))
def test_inverting_twice_changes_nothing(permutation: list[int]) -> None:
    inverse = invert(permutation)
    assert [inverse[value] for value in permutation] == list(range(20))
    assert invert(inverse) == tuple(permutation)


@pytest.mark.parametrize("values", [[0, 0], [1, 2], [0, 2], [-1, 0]])
def test_what_misses_or_repeats_an_expert_is_no_permutation(values: list[int]) -> None:
    assert is_permutation([2, 0, 1])
    assert not is_permutation(values)
