"""What a placement does to traffic: how uneven ranks are loaded, and how far tokens travel. Pure functions.

Tensors carry their shape in their name: T tokens, K experts chosen, E experts, R EP ranks, B batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .placement import rank_slots

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Effect:
    """What one layer's placement does to its traffic.

    `imbalance` is, for each batch size, the busiest rank's (token, expert) pairs over the mean, on average over
    batches: the critical path over perfect balance, as far as time follows pairs. `ranks` and `nodes` are how many of
    them a token's experts lie on, on average: to how many all-to-all has to send it.
    """

    imbalance: tuple[float, ...]
    ranks: float
    nodes: float


def effect(
    ids_TK: Tensor, physical_to_logical: Sequence[int], ep_size: int, nodes: int, batch_sizes: Sequence[int]
) -> Effect:
    """Measure a placement on the logical experts `ids_TK` that tokens chose.

    Parameters:
        ids_TK: int64; batches are consecutive tokens
        physical_to_logical: [E]
        ep_size: R
        nodes: a divisor of R; a node has consecutive ranks
        batch_sizes: each at most T

    """
    import torch

    num_experts, tokens = len(physical_to_logical), len(ids_TK)
    rank_E = torch.empty(num_experts, dtype=torch.long)
    for rank, slots in enumerate(rank_slots(num_experts, ep_size)):
        rank_E[list(physical_to_logical[slots.start : slots.stop])] = rank
    rank_TK = rank_E[ids_TK]
    pairs_TR = torch.nn.functional.one_hot(rank_TK, ep_size).sum(dim=1)
    imbalance = []
    for size in batch_sizes:
        batches = tokens // size
        pairs_BR = pairs_TR[: batches * size].view(batches, size, ep_size).sum(dim=1).double()
        imbalance.append(float((pairs_BR.amax(dim=1) / pairs_BR.mean(dim=1)).mean()))
    reached_TR = pairs_TR > 0
    reached_by_node = reached_TR.view(tokens, nodes, ep_size // nodes).any(dim=2)
    ranks, nodes_reached = (reached.sum(dim=1).double().mean() for reached in (reached_TR, reached_by_node))
    return Effect(tuple(imbalance), float(ranks), float(nodes_reached))


def mean_effect(effects: Sequence[Effect]) -> Effect:
    """The mean over layers."""
    count = len(effects)
    return Effect(
        tuple(sum(values) / count for values in zip(*(found.imbalance for found in effects), strict=True)),
        sum(found.ranks for found in effects) / count,
        sum(found.nodes for found in effects) / count,
    )
