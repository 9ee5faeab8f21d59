"""The time of each rank in each batch of a trace, and how it changes when two experts on two ranks swap places.

Pure functions, and the class `Loads` that keeps the loads while swaps are made. A load is a time by the time model, in
mean rank loads: 1 is the time of all experts divided by R, in a mean batch of that size. Tensors carry their shape in
their name: T tokens, K experts chosen, E experts, R EP ranks, B batches, N swaps. `rank_E` is a placement as the rank
of each logical expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .steps import Step, count_experts
from .time_model import ExpertShape, GpuProfile, expert_times, row_time

if TYPE_CHECKING:
    from torch import Tensor

MAX_BATCHES = 512  # of each size
SWAPS = 128  # computed exactly at a time
SMOOTHNESS = 0.2  # of the mean rank's load: estimates take in the ranks that are this close to the slowest


@dataclass(frozen=True)
class Aim:
    """What is to take little time: the steps in `mix`, where `gpu` computes experts like `expert`."""

    mix: tuple[Step, ...]
    expert: ExpertShape
    gpu: GpuProfile


@dataclass(frozen=True)
class Batches:
    """The load of each expert in each batch, and the weight of each batch in averages.

    Attributes:
        load_EB: in mean rank loads; the columns of one size sum to R on average
        weight_B: all batches of one size weigh together what their experts take of an evenly spread layer's time. All
            sizes weigh the same, divided by their number.
    """

    load_EB: Tensor
    weight_B: Tensor


def batches(ids_TK: Tensor, num_experts: int, ep_size: int, aim: Aim) -> Batches:
    """Cut a trace into the batches of each step of `aim.mix`.

    Parameters:
        ids_TK: [T, K], the logical experts that each token chose, tokens in their order
        num_experts: E
        ep_size: R
        aim: a trace shorter than one of its steps is one batch
    """
    import torch

    steps = dict.fromkeys(Step(step.phase, min(step.tokens, len(ids_TK))) for step in aim.mix)
    loads, weights = [], []
    for step in steps:
        time_BE = expert_times(count_experts(ids_TK, num_experts, step, MAX_BATCHES), aim.expert, aim.gpu)
        even = float(time_BE.sum(dim=1).mean()) / ep_size
        fixed = aim.gpu.kernels.launch + step.tokens * row_time(aim.expert, aim.gpu)
        loads.append((time_BE / even).T.float())
        weights.append(torch.full((len(time_BE),), even / (fixed + even) / (len(time_BE) * len(steps))))
    return Batches(torch.cat(loads, dim=1).contiguous(), torch.cat(weights))


def slowest(rank_E: Tensor, traffic: Batches, ep_size: int) -> float:
    """What `spread` minimizes: the slowest rank's load, averaged over batches; the sum of their weights is perfect."""
    return Loads(rank_E, traffic, ep_size).value


class Loads:
    """The load of each rank in each batch, under a placement that changes by swaps."""

    def __init__(self, rank_E: Tensor, traffic: Batches, ep_size: int) -> None:
        self.rank_E, self.traffic = rank_E.clone(), traffic
        load_EB = traffic.load_EB
        self.load_RB = load_EB.new_zeros(ep_size, load_EB.shape[1]).index_add_(0, rank_E, load_EB)

    @property
    def value(self) -> float:
        """The slowest rank's load, in mean rank loads, averaged over batches."""
        return float(self.load_RB.amax(dim=0) @ self.traffic.weight_B)

    def after(self, one_N: Tensor, other_N: Tensor) -> Tensor:
        """The value after each of N swaps, on its own; exact.

        Parameters:
            one_N: [N], an expert of each swap
            other_N: [N], the other expert, on another rank

        Returns:
            value_N: [N]
        """
        import torch

        load_EB, load_RB = self.traffic.load_EB, self.load_RB
        rank_N, other_rank_N = self.rank_E[one_N], self.rank_E[other_N]
        change_NB = load_EB[other_N] - load_EB[one_N]
        swapped_max_NB = torch.maximum(load_RB[rank_N] + change_NB, load_RB[other_rank_N] - change_NB)
        # a swap takes two ranks: of the three busiest, at least one takes no part, and is the busiest of the rest
        left_RB, busiest = load_RB.clone(), []
        for _ in range(3):
            busiest.append(left_RB.max(dim=0))
            left_RB.scatter_(0, busiest[-1].indices.unsqueeze(0), float("-inf"))
        rest_max_NB = busiest[2].values
        for busy in (busiest[1], busiest[0]):
            in_swap_NB = (busy.indices == rank_N.unsqueeze(1)) | (busy.indices == other_rank_N.unsqueeze(1))
            rest_max_NB = torch.where(in_swap_NB, rest_max_NB, busy.values)
        return torch.maximum(swapped_max_NB, rest_max_NB) @ self.traffic.weight_B

    def swap(self, one: int, other: int) -> None:
        """Swap two experts on two ranks."""
        change_B = self.traffic.load_EB[other] - self.traffic.load_EB[one]
        self.load_RB[self.rank_E[one]] += change_B
        self.load_RB[self.rank_E[other]] -= change_B
        self.rank_E[[one, other]] = self.rank_E[[other, one]]


def estimated_change(loads: Loads) -> Tensor:
    """Estimate, to second order, how each swap of two experts changes the slowest rank's load.

    The slope of a maximum depends on the slowest rank only, not on how close the next one is. So the estimate is for a
    smooth maximum over ranks (log-sum-exp): its slope is the softmax of the loads.

    Returns:
        change_EE: [E, E], symmetric; meaningful for experts on different ranks
    """
    import torch

    load_EB, rank_E = loads.traffic.load_EB, loads.rank_E
    share_RB = torch.softmax(loads.load_RB / SMOOTHNESS, dim=0)
    curvature_RB = share_RB * (1 - share_RB) * loads.traffic.weight_B / SMOOTHNESS
    share_RB *= loads.traffic.weight_B
    # how an expert's load on a rank changes the maximum: first and second order
    slope_ER = load_EB @ share_RB.T
    curve_ER = load_EB.square() @ curvature_RB.T / 2
    enters_EE = (slope_ER + curve_ER)[:, rank_E]
    leaves_E = (curve_ER - slope_ER).gather(1, rank_E.unsqueeze(1))
    cross_EE = (curvature_RB[rank_E] * load_EB) @ load_EB.T  # one expert leaves the rank that the other enters
    one_EE = enters_EE + leaves_E - cross_EE
    return one_EE + one_EE.T


def lowest_changes(change_EE: Tensor, rank_E: Tensor, ranks_in_node: int) -> tuple[Tensor, Tensor]:
    """The swaps with the lowest (most negative) change, SWAPS at most.

    Parameters:
        change_EE: [E, E], symmetric
        rank_E: [E]; only experts on different ranks of one node swap
        ranks_in_node: consecutive ranks in a node; R if all are one

    Returns:
        one_N, other_N: [N] each, the two experts of each swap, lowest change first
    """
    import torch

    num_experts = len(rank_E)
    node_E = rank_E // ranks_in_node
    apart_EE = ((rank_E.unsqueeze(1) != rank_E) & (node_E.unsqueeze(1) == node_E)).triu()
    number = min(SWAPS, int(apart_EE.sum()))
    flat_N = change_EE.masked_fill(~apart_EE, float("inf")).flatten().topk(number, largest=False).indices
    return torch.div(flat_N, num_experts, rounding_mode="floor"), flat_N % num_experts
