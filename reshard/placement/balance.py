"""Places the experts of one MoE layer for recorded traffic: the slowest rank first, then fan-out. Pure functions.

All ranks wait for the slowest one of a batch. What a rank takes is the sum over its experts, by the time model: in
small batches its active experts count, in large ones its tokens. EPLB packs experts by how often they are used. In a
batch it also matters which experts are used together, and a trace shows that. The steps, in the order of the code:

    1. packed    DeepSeek's EPLB without replicas: experts by falling load, each to the least loaded rank with room
    2. batches   cut the trace into the batches of the steps that are to take little time (in `swaps`)
    3. spread    swap experts of two ranks while that lowers the slowest rank's load, averaged over batches
    4. gather    swap while tokens reach fewer nodes and ranks, and the slowest rank's load stays below a ceiling
    5. balanced  judge the simple placements and those of 3 and 4 on tokens that they were not made from; take the best

A load is a time in units of the mean rank's.

Tensors carry their shape in their name: T tokens, K experts chosen, E experts, R EP ranks, B batches, U units (ranks or
nodes), N swaps. `rank_E` is a placement as the rank of each logical expert. A node has consecutive ranks. Random
numbers are seeded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from .permutations import node_zigzag, rank_of_each, rank_slots, zigzag
from .swaps import Aim, Batches, Loads, batches, estimated_change, lowest_changes, slowest

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 1 << 16  # a longer trace is sampled down to this many
STRETCH = 1 << 12  # tokens in a row that sampling and judging keep together
FAN_OUT_TOKENS = 1 << 12  # `gather` lowers the fan-out of this many tokens
FAN_OUT_STRETCH = 64
WORTH = 1e-2  # ranks per token, on average: `gather` makes no swap that gains less
TOLERANCE = 0.001  # of an evenly spread layer's time, or of the nodes reached: placements so close are equally good
STARTS = 256  # `search` starts STARTS // E times
ROUNDING = 1e-5  # of the mean rank's load: a smaller difference may be float32 rounding


# 1. Packing


def packed(load_E: Sequence[float], ep_size: int) -> tuple[int, ...]:
    """DeepSeek's EPLB without replicas: the most loaded expert first, each to the least loaded rank with room.

    Parameters:
        load_E: [E], how often each logical expert is used
        ep_size: R, EP ranks; need not divide E

    Returns:
        physical_to_logical: [E]
    """
    room = [len(slots) for slots in rank_slots(len(load_E), ep_size)]
    load, experts = [0.0] * ep_size, [list[int]() for _ in range(ep_size)]
    for expert in sorted(range(len(load_E)), key=lambda expert: -load_E[expert]):
        rank = min((rank for rank in range(ep_size) if len(experts[rank]) < room[rank]), key=lambda rank: load[rank])
        experts[rank].append(expert)
        load[rank] += load_E[expert]
    return tuple(expert for of_rank in experts for expert in sorted(of_rank))


def placement_of(rank_E: Tensor) -> tuple[int, ...]:
    """physical_to_logical [E] of `rank_E`; each rank's experts are in ascending order."""
    return tuple(rank_E.argsort(stable=True).tolist())


# 3. The slowest rank


