"""A placement for the traffic of one MoE layer: the slowest rank first, then how far tokens travel. Pure functions.

The slowest rank of a batch is the one with the most (token, expert) pairs, and all others wait for it. EPLB packs
experts by how often they are used; in a batch it also matters which of them are used at the same time, and a trace
tells. In the order of the code:

    1. packed    experts by falling load, each to the least loaded rank with room: DeepSeek's EPLB without replicas
    2. batches   the trace cut into batches of 64, 512 and 4096 consecutive tokens
    3. spread    swap experts of two ranks while that lowers the slowest rank's load, on average over batches
    4. gather    swap on while tokens reach fewer nodes and ranks, and the slowest rank's load stays as it is
    5. balanced  judge zigzag and others, 1, 3 and 4 on tokens that they were not made from, and do what is best

Tensors carry their shape in their name: T tokens, K experts chosen, E experts, R EP ranks, B batches, U ranks or nodes,
N swaps. `rank_E` is a placement as the rank of each logical expert; a node has consecutive ranks. Shuffles are seeded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .permutations import node_zigzag, rank_slots, zigzag

if TYPE_CHECKING:
    from torch import Tensor

BATCH_SIZES = (64, 512, 4096)
TOKENS = 1 << 16  # looked at of a longer trace
TRAVELLERS = 1 << 12  # tokens that fan-out is lowered on
WORTH = 1e-2  # ranks a token, on average: a swap that lowers fan-out by less is not made
TOLERANCE = 0.005  # of the mean rank's load: placements are equally balanced that differ by less
SWAPS = 128  # tried exactly at a time
SMOOTHNESS = 0.2  # of the mean rank's load: ranks this close to the slowest count too when swaps are estimated
STARTS = 256  # of searches, over the number of experts
ROUNDING = 1e-5


# 1. Packing


def packed(load_E: Sequence[float], ep_size: int) -> tuple[int, ...]:
    """DeepSeek's EPLB without replicas: the most loaded expert first, each to the least loaded rank with room.

    Parameters:
        load_E: how often each logical expert is used
        ep_size: R

    Returns:
        physical_to_logical: [E]
    """
    room = [len(slots) for slots in rank_slots(len(load_E), ep_size)]
    load, held = [0.0] * ep_size, [list[int]() for _ in range(ep_size)]
    for expert in sorted(range(len(load_E)), key=lambda expert: -load_E[expert]):
        rank = min((rank for rank in range(ep_size) if len(held[rank]) < room[rank]), key=lambda rank: load[rank])
        held[rank].append(expert)
        load[rank] += load_E[expert]
    return tuple(expert for experts in held for expert in sorted(experts))


def ranks_of(physical_to_logical: Sequence[int], ep_size: int) -> Tensor:
    """The rank of each logical expert, rank_E."""
    import torch

    rank_E = torch.empty(len(physical_to_logical), dtype=torch.long)
    for rank, slots in enumerate(rank_slots(len(physical_to_logical), ep_size)):
        rank_E[list(physical_to_logical[slots.start : slots.stop])] = rank
    return rank_E


def placement_of(rank_E: Tensor) -> tuple[int, ...]:
    """physical_to_logical [E], the experts of a rank in ascending order."""
    return tuple(rank_E.argsort(stable=True).tolist())


# 2. Batches


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
    return _Loads(rank_E, traffic, ep_size).value


class _Loads:
    """The load of ranks under a placement that changes by swaps."""

    def __init__(self, rank_E: Tensor, traffic: Batches, ep_size: int) -> None:
        self.rank_E, self.traffic = rank_E.clone(), traffic
        load_EB = traffic.load_EB
        self.load_RB = load_EB.new_zeros(ep_size, load_EB.shape[1]).index_add_(0, rank_E, load_EB)

    @property
    def value(self) -> float:
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
        more_B = self.traffic.load_EB[other] - self.traffic.load_EB[one]
        self.load_RB[self.rank_E[one]] += more_B
        self.load_RB[self.rank_E[other]] -= more_B
        self.rank_E[[one, other]] = self.rank_E[[other, one]]


# 3. The slowest rank


def spread(rank_E: Tensor, traffic: Batches, ep_size: int) -> Tensor:
    """Swap experts of two ranks until no swap that is tried lowers `slowest`; rank_E after that.

    All swaps are estimated at once, and the best SWAPS of them tried exactly. The best of these is made, those that
    would have helped are tried again, and so on; when none helps all are estimated anew. With no more than SWAPS in
    all, none helps at the end.
    """
    loads = _Loads(rank_E, traffic, ep_size)
    value = loads.value
    while True:
        before = value
        one_N, other_N = _lowest(_estimated_change(loads), loads.rank_E)
        while len(one_N):
            value_N = loads.after(one_N, other_N)
            helps_N = value_N < value - ROUNDING
            if not helps_N.any():
                break
            best = int(value_N.argmin())
            value = float(value_N[best])
            loads.swap(int(one_N[best]), int(other_N[best]))
            helps_N &= loads.rank_E[one_N] != loads.rank_E[other_N]
            one_N, other_N = one_N[helps_N], other_N[helps_N]
        if value == before:
            return loads.rank_E


def search(starts: Sequence[Tensor], traffic: Batches, ep_size: int) -> Tensor:
    """The best that `spread` comes to from STARTS // E starts: those given, then the first of them shuffled.

    With hundreds of experts one end is as good as another, on tokens that were not searched on too. With few it may be
    far from the best there is, and a start costs little.
    """
    import torch

    experts = len(starts[0])
    number = max(1, STARTS // experts)
    shuffles = (torch.randperm(experts, generator=torch.Generator().manual_seed(seed)) for seed in range(number))
    tried = [*starts, *(starts[0][shuffle] for shuffle in shuffles)][:number]
    ends = [spread(rank_E, traffic, ep_size) for rank_E in tried]
    return min(ends, key=lambda rank_E: slowest(rank_E, traffic, ep_size))


def _estimated_change(loads: _Loads) -> Tensor:
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


def _lowest(change_EE: Tensor, rank_E: Tensor) -> tuple[Tensor, Tensor]:
    """The swaps of experts of two ranks with the lowest (most negative) change, each once."""
    import torch

    experts = len(rank_E)
    apart_EE = (rank_E.unsqueeze(1) != rank_E).triu()
    number = min(SWAPS, int(apart_EE.sum()))
    flat_N = change_EE.masked_fill(~apart_EE, float("inf")).flatten().topk(number, largest=False).indices
    return torch.div(flat_N, experts, rounding_mode="floor"), flat_N % experts


# 4. Fan-out


def gather(rank_E: Tensor, ids_TK: Tensor, traffic: Batches, ep_size: int, nodes: int, ceiling: float) -> Tensor:
    """Swap experts while tokens reach fewer nodes, or as many and fewer ranks; rank_E after that.

    Parameters:
        rank_E: where to begin
        ids_TK: the tokens whose fan-out is lowered
        traffic: its `slowest` stays at `ceiling` or below
        ep_size: R, a multiple of `nodes`
    """
    loads = _Loads(rank_E, traffic, ep_size)
    levels = [_Reached(ids_TK, rank_E, ep_size, ep_size // nodes)] if nodes > 1 else []
    levels.append(_Reached(ids_TK, rank_E, ep_size, 1))
    least = len(ids_TK) * WORTH
    while True:
        change_EE = levels[-1].change()
        if nodes > 1:  # one node outweighs all ranks that a token can reach
            change_EE += ids_TK.shape[1] * levels[0].change()
        change_EE.masked_fill_(_estimated_change(loads) > ceiling - loads.value, 0)
        one_N, other_N = _lowest(change_EE, loads.rank_E)
        allowed_N = (change_EE[one_N, other_N] <= -least) & (loads.after(one_N, other_N) <= ceiling + ROUNDING)
        if not allowed_N.any():
            return loads.rank_E
        best = int(allowed_N.nonzero()[0])
        one, other = int(one_N[best]), int(other_N[best])
        loads.swap(one, other)
        for level in levels:
            level.swap(one, other)


class _Reached:
    """On how many units (ranks, or nodes) tokens' experts lie, and what swaps change about it."""

    def __init__(self, ids_TK: Tensor, rank_E: Tensor, ep_size: int, ranks_in_unit: int) -> None:
        import torch

        self.unit_E, self.units = rank_E // ranks_in_unit, ep_size // ranks_in_unit
        self.chosen_TE = torch.zeros(len(ids_TK), len(rank_E)).scatter_(1, ids_TK, 1.0)
        self.alone_EE, self.absent_EU = self._count(self.chosen_TE)

    def _count(self, chosen_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of one expert and another of which the one is alone on its unit; tokens of an expert not on a unit."""
        import torch

        held_TU = torch.zeros(len(chosen_TE), self.units).index_add_(1, self.unit_E, chosen_TE)
        alone_TE = chosen_TE * (held_TU[:, self.unit_E] == 1)
        return alone_TE.T @ chosen_TE, chosen_TE.T @ (held_TU == 0).float()

    def change(self) -> Tensor:
        """How many units more tokens would reach in all, after each swap of two experts, [E, E]; exact."""
        # a token with both experts goes where it went: their swap neither leaves a unit nor enters one
        one_EE = self.absent_EU[:, self.unit_E] - self.alone_EE.diagonal().unsqueeze(1) + self.alone_EE
        return (one_EE + one_EE.T).masked_fill(self.unit_E.unsqueeze(1) == self.unit_E, 0)

    def swap(self, one: int, other: int) -> None:
        """Swap two experts; only their tokens count anew."""
        touched_TE = self.chosen_TE[self.chosen_TE[:, [one, other]].any(dim=1)]
        alone_EE, absent_EU = self._count(touched_TE)
        self.unit_E[[one, other]] = self.unit_E[[other, one]]
        alone_after_EE, absent_after_EU = self._count(touched_TE)
        self.alone_EE += alone_after_EE - alone_EE
        self.absent_EU += absent_after_EU - absent_EU


# 5. All of it


def balanced(ids_TK: Tensor, num_experts: int, ep_size: int, nodes: int = 1) -> tuple[int, ...]:
    """The placement of one layer under which the slowest rank of a batch is expected to have the least to do.

    A placement that was searched for fits the tokens of the search better than others. So it has to win where it was
    not made from. Of every other stretch of the trace five placements are made, and judged on the stretches between:
    linear, zigzag (with nodes, node-zigzag too), EPLB's packing, and what the search finds without and with `gather`.
    A trace shorter than half of TOKENS is judged the other way round as well. Good is what comes within TOLERANCE of
    the best and is no worse than any of the simple ones; of the good, that is done on the whole trace which sends
    tokens to the fewest nodes, then ranks. On other tokens of the same source it is thus expected to be no worse than
    the simple ones, as far as the trace is like them: a short one, or one of few texts, tells less.

    Parameters:
        ids_TK: logical experts that each token chose, in the order of the tokens; at least 16 tokens, and of more than
            TOKENS stretches that are spread evenly
        num_experts: E
        ep_size: R; need not divide E
        nodes: M, a divisor of R

    Returns:
        physical_to_logical: [E], each rank's experts in ascending order
    """
    ids_TK = _sample(ids_TK.long(), TOKENS, BATCH_SIZES[-1])
    values = _unseen(ids_TK, num_experts, ep_size, nodes)
    limit = min(min(values) + TOLERANCE, *values[:-2]) + ROUNDING
    ways = _ways(ids_TK, num_experts, ep_size, nodes)
    good = [rank_E for rank_E, value in zip(ways, values, strict=True) if value <= limit]
    return placement_of(min(good, key=lambda rank_E: _reach(rank_E, ids_TK, ep_size, nodes)))


def balanced_layers(
    layers: Sequence[Tensor], num_experts: int, ep_size: int, nodes: int = 1
) -> Iterator[tuple[int, ...]]:
    """`balanced` for each layer's ids_TK, in their order: a thread a processor, and a layer on one of them."""
    import torch

    pool = ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(lambda ids_TK: balanced(ids_TK, num_experts, ep_size, nodes), layers)
    finally:
        pool.shutdown(cancel_futures=True)


def _ways(ids_TK: Tensor, num_experts: int, ep_size: int, nodes: int) -> list[Tensor]:
    """What can be done with a trace, as rank_E: the simple ones first; then a search, without and with `gather`."""
    load_E = ids_TK.flatten().bincount(minlength=num_experts).tolist()
    dealt, filled = zigzag(num_experts, ep_size), packed(load_E, ep_size)
    by_node = [node_zigzag(num_experts, ep_size, nodes)] if nodes > 1 and num_experts % ep_size == 0 else []
    simple = [ranks_of(made, ep_size) for made in (tuple(range(num_experts)), *by_node, dealt, filled)]
    traffic = batches(ids_TK, num_experts, ep_size)
    found = search((simple[-1], simple[-2]), traffic, ep_size)
    ceiling = slowest(found, traffic, ep_size) + TOLERANCE
    near = gather(found, _sample(ids_TK, TRAVELLERS, BATCH_SIZES[0]), traffic, ep_size, nodes, ceiling)
    return [*simple, found, near]


def _unseen(ids_TK: Tensor, num_experts: int, ep_size: int, nodes: int) -> list[float]:
    """`slowest` of each of the ways on stretches of the trace, made from those between."""
    one_TK, other_TK = _alternate(ids_TK)
    sides = [(one_TK, other_TK), (other_TK, one_TK)]
    judged = []
    for made_from_TK, judged_on_TK in sides if 2 * len(ids_TK) <= TOKENS else sides[:1]:
        traffic = batches(judged_on_TK, num_experts, ep_size)
        ways = _ways(made_from_TK, num_experts, ep_size, nodes)
        judged.append([slowest(rank_E, traffic, ep_size) for rank_E in ways])
    return [sum(values) / len(values) for values in zip(*judged, strict=True)]


def _reach(rank_E: Tensor, ids_TK: Tensor, ep_size: int, nodes: int) -> tuple[int, int]:
    """How many nodes, and how many ranks, tokens are sent to, all tokens together."""

    def units(ranks_in_unit: int) -> int:
        unit_TK = (rank_E[ids_TK] // ranks_in_unit).sort(dim=1).values
        return len(ids_TK) + int((unit_TK.diff(dim=1) > 0).sum())

    return units(ep_size // nodes), units(1)


def _sample(ids_TK: Tensor, tokens: int, length: int) -> Tensor:
    """Of a longer trace stretches of that length, evenly spread, `tokens` in all."""
    if len(ids_TK) <= tokens:
        return ids_TK
    there, wanted = len(ids_TK) // length, tokens // length
    taken = [number * there // wanted for number in range(wanted)]
    return ids_TK[: there * length].reshape(there, length, -1)[taken].flatten(0, 1)


def _alternate(ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Every other stretch of a trace, and those between."""
    length = min(BATCH_SIZES[-1], len(ids_TK) // 8)
    there = len(ids_TK) // length
    stretches = ids_TK[: there * length].reshape(there, length, -1)
    return stretches[::2].flatten(0, 1), stretches[1::2].flatten(0, 1)
