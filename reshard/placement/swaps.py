"""The load of ranks in batches of a trace, and how it changes when two experts on two ranks swap. Pure functions.

Tensors carry their shape in their name: T tokens, K experts chosen, E experts, R EP ranks, B batches, N swaps. `rank_E`
is a placement as the rank of each logical expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BATCH_SIZES = (64, 512, 4096)
SWAPS = 128  # tried exactly at a time
SMOOTHNESS = 0.2  # of the mean rank's load: ranks this close to the slowest count too when swaps are estimated


@dataclass(frozen=True)
class Batches:
    """What each expert has to do in each batch, in parts of the mean rank's load, and what each batch counts for.

    Batch sizes count alike, and so do batches of one size: `weight_B` sums to 1.
    """

    load_EB: Tensor
    weight_B: Tensor


def batches(ids_TK: Tensor, num_experts: int, ep_size: int, sizes: Sequence[int] = BATCH_SIZES) -> Batches:
    """Cut a trace into batches of consecutive tokens, of each size; where it is shorter, it is one batch."""
    import torch

    tokens, top_k = ids_TK.shape
    sizes = sorted({min(size, tokens) for size in sizes})
    loads, weights = [], []
    for size in sizes:
        number = tokens // size
        batch_BK = ids_TK[: number * size].reshape(number, size * top_k)
        slot_BK = batch_BK + num_experts * torch.arange(number).unsqueeze(1)
        count_BE = slot_BK.flatten().bincount(minlength=number * num_experts).view(number, num_experts)
        loads.append(count_BE.T.float() * ep_size / (size * top_k))
        weights.append(torch.full((number,), 1 / (number * len(sizes))))
    return Batches(torch.cat(loads, dim=1).contiguous(), torch.cat(weights))


def slowest(rank_E: Tensor, traffic: Batches, ep_size: int) -> float:
    """What `spread` minimizes: the slowest rank's load over the mean rank's, on average over batches."""
    return Loads(rank_E, traffic, ep_size).value


class Loads:
    """The load of ranks under a placement that changes by swaps."""

    def __init__(self, rank_E: Tensor, traffic: Batches, ep_size: int) -> None:
        self.rank_E, self.traffic = rank_E.clone(), traffic
        load_EB = traffic.load_EB
        self.load_RB = load_EB.new_zeros(ep_size, load_EB.shape[1]).index_add_(0, rank_E, load_EB)

    @property
    def value(self) -> float:
        """The slowest rank's load over the mean rank's, on average over batches."""
        return float(self.load_RB.amax(dim=0) @ self.traffic.weight_B)

    def after(self, one_N: Tensor, other_N: Tensor) -> Tensor:
        """The value after each of N swaps of two experts on two ranks, [N]."""
        import torch

        load_EB, load_RB = self.traffic.load_EB, self.load_RB
        rank_N, other_rank_N = self.rank_E[one_N], self.rank_E[other_N]
        more_NB = load_EB[other_N] - load_EB[one_N]
        most_NB = torch.maximum(load_RB[rank_N] + more_NB, load_RB[other_rank_N] - more_NB)
        # of the three busiest ranks at least one takes no part in a swap
        left_RB, busiest = load_RB.clone(), []
        for _ in range(3):
            busiest.append(left_RB.max(dim=0))
            left_RB.scatter_(0, busiest[-1].indices.unsqueeze(0), float("-inf"))
        rest_NB = busiest[2].values
        for busy in (busiest[1], busiest[0]):
            swapped_NB = (busy.indices == rank_N.unsqueeze(1)) | (busy.indices == other_rank_N.unsqueeze(1))
            rest_NB = torch.where(swapped_NB, rest_NB, busy.values)
        return torch.maximum(most_NB, rest_NB) @ self.traffic.weight_B

    def swap(self, one: int, other: int) -> None:
        """Swap two experts on two ranks."""
        more_B = self.traffic.load_EB[other] - self.traffic.load_EB[one]
        self.load_RB[self.rank_E[one]] += more_B
        self.load_RB[self.rank_E[other]] -= more_B
        self.rank_E[[one, other]] = self.rank_E[[other, one]]


def estimated_change(loads: Loads) -> Tensor:
    """By how much each swap of two experts changes the slowest rank's load, [E, E], to second order.

    The slope of a maximum knows of one rank only, and not how soon the next takes over: a softened one is estimated.
    """
    import torch

    load_EB, rank_E = loads.traffic.load_EB, loads.rank_E
    share_RB = torch.softmax(loads.load_RB / SMOOTHNESS, dim=0)
    bend_RB = share_RB * (1 - share_RB) * loads.traffic.weight_B / SMOOTHNESS
    share_RB *= loads.traffic.weight_B
    # what an expert's load adds to a rank, to first and second order
    slope_ER = load_EB @ share_RB.T
    curve_ER = load_EB.square() @ bend_RB.T / 2
    enters_EE = (slope_ER + curve_ER)[:, rank_E]
    leaves_E = (curve_ER - slope_ER).gather(1, rank_E.unsqueeze(1))
    crossed_EE = (bend_RB[rank_E] * load_EB) @ load_EB.T
    one_EE = enters_EE + leaves_E - crossed_EE
    return one_EE + one_EE.T


def lowest_changes(change_EE: Tensor, rank_E: Tensor) -> tuple[Tensor, Tensor]:
    """The swaps of experts of two ranks with the lowest (most negative) change, each once."""
    import torch

    experts = len(rank_E)
    apart_EE = (rank_E.unsqueeze(1) != rank_E).triu()
    number = min(SWAPS, int(apart_EE.sum()))
    flat_N = change_EE.masked_fill(~apart_EE, float("inf")).flatten().topk(number, largest=False).indices
    return torch.div(flat_N, experts, rounding_mode="floor"), flat_N % experts
