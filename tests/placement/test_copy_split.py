"""Splitting the tokens of an expert over its copies: each goes to a copy, and ranks are as even as copies allow."""

from __future__ import annotations

import random
from collections import Counter

import networkx
import pytest
from copies_oracle import least, random_copies

from reshard.placement.copy_split import COLUMNS, split_table

SHAPES = [(256, 8, 8, 2), (256, 8, 8, 4), (256, 8, 2, 2), (16, 4, 2, 3), (16, 2, 6, 2), (160, 16, 4, 3), (64, 4, 0, 1)]


def busiest(physical_to_logical: list[int], experts: int, ranks: int, columns: int) -> int:
    """The fewest columns that the busiest rank can have, by maximum flow."""
    slots, most = len(physical_to_logical) // ranks, -(-experts * columns // ranks)
    graph = networkx.DiGraph()
    for expert in range(experts):
        graph.add_edge("source", expert, capacity=columns)
    for slot, expert in enumerate(physical_to_logical):
        graph.add_edge(expert, f"rank {slot // slots}")
    while True:
        for rank in range(ranks):
            graph.add_edge(f"rank {rank}", "sink", capacity=most)
        if networkx.maximum_flow_value(graph, "source", "sink") == experts * columns:
            return most
        most += 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ranks_get_as_many_pairs_as_each_other_as_far_as_copies_allow(shape: tuple[int, int, int, int]) -> None:
    experts, ranks, spare, most = shape
    for seed in range(3):
        placement = random_copies(random.Random(seed), experts, ranks, spare, most)
        table = split_table(placement, experts, ranks).tolist()
        assert [len(row) for row in table] == [COLUMNS] * experts
        assert all(placement[slot] == expert for expert, row in enumerate(table) for slot in row)
        loads = Counter(slot // (len(placement) // ranks) for row in table for slot in row)
        assert max(loads.values()) == busiest(placement, experts, ranks, COLUMNS)
        one = [row for (row,) in split_table(placement, experts, ranks, columns=1).tolist()]
        assert [placement[slot] for slot in one] == list(range(experts))
        served = Counter(slot // (len(placement) // ranks) for slot in one)
        assert max(served.values()) == least([1] * experts, placement, ranks)


def test_the_control_the_first_copy_of_each_expert_leaves_ranks_uneven() -> None:
    placement = random_copies(random.Random(0), 256, 8, 8, 2)
    loads = Counter(placement.index(expert) // 40 for expert in range(256))
    assert max(loads.values()) > 36 > 32 == least([1] * 256, placement, 8)


def test_the_copies_of_an_expert_take_turns() -> None:
    """So that any stretch of tokens is split in the same way."""
    row = split_table([0, 1, 0, 2], 3, 2)[0].tolist()
    assert row == [0, 2] * (COLUMNS // 2)
    uneven = split_table([0, 1, 2, 3, 0, 4, 5, 5], 6, 2)[0].tolist()
    assert uneven.count(4) > uneven.count(0)
    for start in range(0, COLUMNS, 8):
        part = uneven[start : start + 8]
        assert abs(part.count(0) - uneven.count(0) * 8 / COLUMNS) <= 1
