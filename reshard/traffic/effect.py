"""What a placement does to traffic: how uneven ranks are loaded, and how far tokens travel. Pure functions.

Tensors carry their shape in their name: T tokens, K experts chosen, E experts, R EP ranks, B batches, G runs of
consecutive experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..placement.permutations import rank_of_each

if TYPE_CHECKING:
    from torch import Tensor

# Tokens looked at together: bounds what is held beside the traffic itself, at any number of ranks and experts.
_CHUNK = 1 << 13


@dataclass(frozen=True, slots=True)
class Effect:
    """What one layer's placement does to its traffic.

    `imbalance` is, for each batch size, the busiest rank's (token, expert) pairs over the mean, on average over
    batches: the critical path over perfect balance, as far as time follows pairs. `ranks` and `nodes` are how many of
    them a token's experts lie on, on average: to how many all-to-all has to send it. `loads` [R] are each rank's pairs
    over the mean, all tokens together: 1 is an even share.
    """

    imbalance: tuple[float, ...]
    ranks: float
    nodes: float
    loads: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Coselection:
    """Which experts one token chooses together, by runs of consecutive experts.

    `share` [G, G] says for each two runs which part of all pairs of a token's experts lies in them; `expected` [G, G]
    what that part would be if tokens chose each expert as often as they do, but independently of the others. Both add
    up to 1, and to 0 where a token chooses one expert only. share / expected, unlike share, does not say which experts
    are popular, but which are wanted together: above 1, one rank that has them is loaded by the same tokens, and
    several that have them make these tokens travel.
    """

    share: tuple[tuple[float, ...], ...]
    expected: tuple[tuple[float, ...], ...]


def effect(
    ids_TK: Tensor, physical_to_logical: Sequence[int], ep_size: int, nodes: int, batch_sizes: Sequence[int]
) -> Effect:
    """Measure a placement on the logical experts `ids_TK` that tokens chose.

    Parameters:
        ids_TK: int64; batches are consecutive tokens, and what is left of the last is left out
        physical_to_logical: [E]
        ep_size: R
        nodes: a divisor of R; a node has consecutive ranks
        batch_sizes: each at most T

    """
    import torch

    rank_TK = torch.tensor(rank_of_each(physical_to_logical, ep_size))[ids_TK]
    tokens, top_k = rank_TK.shape
    imbalance = []
    for size in batch_sizes:
        busiest = sum(float(pairs_BR.amax(dim=1).sum()) for pairs_BR in _pairs(rank_TK, size, ep_size))
        imbalance.append(busiest / (tokens // size) * ep_size / (size * top_k))
    pairs_R = torch.zeros(ep_size, dtype=torch.long)
    ranks_reached = nodes_reached = 0
    for pairs_TR in _pairs(rank_TK, 1, ep_size):
        pairs_R += pairs_TR.sum(dim=0)
        ranks_reached += int((pairs_TR > 0).sum())
        nodes_reached += int((pairs_TR.view(len(pairs_TR), nodes, -1).sum(dim=2) > 0).sum())
    loads_R = pairs_R.double() * ep_size / (tokens * top_k)
    return Effect(tuple(imbalance), ranks_reached / tokens, nodes_reached / tokens, tuple(loads_R.tolist()))


def mean_effect(effects: Sequence[Effect]) -> Effect:
    """The mean over layers; its `loads` are those of each layer's busiest rank, of the next, down to the idlest.

    Layers wait for their busiest rank one after the other: one layer's busy rank is no help to another's.
    """
    count = len(effects)
    return Effect(
        _mean_of_each([found.imbalance for found in effects]),
        sum(found.ranks for found in effects) / count,
        sum(found.nodes for found in effects) / count,
        _mean_of_each([sorted(found.loads, reverse=True) for found in effects]),
    )


def coselection(ids_TK: Tensor, num_experts: int, ranges: int) -> Coselection:
    """How often the same token chose experts of any two of `ranges` ranges of consecutive experts.

    Parameters:
        ids_TK: int64, the K experts of a token all different
        num_experts: E
        ranges: G, as even as E allows

    """
    import torch

    range_E = torch.tensor(rank_of_each(range(num_experts), ranges))
    pairs_GG = torch.zeros(ranges, ranges, dtype=torch.double)
    for pairs_TG in _pairs(range_E[ids_TK], 1, ranges):
        counts_TG = pairs_TG.double()
        pairs_GG += counts_TG.T @ counts_TG - counts_TG.sum(dim=0).diag()  # without an expert and itself
    popularity_E = torch.bincount(ids_TK.flatten(), minlength=num_experts).double()
    popularity_G = torch.zeros(ranges, dtype=torch.double).index_add_(0, range_E, popularity_E)
    itself_G = torch.zeros(ranges, dtype=torch.double).index_add_(0, range_E, popularity_E.square())
    expected_GG = torch.outer(popularity_G, popularity_G) - itself_G.diag()
    if not float(pairs_GG.sum()):
        expected_GG.zero_()
    return Coselection(_rows(pairs_GG), _rows(expected_GG))


def mean_coselection(found: Sequence[Coselection]) -> Coselection:
    """The mean over layers."""
    return Coselection(
        tuple(_mean_of_each(rows) for rows in zip(*(layer.share for layer in found), strict=True)),
        tuple(_mean_of_each(rows) for rows in zip(*(layer.expected for layer in found), strict=True)),
    )


def _pairs(owner_TK: Tensor, size: int, owners: int) -> Iterator[Tensor]:
    """How many of each whole batch's (token, expert) pairs each owner has: [B, owners], some batches at a time."""
    import torch

    tokens, top_k = owner_TK.shape
    at_once = max(1, _CHUNK // size) * size
    whole = tokens // size * size
    for first in range(0, whole, at_once):
        some_TK = owner_TK[first : min(first + at_once, whole)]
        batches = len(some_TK) // size
        offset_B1 = torch.arange(batches).unsqueeze(1) * owners
        flat = (some_TK.reshape(batches, size * top_k) + offset_B1).flatten()
        yield torch.bincount(flat, minlength=batches * owners).view(batches, owners)


def _rows(matrix_GG: Tensor) -> tuple[tuple[float, ...], ...]:
    """The matrix as shares of its sum, 0 where that is 0."""
    total = float(matrix_GG.sum())
    return tuple(tuple(value / total if total else 0.0 for value in row) for row in matrix_GG.tolist())


def _mean_of_each(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(sum(values) / len(rows) for values in zip(*rows, strict=True))
