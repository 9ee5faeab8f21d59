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
from typing import TYPE_CHECKING

from .permutations import node_zigzag, rank_of_each, rank_slots, zigzag
from .swaps import BATCH_SIZES, Batches, Loads, batches, estimated_change, lowest_changes, slowest

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 1 << 16  # looked at of a longer trace
TRAVELLERS = 1 << 12  # tokens that fan-out is lowered on
WORTH = 1e-2  # ranks a token, on average: a swap that lowers fan-out by less is not made
TOLERANCE = 0.005  # of the mean rank's load: placements are equally balanced that differ by less
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


def placement_of(rank_E: Tensor) -> tuple[int, ...]:
    """physical_to_logical [E], the experts of a rank in ascending order."""
    return tuple(rank_E.argsort(stable=True).tolist())


# 3. The slowest rank


def spread(rank_E: Tensor, traffic: Batches, ep_size: int) -> Tensor:
    """Swap experts of two ranks until no swap that is tried lowers `slowest`; rank_E after that.

    All swaps are estimated at once, and the best SWAPS of them tried exactly. The best of these is made, those that
    would have helped are tried again, and so on; when none helps all are estimated anew. With no more than SWAPS in
    all, none helps at the end.
    """
    loads = Loads(rank_E, traffic, ep_size)
    value = loads.value
    while True:
        before = value
        one_N, other_N = lowest_changes(estimated_change(loads), loads.rank_E)
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


# 4. Fan-out


def gather(rank_E: Tensor, ids_TK: Tensor, traffic: Batches, ep_size: int, nodes: int, ceiling: float) -> Tensor:
    """Swap experts while tokens reach fewer nodes, or as many and fewer ranks; rank_E after that.

    Parameters:
        rank_E: where to begin
        ids_TK: the tokens whose fan-out is lowered
        traffic: its `slowest` stays at `ceiling` or below
        ep_size: R, a multiple of `nodes`
    """
    loads = Loads(rank_E, traffic, ep_size)
    levels = [_Reached(ids_TK, rank_E, ep_size, ep_size // nodes)] if nodes > 1 else []
    levels.append(_Reached(ids_TK, rank_E, ep_size, 1))
    least = len(ids_TK) * WORTH
    while True:
        change_EE = levels[-1].change()
        if nodes > 1:  # one node outweighs all ranks that a token can reach
            change_EE += ids_TK.shape[1] * levels[0].change()
        change_EE.masked_fill_(estimated_change(loads) > ceiling - loads.value, 0)
        one_N, other_N = lowest_changes(change_EE, loads.rank_E)
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
    import torch

    load_E = ids_TK.flatten().bincount(minlength=num_experts).tolist()
    dealt, filled = zigzag(num_experts, ep_size), packed(load_E, ep_size)
    by_node = [node_zigzag(num_experts, ep_size, nodes)] if nodes > 1 and num_experts % ep_size == 0 else []
    simple = [
        torch.tensor(rank_of_each(made, ep_size)) for made in (tuple(range(num_experts)), *by_node, dealt, filled)
    ]
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
