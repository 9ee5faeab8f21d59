"""Which experts get copies, and where all copies go, for a number of spare slots on each rank. Pure functions.

A batch chooses which copy of each active expert serves it (see `copy_choice`). So copies are well placed if the busiest
rank has little to do *after the best choice*. How much that is follows from sets of ranks. Experts without a copy
outside a set must be served inside it, so one of its ranks gets at least their weight divided by the set's size. By
Hall's theorem, the largest of these bounds over all sets, rounded up to whole experts, is what the best choice reaches.
For many batches at once, the bounds are a matrix product. The steps, in the order of the code:

    1. sampled     draw batches of random tokens from the trace, since tokens of a decoding batch come from many texts
    2. first       zigzag, and a copy of each of the most used experts on another rank, all pairs of ranks used alike
    3. searched    move copies while that lowers the busiest rank's weight, averaged over batches: estimate all moves by
                   the slope of a smooth maximum, compute the best estimates exactly, make those that help
    4. with_copies judge 2 and 3 on tokens that 3 has not seen, and take the better one

The weight of an expert in a batch is what it adds to its rank: 1 if it is active, or its time. Tensors carry their
shape in their name: T tokens, K experts chosen, E experts, R EP ranks, B batches, Q sets of ranks, N moves.
`held_ER` is a placement: whether a rank holds a copy of an expert. Random numbers are seeded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import OutputError
from .copy_choice import choose_copies, schedule

if TYPE_CHECKING:
    from torch import Tensor

BATCH_SIZES = (8, 32, 64)  # tokens
DRAWN = 1 << 13  # tokens of each batch size: small batches differ more, so there are more of them
MIN_BATCHES = 64  # of each size
SMOOTHNESS = 0.3  # of an average active expert: estimates take in the sets that are this close to the largest
SHARPNESS = 0.1  # as SMOOTHNESS, for the value that the search lowers
MOVES = 24  # computed exactly at a time
BEST = 4  # experts of each rank that estimates combine
MAX_ALL_SETS = 8  # ranks; for more, only sets of one rank, of two and of all ranks

Weigh = Callable[["Tensor"], "Tensor"]
"""From the tokens of each expert, count_BE, to what the expert adds to its rank, weight_BE, in any unit."""
Fixed = Callable[[int], float]
"""From the tokens in a batch to what each rank has to do beside its experts, in the unit of `Weigh`."""


def active(count_BE: Tensor) -> Tensor:
    """1 for each active expert: its weights must be read, however few tokens it has."""
    return (count_BE > 0).float()


def nothing(tokens: int) -> float:
    """Ranks have nothing to do beside their experts."""
    return 0.0


# 1. Batches


@dataclass(frozen=True, slots=True)
class Sample:
    """Batches drawn from a trace.

    Attributes:
        weight_BE: what each expert adds to its rank; an average active expert of a batch size adds 1
        share_B: sums to 1 after multiplying by the mean rank's weight; a size whose `fixed` part is large counts less
    """

    weight_BE: Tensor
    share_B: Tensor


def sampled(
    ids_TK: Tensor,
    num_experts: int,
    ep_size: int,
    sizes: Sequence[int],
    weigh: Weigh = active,
    fixed: Fixed = nothing,
    seed: int = 0,
) -> Sample:
    """Draw batches of each size: of DRAWN tokens in all, at least MIN_BATCHES.

    Parameters:
        ids_TK: [T, K], the logical experts that each token chose
        num_experts: E
        ep_size: R
        sizes: tokens in a batch
        weigh, fixed: what an expert with some tokens adds to its rank, and what each rank has to do beside that
        seed: of the random numbers
    """
    import torch

    generator, weights, shares = torch.Generator().manual_seed(seed), [], []
    for size in sizes:
        number = max(MIN_BATCHES, DRAWN // size)
        rows_BT = torch.randint(len(ids_TK), (number, size), generator=generator)
        count_BE = torch.zeros(number, num_experts)
        for first in range(0, size, 64):  # bounds the memory used for large batches
            ids_BN = ids_TK[rows_BT[:, first : first + 64]].reshape(number, -1).long()
            count_BE.scatter_add_(1, ids_BN, torch.ones(ids_BN.shape))
        weight_BE = weigh(count_BE).float()
        unit = float(weight_BE.sum() / (count_BE > 0).sum())
        weight_BE /= unit
        done = float(weight_BE.sum()) / ep_size + number * fixed(size) / unit
        weights.append(weight_BE)
        shares.append(torch.full((number,), 1 / done))
    weight_BE, share_B = torch.cat(weights), torch.cat(shares)
    return Sample(weight_BE, share_B * ep_size / float(share_B @ weight_BE.sum(dim=1)))


# 2. Where the search starts


def first(use_E: Tensor, ep_size: int, spare: int) -> Tensor:
    """Zigzag, and a copy of each of the most used experts.

    A copy goes to the rank with the most free slots; among these, to the one that shares the fewest experts with the
    rank of the original. If there are more slots than experts, experts get further copies.

    Parameters:
        use_E: how much each expert is used
        ep_size: R, a divisor of E
        spare: free slots on each rank, at most E - E / R

    Returns:
        held_ER: bool
    """
    import torch

    num_experts = len(use_E)
    held_ER = torch.zeros(num_experts, ep_size, dtype=torch.bool)
    held_ER[torch.arange(num_experts), torch.arange(num_experts) % ep_size] = True
    room, shared = [spare] * ep_size, torch.zeros(ep_size, ep_size)
    most_used = use_E.argsort(descending=True, stable=True).tolist()
    while any(room):
        for expert in most_used:
            eligible = [rank for rank in range(ep_size) if room[rank] and not held_ER[expert, rank]]
            if eligible:
                shared_R = shared[held_ER[expert]].sum(dim=0)
                rank = min(eligible, key=lambda rank: (-room[rank], float(shared_R[rank]), rank))
                shared[held_ER[expert], rank] += 1
                shared[rank, held_ER[expert]] += 1
                held_ER[expert, rank] = True
                room[rank] -= 1
    return held_ER


# 3. The search


def rank_sets(ep_size: int) -> Tensor:
    """The sets of ranks whose bounds are computed, float [Q, R]: all of them, or for many ranks the small ones and all.

    With all sets, the largest bound is what the best choice reaches, but for parts of an expert. With fewer sets it is
    a little too low.
    """
    import torch

    if ep_size <= MAX_ALL_SETS:
        chosen: list[Sequence[int]] = [
            ranks for size in range(1, ep_size + 1) for ranks in itertools.combinations(range(ep_size), size)
        ]
    else:
        chosen = [[rank] for rank in range(ep_size)]
        chosen += [*itertools.combinations(range(ep_size), 2), range(ep_size)]
    set_QR = torch.zeros(len(chosen), ep_size)
    for row_R, ranks in zip(set_QR, chosen, strict=True):
        row_R[list(ranks)] = 1
    return set_QR


class Bounds:
    """The bound of each set of ranks in each batch, under a placement that changes by moves.

    A move changes the ranks of two experts: they exchange slots, or one gives a slot to the other.
    """

    def __init__(self, held_ER: Tensor, sample: Sample, set_QR: Tensor) -> None:
        self.held_ER, self.sample, self.set_QR = held_ER.clone(), sample, set_QR
        self.size_Q = set_QR.sum(dim=1)
        self.bound_BQ = sample.weight_BE @ (self._within(held_ER) / self.size_Q)

    def _within(self, held_NR: Tensor) -> Tensor:
        """1 if experts with these copies have none outside the set: float [N, Q]."""
        return (held_NR.float() @ (1 - self.set_QR).T == 0).float()

    def value(self, bound_BQ: Tensor) -> float:
        """The busiest rank's weight after the best choice, over the mean rank's, averaged; smoothed a little."""
        return float(((bound_BQ / SHARPNESS).logsumexp(dim=1) * SHARPNESS) @ self.sample.share_B)

    def after(self, move: Move) -> Tensor:
        """bound_BQ after a move."""
        experts = [move.one, move.other]
        change_NQ = (self._within(move.held_NR) - self._within(self.held_ER[experts])) / self.size_Q
        return self.bound_BQ + self.sample.weight_BE[:, experts] @ change_NQ

    def make(self, move: Move) -> None:
        """Make a move."""
        self.bound_BQ = self.after(move)
        self.held_ER[[move.one, move.other]] = move.held_NR

    def likely_moves(self) -> list[Move]:
        """The MOVES moves with the best estimates: how the value changes to first order."""
        import torch

        slope_BQ = (self.bound_BQ / SMOOTHNESS).softmax(dim=1) * self.sample.share_B.unsqueeze(1)
        slope_EQ = self.sample.weight_BE.T @ (slope_BQ / self.size_Q)
        outside_EQ = self.held_ER.float() @ (1 - self.set_QR).T
        inside_EQ, nearly_EQ = slope_EQ * (outside_EQ == 0), slope_EQ * (outside_EQ == 1)
        # an expert leaves rank r, enters rank q, or both
        leaves_ER = nearly_EQ @ (1 - self.set_QR)
        enters_ER = inside_EQ @ self.set_QR - inside_EQ.sum(dim=1, keepdim=True)
        moves_ERR = torch.stack([nearly_EQ * (1 - of_Q) @ self.set_QR for of_Q in self.set_QR.T], dim=1)
        moves_ERR += enters_ER.unsqueeze(1)
        held_ER = self.held_ER
        moves_ERR.masked_fill_(~(held_ER.unsqueeze(2) & ~held_ER.unsqueeze(1)), float("inf"))
        leaves_ER.masked_fill_(~held_ER | (held_ER.sum(dim=1, keepdim=True) == 1), float("inf"))
        enters_ER.masked_fill_(held_ER, float("inf"))
        # estimate, the experts, the rank that the first leaves, and the rank that the other leaves, or the same rank
        found: list[tuple[float, int, int, int, int]] = []
        for here, there in itertools.combinations_with_replacement(range(held_ER.shape[1]), 2):
            one = _lowest(moves_ERR[:, here, there] if here != there else leaves_ER[:, here])
            other = _lowest(moves_ERR[:, there, here] if here != there else enters_ER[:, here])
            found += [(v + w, e, f, here, there) for (v, e), (w, f) in itertools.product(one, other)]
        chosen = sorted(row for row in found if row[0] < float("inf"))[:MOVES]
        return [self._move(*row[1:]) for row in chosen]

    def _move(self, one: int, other: int, here: int, there: int) -> Move:
        held_NR = self.held_ER[[one, other]].clone()
        held_NR[0, here], held_NR[1, here] = False, True
        if here != there:
            held_NR[1, there], held_NR[0, there] = False, True
        return Move(one, other, held_NR)


def _lowest(change_E: Tensor) -> list[tuple[float, int]]:
    """The BEST lowest changes and their experts."""
    found = change_E.topk(min(BEST, len(change_E)), largest=False)
    return list(zip(found.values.tolist(), found.indices.tolist(), strict=True))


@dataclass(frozen=True, eq=False, slots=True)
class Move:
    """Two experts, and the ranks that hold them after the move, held_NR [2, R]."""

    one: int
    other: int
    held_NR: Tensor


def searched(held_ER: Tensor, sample: Sample) -> Tensor:
    """Make moves while one of the likeliest lowers the value.

    Parameters:
        held_ER: where to start
        sample: the batches to serve well

    Returns:
        held_ER
    """
    bounds = Bounds(held_ER, sample, rank_sets(held_ER.shape[1]))
    value = bounds.value(bounds.bound_BQ)
    while True:
        before, moved = value, set[int]()
        scored = [(bounds.value(bounds.after(move)), move) for move in bounds.likely_moves()]
        for estimate, move in sorted(scored, key=lambda row: row[0]):
            if estimate >= before - _LEAST or moved & {move.one, move.other}:
                continue
            after = bounds.value(bounds.after(move))
            if after < value - _LEAST:
                bounds.make(move)
                value = after
                moved |= {move.one, move.other}
        if not moved:
            return bounds.held_ER


_LEAST = 1e-6  # of the mean rank's weight: a smaller gain may be float32 rounding


# 4. The placement


def with_copies(
    ids_TK: Tensor,
    num_experts: int,
    ep_size: int,
    spare: int,
    *,
    sizes: Sequence[int] = BATCH_SIZES,
    weigh: Weigh = active,
    fixed: Fixed = nothing,
) -> tuple[int, ...]:
    """The placement of one layer with copies, under which we expect the busiest rank of a batch to have least to do.

    Parameters:
        ids_TK: [T, K], the logical experts that each token chose; random ones if the traffic is unknown
        num_experts: E
        ep_size: R, a divisor of E
        spare: S, slots on each rank beside its E / R
        sizes: tokens in a batch, all equally important
        weigh, fixed: what an expert with some tokens adds to its rank, and what each rank has to do beside that

    Returns:
        physical_to_logical: [E + R * S]; each rank's experts in ascending order, none twice

    Raises:
        OutputError: R does not divide E, or S is more than the experts that a rank lacks
    """
    if fault := spare_fault(num_experts, ep_size, spare):
        raise OutputError(fault)
    seen = sampled(ids_TK[::2], num_experts, ep_size, sizes, weigh, fixed)
    unseen = sampled(ids_TK[1::2], num_experts, ep_size, sizes, weigh, fixed, seed=1)
    start_ER = first(seen.weight_BE.sum(dim=0), ep_size, spare)
    candidates = [placement_of(held_ER) for held_ER in (start_ER, searched(start_ER, seen))]
    return min(candidates, key=lambda placement: busiest(placement, unseen, ep_size))


def spare_fault(num_experts: int, ep_size: int, spare: int) -> str | None:
    """Why E experts cannot have S spare slots on each of R ranks, and what to do; None if they can."""
    most = num_experts - num_experts // ep_size
    if num_experts % ep_size == 0 and 0 <= spare <= most:
        return None
    return (
        f"{spare} spare slots on each of {ep_size} EP ranks for {num_experts} experts: expected a number of ranks that "
        f"divides the experts, and at most {most} spare slots, so that no rank has an expert twice; use others"
    )


def busiest(physical_to_logical: Sequence[int], sample: Sample, ep_size: int) -> float:
    """The busiest rank's weight over the mean rank's, averaged over batches, with copies as `choose_copies` chooses."""
    import torch

    slots = len(physical_to_logical) // ep_size
    weight_BE = (sample.weight_BE * _UNITS).round().long()
    slot_BE = choose_copies(weight_BE, schedule(physical_to_logical, weight_BE.shape[1], ep_size))
    load_BR = torch.zeros(len(weight_BE), ep_size, dtype=torch.long)
    load_BR.scatter_add_(1, torch.div(slot_BE, slots, rounding_mode="floor"), weight_BE)
    return float(load_BR.amax(dim=1).float() / _UNITS @ sample.share_B)


_UNITS = 1000  # choices are made in integers


def placement_of(held_ER: Tensor) -> tuple[int, ...]:
    """physical_to_logical of held_ER; each rank's experts in ascending order."""
    return tuple(held_ER.T.nonzero()[:, 1].tolist())