def spread(rank_E: Tensor, traffic: Batches, ep_size: int, nodes: int = 1) -> Tensor:
    """Swap experts of two ranks of a node until no swap that is tried lowers `slowest`.

        1. Estimate the change of every swap at once; keep the SWAPS best.
        2. Compute those exactly, make the best one, and drop those that would not have helped.
        3. Repeat 2 with the rest until none helps; then begin again at 1.
        4. Stop when 1 finds no swap that helps. If there are at most SWAPS swaps in all, then no swap helps.

    Parameters:
        rank_E: [E], where to start
        traffic: the batches to balance
        ep_size: R, a multiple of `nodes`
        nodes: M; each keeps its experts

    Returns:
        rank_E: [E]
    """
    loads = Loads(rank_E, traffic, ep_size)
    value = loads.value
    while True:
        before = value
        one_N, other_N = lowest_changes(estimated_change(loads), loads.rank_E, ep_size // nodes)
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
    """Run `spread` from STARTS // E starts, at least one, and take the best result.

    With hundreds of experts all starts end equally well, also on tokens that the search did not see. With few experts a
    search may end far from the best placement, and another start is cheap.

    Parameters:
        starts: [E] each, rank_E to start from; after these come shuffles of the first
        traffic: the batches to balance
        ep_size: R

    Returns:
        rank_E: [E]
    """
    import torch

    num_experts = len(starts[0])
    number = max(1, STARTS // num_experts)
    shuffles = (torch.randperm(num_experts, generator=torch.Generator().manual_seed(seed)) for seed in range(number))
    all_starts = [*starts, *(starts[0][shuffle] for shuffle in shuffles)][:number]
    found = [spread(rank_E, traffic, ep_size) for rank_E in all_starts]
    return min(found, key=lambda rank_E: slowest(rank_E, traffic, ep_size))


# 4. Fan-out


def gather(rank_E: Tensor, ids_TK: Tensor, traffic: Batches, ep_size: int, nodes: int, ceiling: float) -> Tensor:
    """Swap experts while that lowers fan-out: tokens reach fewer nodes, or as many nodes and fewer ranks.

    Each step makes the best swap that keeps `slowest` at or below `ceiling` and gains at least WORTH ranks per token.

    Parameters:
        rank_E: [E], where to start
        ids_TK: [T, K], the tokens whose fan-out to lower
        traffic: the batches on which `slowest` is computed
        ep_size: R, a multiple of `nodes`
        nodes: M
        ceiling: as `slowest`

    Returns:
        rank_E: [E]
    """
    loads = Loads(rank_E, traffic, ep_size)
    levels = [_FanOut(ids_TK, rank_E, ep_size, ep_size // nodes)] if nodes > 1 else []
    levels.append(_FanOut(ids_TK, rank_E, ep_size, 1))
    min_gain = len(ids_TK) * WORTH
    while True:
        change_EE = levels[-1].change()
        if nodes > 1:  # one node outweighs all the ranks that a token can reach, K at most
            change_EE += ids_TK.shape[1] * levels[0].change()
        change_EE.masked_fill_(estimated_change(loads) > ceiling - loads.value, 0)
        one_N, other_N = lowest_changes(change_EE, loads.rank_E, ep_size)
        allowed_N = (change_EE[one_N, other_N] <= -min_gain) & (loads.after(one_N, other_N) <= ceiling + ROUNDING)
        if not allowed_N.any():
            return loads.rank_E
        best = int(allowed_N.nonzero()[0])
        one, other = int(one_N[best]), int(other_N[best])
        loads.swap(one, other)
        for level in levels:
            level.swap(one, other)


class _FanOut:
    """How many units (ranks or nodes) the tokens reach in all, and how each swap of two experts changes that.

    Attributes:
        unit_E: the unit of each expert
        chosen_TE: 1 if the token chose the expert
        alone_EE: [e, f], tokens that chose e and f, and e as the only expert on its unit; f may be e
        absent_EU: [e, u], tokens that chose e and no expert on unit u
    """

    def __init__(self, ids_TK: Tensor, rank_E: Tensor, ep_size: int, ranks_in_unit: int) -> None:
        import torch

        self.unit_E, self.units = rank_E // ranks_in_unit, ep_size // ranks_in_unit
        self.chosen_TE = torch.zeros(len(ids_TK), len(rank_E)).scatter_(1, ids_TK, 1.0)
        self.alone_EE, self.absent_EU = self._count(self.chosen_TE)

    def _count(self, chosen_TE: Tensor) -> tuple[Tensor, Tensor]:
        """alone_EE and absent_EU of the given tokens."""
        import torch

        count_TU = torch.zeros(len(chosen_TE), self.units).index_add_(1, self.unit_E, chosen_TE)
        alone_TE = chosen_TE * (count_TU[:, self.unit_E] == 1)
        return alone_TE.T @ chosen_TE, chosen_TE.T @ (count_TU == 0).float()

    def change(self) -> Tensor:
        """How many more units all tokens would reach after each swap of two experts: [E, E], exact; 0 within a unit."""
        # a token that chose both experts reaches the same units as before: alone_EE cancels it out
        one_EE = self.absent_EU[:, self.unit_E] - self.alone_EE.diagonal().unsqueeze(1) + self.alone_EE
        return (one_EE + one_EE.T).masked_fill(self.unit_E.unsqueeze(1) == self.unit_E, 0)

    def swap(self, one: int, other: int) -> None:
        """Swap two experts. Only the tokens that chose one of them are counted again."""
        touched_TE = self.chosen_TE[self.chosen_TE[:, [one, other]].any(dim=1)]
        alone_EE, absent_EU = self._count(touched_TE)
        self.unit_E[[one, other]] = self.unit_E[[other, one]]
        alone_after_EE, absent_after_EU = self._count(touched_TE)
        self.alone_EE += alone_after_EE - alone_EE
        self.absent_EU += absent_after_EU - absent_EU


# 5. Choosing


def balanced(ids_TK: Tensor, num_experts: int, ep_size: int, aim: Aim, nodes: int = 1) -> tuple[int, ...]:
    """The placement of one layer under which we expect the steps of `aim` to take the least time.

    A searched placement fits the tokens that it was searched on better than others. So candidates are judged on tokens
    that they were not made from:

        1. Make the candidates from every other stretch of the trace, and judge them on the stretches between, by the
           nodes that tokens reach and by `slowest`. If the trace has at most TOKENS / 2 tokens, do it again with the
           two sides exchanged, and average.
        2. Keep those within TOLERANCE of the best that are no worse than any simple one: by nodes, then by `slowest`.
        3. Make the candidates again, from the whole trace. Of those kept, take the one with which tokens reach the
           fewest nodes, then ranks.

    So on other tokens of the same kind we expect it to be no worse than the simple placements, as far as the trace
    resembles those tokens: a short trace, or one of few texts, tells less. With nodes, that holds for the nodes that
    tokens reach; fewer nodes may cost time in the MoE layers.

    Parameters:
        ids_TK: [T, K], the logical experts that each token chose, tokens in their order; at least 16 tokens. A trace of
            more than TOKENS is sampled in evenly spread stretches.
        num_experts: E
        ep_size: R; need not divide E
        aim: the steps that are to take little time
        nodes: M, a divisor of R

    Returns:
        physical_to_logical: [E], each rank's experts in ascending order
    """
    ids_TK = _sample(ids_TK.long(), TOKENS, STRETCH)
    by_nodes, by_time = _held_out(ids_TK, num_experts, ep_size, aim, nodes)
    acceptable = _acceptable(_acceptable(range(len(by_time)), by_nodes), by_time)
    candidates = _candidates(ids_TK, num_experts, ep_size, aim, nodes)
    return placement_of(
        min((candidates[one] for one in acceptable), key=lambda rank_E: _fan_out(rank_E, ids_TK, ep_size, nodes))
    )


def balanced_layers(
    layers: Sequence[Tensor], num_experts: int, ep_size: int, aim: Aim, nodes: int = 1
) -> Iterator[tuple[int, ...]]:
    """`balanced` for the ids_TK of each layer, in the given order. One thread per processor, each on one layer."""
    import torch

    pool = ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(lambda ids_TK: balanced(ids_TK, num_experts, ep_size, aim, nodes), layers)
    finally:
        pool.shutdown(cancel_futures=True)


def _acceptable(candidates: Sequence[int], values: Sequence[float]) -> list[int]:
    """Those within TOLERANCE of the best that are no worse than a simple one; all but the last two are simple."""
    simple = [values[one] for one in candidates if one < len(values) - 2]
    limit = min([(1 + TOLERANCE) * min(values[one] for one in candidates), *simple]) + ROUNDING
    return [one for one in candidates if values[one] <= limit]


def _candidates(ids_TK: Tensor, num_experts: int, ep_size: int, aim: Aim, nodes: int) -> list[Tensor]:
    """The candidates made from a trace, as rank_E: the simple ones, then two searched, without and with `gather`.

    Simple are linear, node-zigzag if there are nodes, zigzag and packed. With nodes, the search begins with the one of
    these that sends tokens to the fewest nodes, and `spread` comes last and leaves each node its experts.
    """
    import torch

    load_E = ids_TK.flatten().bincount(minlength=num_experts).tolist()
    placements = [tuple(range(num_experts))]
    if nodes > 1 and num_experts % ep_size == 0:
        placements.append(node_zigzag(num_experts, ep_size, nodes))
    placements += [zigzag(num_experts, ep_size), packed(load_E, ep_size)]
    simple = [torch.tensor(rank_of_each(placement, ep_size)) for placement in placements]
    traffic = batches(ids_TK, num_experts, ep_size, aim)
    start = min(simple, key=lambda rank_E: _fan_out(rank_E, ids_TK, ep_size, nodes))
    if nodes == 1:
        start = search((simple[-1], simple[-2]), traffic, ep_size)
    ceiling = slowest(start, traffic, ep_size) + TOLERANCE
    fan_out_TK = _sample(ids_TK, FAN_OUT_TOKENS, FAN_OUT_STRETCH)
    searched = [start, gather(start, fan_out_TK, traffic, ep_size, nodes, ceiling)]
    if nodes > 1:
        searched = [spread(rank_E, traffic, ep_size, nodes) for rank_E in searched]
    return [*simple, *searched]


def _held_out(ids_TK: Tensor, num_experts: int, ep_size: int, aim: Aim, nodes: int) -> list[list[float]]:
    """Nodes that tokens reach, and `slowest`: each of every candidate, on tokens that it was not made from."""
    import torch

    one_TK, other_TK = _split(ids_TK)
    sides = [(one_TK, other_TK), (other_TK, one_TK)]
    by_side = []
    for made_from_TK, judged_on_TK in sides if 2 * len(ids_TK) <= TOKENS else sides[:1]:
        traffic = batches(judged_on_TK, num_experts, ep_size, aim)
        candidates = _candidates(made_from_TK, num_experts, ep_size, aim, nodes)
        reached = [float(_fan_out(rank_E, judged_on_TK, ep_size, nodes)[0]) for rank_E in candidates]
        by_side.append([reached, [slowest(rank_E, traffic, ep_size) for rank_E in candidates]])
    values: list[list[float]] = torch.tensor(by_side, dtype=torch.double).mean(dim=0).tolist()
    return values


def _fan_out(rank_E: Tensor, ids_TK: Tensor, ep_size: int, nodes: int) -> tuple[int, int]:
    """How many nodes, and how many ranks, the tokens reach in all."""

    def units(ranks_in_unit: int) -> int:
        unit_TK = (rank_E[ids_TK] // ranks_in_unit).sort(dim=1).values
        return len(ids_TK) + int((unit_TK.diff(dim=1) > 0).sum())

    return units(ep_size // nodes), units(1)


def _sample(ids_TK: Tensor, tokens: int, length: int) -> Tensor:
    """`tokens` of a longer trace, as evenly spread stretches of `length` tokens; a shorter trace as it is."""
    if len(ids_TK) <= tokens:
        return ids_TK
    stretches, wanted = len(ids_TK) // length, tokens // length
    taken = [number * stretches // wanted for number in range(wanted)]
    return ids_TK[: stretches * length].reshape(stretches, length, -1)[taken].flatten(0, 1)


def _split(ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Every other stretch of a trace, and the stretches between."""
    length = min(STRETCH, len(ids_TK) // 8)
    stretches = len(ids_TK) // length
    ids_STK = ids_TK[: stretches * length].reshape(stretches, length, -1)
    return ids_STK[::2].flatten(0, 1), ids_STK[1::2].flatten(0, 1)
