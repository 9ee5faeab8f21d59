"""Which copy of an expert each token goes to, where one copy does not serve the whole batch. Pure functions.

In large batches all experts are active, and the time of a rank follows its pairs of token and expert. So the tokens of
an expert are split over its copies by their position in the batch: token `t` goes to the slot in column `t % N` of the
expert's row of a table. The shares of the copies are such that all ranks get equally many pairs, if tokens choose all
experts equally often. A table with a single column gives each expert one copy, and each rank equally many experts.

A table is made in two steps:

    1. shares     each copy of an expert gets as many columns as the others. Then, expert by expert, a column moves from
                  its most loaded rank to its least loaded one, while that evens out ranks. What is left to even out
                  moves along chains of experts, from rank to rank: then no shares leave the most loaded rank with less
    2. columns    the copies of an expert take turns, in proportion to their shares

Tensors carry their shape in their name: E experts, N columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .copy_choice import copies_by_rank

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 32  # a power of two; a share is a number of columns


def split_table(physical_to_logical: Sequence[int], num_experts: int, ep_size: int, columns: int = COLUMNS) -> Tensor:
    """The slot that serves the token at each position, by expert.

    Parameters:
        physical_to_logical: [P], every logical expert at least once
        num_experts: E
        ep_size: R, a divisor of P
        columns: N; 1 for the same copy for all tokens

    Returns:
        slot_EN: int32
    """
    import torch

    copies = copies_by_rank(physical_to_logical, num_experts, ep_size)
    share = shares([list(slot_of) for slot_of in copies], ep_size, columns)
    rows = [_in_turns(slot_of, part) for slot_of, part in zip(copies, share, strict=True)]
    return torch.tensor(rows, dtype=torch.int32)


def shares(ranks_of: Sequence[Sequence[int]], ep_size: int, columns: int) -> list[dict[int, int]]:
    """How many of its columns each expert gives to each of its ranks, so that all ranks get equally many.

    Parameters:
        ranks_of: of each expert, the ranks with a copy
        ep_size: R
        columns: to give away, for each expert

    Returns:
        E dictionaries from rank to columns
    """
    load = [0] * ep_size
    given = [dict.fromkeys(ranks, columns // len(ranks)) for ranks in ranks_of]
    for part in given:
        for rank, count in part.items():
            load[rank] += count
    for part in given:
        for _ in range(columns - sum(part.values())):
            least = min(part, key=lambda rank: (load[rank], rank))
            part[least] += 1
            load[least] += 1
    movable = [part for part in given if len(part) > 1]
    moved = True
    while moved:
        moved = False
        for part in movable:
            most = max((rank for rank, count in part.items() if count), key=lambda rank: load[rank])
            least = min(part, key=lambda rank: load[rank])
            if load[most] > load[least] + 1:
                _move(part, most, least, load)
                moved = True
    while chain := _chain(movable, load):
        for part, source, target in chain:
            _move(part, source, target, load)
    return given


def _move(part: dict[int, int], source: int, target: int, load: list[int]) -> None:
    """Move a column of an expert from one rank to another."""
    part[source] -= 1
    part[target] += 1
    load[source] -= 1
    load[target] += 1


def _chain(movable: Sequence[dict[int, int]], load: Sequence[int]) -> list[tuple[dict[int, int], int, int]]:
    """The fewest moves that take a column off the most loaded rank and leave no other as loaded; [] if none do."""
    first = max(range(len(load)), key=lambda rank: load[rank])
    came: dict[int, tuple[dict[int, int], int]] = {}  # to each rank that was reached: from which, by which expert
    reached = [first]
    for rank in reached:
        for part in movable:
            for target in part if part.get(rank) else ():
                if target not in reached:
                    came[target] = part, rank
                    reached.append(target)
    ends = [rank for rank in reached if load[rank] < load[first] - 1]
    if not ends:
        return []
    chain, target = [], ends[0]
    while target != first:
        part, source = came[target]
        chain.append((part, source, target))
        target = source
    return chain[::-1]


def _in_turns(slot_of: Mapping[int, int], part: Mapping[int, int]) -> list[int]:
    """A row of slots: at each column comes the copy that lags most behind its share."""
    total = sum(part.values())
    if len(part) == 1:
        return list(slot_of.values()) * total
    used, row = dict.fromkeys(part, 0), []
    for column in range(1, total + 1):
        rank = max(part, key=lambda rank: part[rank] * column - used[rank] * total)
        used[rank] += 1
        row.append(slot_of[rank])
    return row
