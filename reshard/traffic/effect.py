"""What a placement does to traffic: how evenly it loads the ranks, and how many ranks and nodes a token reaches.

Pure functions. Tensors carry their shape in their name: T tokens, K experts chosen, E experts, R EP ranks, B batches,
G ranges of consecutive experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import OutputError
from ..placement.copy_choice import Schedule, schedule, serving_slots
from ..placement.permutations import rank_of_each

if TYPE_CHECKING:
    from torch import Tensor

# Tokens processed at once: bounds the memory used beside the traffic, whatever the number of ranks and experts.
_CHUNK = 1 << 13
_MAX_CHOICES = 1 << 10  # batches of each size that choose copies


@dataclass(frozen=True, slots=True)
class Effect:
    """What one layer's placement does to its traffic.

    With copies, each batch chooses which of them serve it, and `imbalance` is of these choices. The other figures are
    of the choice for all tokens as one batch.

    `imbalance` has a value for each batch size: the busiest rank's (token, expert) pairs over the mean, averaged over
    batches. If time follows pairs, this is the layer's time over its time in perfect balance. `ranks` and `nodes` say
    how many of them hold a token's experts, on average: all-to-all sends the token to that many. `loads` [R] has each
    rank's pairs over the mean, for all tokens together: 1 is an even share.
    """

    imbalance: tuple[float, ...]
    ranks: float
    nodes: float
    loads: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Coselection:
    """Which experts a token chooses together, by ranges of consecutive experts.

    A pair is two experts that the same token chose. `share` [G, G] is the fraction of all pairs that lies in each two
    ranges. `expected` [G, G] is what this fraction would be if every expert were chosen as often as it is, but
    independently of the others. Each matrix sums to 1, or to 0 if tokens choose one expert only.

    `share` depends on how popular experts are. share / expected does not: above 1, tokens choose experts of the two
    ranges together. If one rank holds both ranges, the same tokens load it twice; if several ranks hold them, these
    tokens travel to all of them.
    """

    share: tuple[tuple[float, ...], ...]
    expected: tuple[tuple[float, ...], ...]


def effect(
    ids_TK: Tensor, physical_to_logical: Sequence[int], ep_size: int, nodes: int, batch_sizes: Sequence[int]
) -> Effect:
    """Measure a placement on the logical experts `ids_TK` that tokens chose.

    Parameters:
        ids_TK: int64; batches are consecutive tokens, and an incomplete last batch is left out
        physical_to_logical: [E], or more slots if experts have copies
        ep_size: R
        nodes: a divisor of R; each node holds consecutive ranks
        batch_sizes: each at most T

    Raises OutputError if there are fewer tokens than in a batch.

    """
    import torch

    if len(ids_TK) < max(batch_sizes, default=0):
        raise OutputError(f"{len(ids_TK)} tokens are too few for a batch of {max(batch_sizes)}; choose a smaller batch")

    num_experts, slots, prepared = max(physical_to_logical) + 1, len(physical_to_logical) // ep_size, None
    if len(physical_to_logical) > num_experts:
        prepared = schedule(physical_to_logical, num_experts, ep_size)
        rank_TK = _chosen(ids_TK, prepared, slots, len(ids_TK))
    else:
        rank_TK = torch.tensor(rank_of_each(physical_to_logical, ep_size))[ids_TK]
    tokens, top_k = rank_TK.shape
    imbalance = []
    for size in batch_sizes:
        chosen_TK = rank_TK if prepared is None else _chosen(ids_TK, prepared, slots, size)
        busiest = sum(float(pairs_BR.amax(dim=1).sum()) for pairs_BR in _pairs(chosen_TK, size, ep_size))
        imbalance.append(busiest / (len(chosen_TK) // size) * ep_size / (size * top_k))
    pairs_R = torch.zeros(ep_size, dtype=torch.long)
    ranks_reached = nodes_reached = 0
    for pairs_TR in _pairs(rank_TK, 1, ep_size):
        pairs_R += pairs_TR.sum(dim=0)
        ranks_reached += int((pairs_TR > 0).sum())
        nodes_reached += int((pairs_TR.view(len(pairs_TR), nodes, -1).sum(dim=2) > 0).sum())
    loads_R = pairs_R.double() * ep_size / (tokens * top_k)
    return Effect(tuple(imbalance), ranks_reached / tokens, nodes_reached / tokens, tuple(loads_R.tolist()))


def _chosen(ids_TK: Tensor, prepared: Schedule, slots: int, size: int) -> Tensor:
    """The rank that computes each pair, rank_TK, if each batch of `size` consecutive tokens chooses copies.

    A rank has `slots` slots. Of more than _MAX_CHOICES batches, takes so many, spread evenly.
    """
    import torch

    number = len(ids_TK) // size
    ids_BN = ids_TK[: number * size].reshape(number, -1)
    if number > _MAX_CHOICES:
        ids_BN = ids_BN[[turn * number // _MAX_CHOICES for turn in range(_MAX_CHOICES)]]
    count_BE = torch.zeros(len(ids_BN), len(prepared.round_E), dtype=torch.long)
    count_BE.scatter_add_(1, ids_BN, torch.ones_like(ids_BN))
    rank_BE = torch.div(serving_slots(count_BE, prepared, size), slots, rounding_mode="floor")
    return rank_BE.gather(1, ids_BN).view(len(ids_BN) * size, -1)


def mean_effect(effects: Sequence[Effect]) -> Effect:
    """The mean over layers. `loads` averages the load of each layer's busiest rank, of its next busiest, and so on.

    Each layer waits for its own busiest rank, so a rank's high load in one layer does not make up for its low load in
    another.
    """
    count = len(effects)
    return Effect(
        _mean_of_each([found.imbalance for found in effects]),
        sum(found.ranks for found in effects) / count,
        sum(found.nodes for found in effects) / count,
        _mean_of_each([sorted(found.loads, reverse=True) for found in effects]),
    )


def coselection(ids_TK: Tensor, num_experts: int, ranges: int) -> Coselection:
    """Count how often a token chose experts of both of two ranges, for every two of `ranges` ranges.

    Parameters:
        ids_TK: int64; the K experts of a token are all different
        num_experts: E
        ranges: G, the number of ranges of consecutive experts, as equal as E allows

    """
    import torch

    range_E = torch.tensor(rank_of_each(range(num_experts), ranges))
    pairs_GG = torch.zeros(ranges, ranges, dtype=torch.double)
    for pairs_TG in _pairs(range_E[ids_TK], 1, ranges):
        counts_TG = pairs_TG.double()
        pairs_GG += counts_TG.T @ counts_TG - counts_TG.sum(dim=0).diag()  # less each expert with itself
    popularity_E = torch.bincount(ids_TK.flatten(), minlength=num_experts).double()
    popularity_G = torch.zeros(ranges, dtype=torch.double).index_add_(0, range_E, popularity_E)
    with_itself_G = torch.zeros(ranges, dtype=torch.double).index_add_(0, range_E, popularity_E.square())
    expected_GG = torch.outer(popularity_G, popularity_G) - with_itself_G.diag()
    if not float(pairs_GG.sum()):
        expected_GG.zero_()
    return Coselection(_shares(pairs_GG), _shares(expected_GG))


def mean_coselection(found: Sequence[Coselection]) -> Coselection:
    """The mean over layers."""
    return Coselection(
        tuple(_mean_of_each(rows) for rows in zip(*(layer.share for layer in found), strict=True)),
        tuple(_mean_of_each(rows) for rows in zip(*(layer.expected for layer in found), strict=True)),
    )


def _pairs(owner_TK: Tensor, size: int, owners: int) -> Iterator[Tensor]:
    """Count each owner's (token, expert) pairs in each whole batch: yields [B, owners], some batches at a time."""
    import torch

    tokens, top_k = owner_TK.shape
    chunk = max(1, _CHUNK // size) * size
    whole = tokens // size * size
    for first in range(0, whole, chunk):
        chunk_TK = owner_TK[first : min(first + chunk, whole)]
        batches = len(chunk_TK) // size
        offset_B1 = torch.arange(batches).unsqueeze(1) * owners
        flat = (chunk_TK.reshape(batches, size * top_k) + offset_B1).flatten()
        yield torch.bincount(flat, minlength=batches * owners).view(batches, owners)


def _shares(matrix_GG: Tensor) -> tuple[tuple[float, ...], ...]:
    """The matrix divided by its sum; all zeros if the sum is 0."""
    total = float(matrix_GG.sum())
    return tuple(tuple(value / total if total else 0.0 for value in row) for row in matrix_GG.tolist())


def _mean_of_each(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(sum(values) / len(rows) for values in zip(*rows, strict=True))
