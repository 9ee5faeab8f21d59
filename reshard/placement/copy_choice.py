"""Which copy of each expert serves a batch, so that the busiest rank has the least to do. Pure functions.

With spare slots, some experts have copies on several ranks, and each batch may choose among them. One copy of an expert
serves all tokens of a batch, since each copy that serves must be read. What counts depends on the batch:

    one token                  nothing: choosing takes longer than it saves. Each expert has a fixed copy.
    up to SMALL_BATCH tokens   active experts: ranks get equally many
    up to LARGE_BATCH          nothing: all experts are active, and most have one tile of rows
    more                       the time of each expert, which follows its tiles of rows (`time_model`)

The choice is greedy, in rounds:

    1. schedule        once per placement: give each expert with copies, in order, the first round in which none of its
                       ranks has another expert. So the experts of one round can be placed at the same time.
    2. choose_copies   for each batch: each rank starts with the experts that only it has. Then, round by round, each
                       expert goes to the least loaded of its ranks. A second sweep over all rounds moves each expert
                       again, now that all loads are known.

If two ranks are equally loaded, the lower one takes the expert in one round and the higher one in the next, and the
other way round in the second sweep. So differences that lie between far ranks can move along from rank to rank.

On a GPU a round is a few instructions, with a lane for each rank: `reshard.vllm.choose_copies` computes the same there.
Tensors carry their shape in their name: B batches, E experts, R EP ranks, P physical experts, G rounds, C copies of one
expert at most, F experts without a choice on one rank at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# A second sweep brings the busiest rank from 1.5 to 2 % above the optimum to 0.5 %. A third would gain 0.04 of an
# expert in batches of eight tokens, which is less than it takes.
SWEEPS = 2
FIXED_SWEEPS = 8  # of a choice that is made once; with two, a rank often has one expert more than the others
# Tokens. A single token, and batches in between, would take longer to choose than they save: R1's layers on eight H200,
# measured for one token, and by the time model for the others.
SMALL_BATCH, LARGE_BATCH = 128, 1024
MAX_ROUNDS = 47  # on a GPU the choices of a rank are the bits of an integer


@dataclass(frozen=True, slots=True)
class Weight:
    """What an expert adds to its rank, as an integer: `first` for its first tile of rows, `further` for each other.

    A tile has `tile` rows, and an expert has a row for each of its tokens.
    """

    tile: int
    first: int
    further: int

    def of(self, count_BE: Tensor) -> Tensor:
        """The weights of experts with so many tokens; 0 without a token."""
        tiles_BE = -(-count_BE // self.tile)
        return (self.first + (tiles_BE - 1) * self.further) * (tiles_BE > 0)


BY_ACTIVE = Weight(tile=1 << 30, first=1, further=0)
BY_TIME = Weight(tile=64, first=8, further=5)  # the ratio of times in `time_model`, on an H200
BY_PAIRS = Weight(tile=1, first=1, further=1)


@dataclass(frozen=True, eq=False, slots=True)
class Schedule:
    """A placement with copies, prepared for choosing. All tensors are int32, and -1 means none.

    Attributes:
        fixed_RF: the logical experts on each rank that have no choice
        expert_GR: the logical expert that each rank may take in each round
        next_GR: another rank that may take that expert; following it leads to all of them, in a cycle. A rank that has
            no expert in a round is followed by itself.
        round_E: the round of each logical expert; -1 if it has no choice
        slot_EC: the physical experts of each logical expert that a batch may choose from
        rank_EC: their ranks
    """

    fixed_RF: Tensor
    expert_GR: Tensor
    next_GR: Tensor
    round_E: Tensor
    slot_EC: Tensor
    rank_EC: Tensor


def copies_by_rank(physical_to_logical: Sequence[int], num_experts: int, ep_size: int) -> list[dict[int, int]]:
    """The slot of each logical expert on each rank that has one; the first of them if a rank has several.

    Parameters:
        physical_to_logical: [P], every logical expert at least once
        num_experts: E
        ep_size: R, a divisor of P

    Returns:
        E dictionaries from rank to slot, ranks in ascending order
    """
    slots = len(physical_to_logical) // ep_size
    copies: list[dict[int, int]] = [{} for _ in range(num_experts)]
    for physical, logical in enumerate(physical_to_logical):
        copies[logical].setdefault(physical // slots, physical)
    return copies


def schedule(
    physical_to_logical: Sequence[int],
    num_experts: int,
    ep_size: int,
    *,
    max_rounds: int = MAX_ROUNDS,
    max_copies: int | None = None,
) -> Schedule:
    """Prepare a placement for `choose_copies`.

    Copies of one expert on one rank count as one. An expert for which `max_rounds` rounds have no room keeps its first
    slot.

    Parameters:
        physical_to_logical: [P], every logical expert at least once
        num_experts: E
        ep_size: R, a divisor of P
        max_rounds: G at most, at most MAX_ROUNDS
        max_copies: C at most, the copies on the lowest ranks; None: all copies
    """
    import torch

    copies = copies_by_rank(physical_to_logical, num_experts, ep_size)
    copies = [dict(list(slot_of.items())[:max_copies]) for slot_of in copies]
    rounds: list[dict[int, int]] = []  # the expert of each rank that has one
    round_E = [-1] * num_experts
    for expert, slot_of in enumerate(copies):
        if len(slot_of) > 1:
            free = next((turn for turn, taken in enumerate(rounds) if taken.keys().isdisjoint(slot_of)), len(rounds))
            if free < max_rounds:
                rounds[free:free] = [{}] if free == len(rounds) else []
                rounds[free].update(dict.fromkeys(slot_of, expert))
                round_E[expert] = free
    for slot_of, turn in zip(copies, round_E, strict=True):
        while turn < 0 and len(slot_of) > 1:
            slot_of.popitem()
    fixed: list[list[int]] = [[] for _ in range(ep_size)]
    for expert, turn in enumerate(round_E):
        if turn < 0:
            fixed[next(iter(copies[expert]))].append(expert)
    turns = [[taken.get(rank, -1) for rank in range(ep_size)] for taken in rounds]
    following = [
        [_next(rank, list(copies[expert])) if expert >= 0 else rank for rank, expert in enumerate(turn)]
        for turn in turns
    ]
    return Schedule(
        fixed_RF=_table(fixed),
        expert_GR=torch.tensor(turns, dtype=torch.int32).view(-1, ep_size),
        next_GR=torch.tensor(following, dtype=torch.int32).view(-1, ep_size),
        round_E=torch.tensor(round_E, dtype=torch.int32),
        slot_EC=_table([list(slot_of.values()) for slot_of in copies]),
        rank_EC=_table([list(slot_of) for slot_of in copies]),
    )


def choose_copies(weight_BE: Tensor, prepared: Schedule, sweeps: int = SWEEPS) -> Tensor:
    """Choose a copy of each expert for each batch.

    Parameters:
        weight_BE: what each expert adds to its rank, as integers
        prepared: the placement

    Returns:
        slot_BE: the physical expert that serves each logical expert; its first one if it adds nothing
    """
    import torch

    weight_BE = weight_BE.long()
    ranks = torch.arange(len(prepared.fixed_RF))
    load_BR = _weights(weight_BE, prepared.fixed_RF.flatten()).view(len(weight_BE), len(ranks), -1).sum(dim=2)
    mine_GBR = load_BR.new_zeros(len(prepared.expert_GR), *load_BR.shape)  # 1 if the rank has the expert of the round
    for sweep in range(sweeps):
        for turn, (expert_R, next_R) in enumerate(zip(prepared.expert_GR, prepared.next_GR, strict=True)):
            weight_BR = _weights(weight_BE, expert_R)
            without_BR = load_BR - mine_GBR[turn] * weight_BR
            key_BR = without_BR * len(ranks) + (ranks if (turn + sweep) % 2 == 0 else ranks.flip(0))
            least_BR = other_BR = key_BR
            for _ in range(prepared.slot_EC.shape[1] - 1):
                other_BR = other_BR[:, next_R.long()]
                least_BR = torch.minimum(least_BR, other_BR)
            mine_GBR[turn] = (key_BR == least_BR) & (weight_BR > 0)
            load_BR = without_BR + mine_GBR[turn] * weight_BR
    slot_BE = prepared.slot_EC[:, 0].long().expand_as(weight_BE)
    for rank_E, slot_E in zip(prepared.rank_EC.T.long(), prepared.slot_EC.T.long(), strict=True):
        if len(mine_GBR):
            takes_EB = mine_GBR[prepared.round_E.clamp(min=0).long(), :, rank_E.clamp(min=0)]
            takes_EB[(prepared.round_E < 0) | (slot_E < 0)] = 0
            slot_BE = torch.where(takes_EB.T == 1, slot_E, slot_BE)
    return slot_BE


def fixed_slots(prepared: Schedule) -> Tensor:
    """The copy of each expert if all are active and a batch does not choose: slot_E, equally many on each rank."""
    import torch

    return choose_copies(torch.ones(1, len(prepared.round_E), dtype=torch.int32), prepared, FIXED_SWEEPS)[0]


def chosen_by(tokens: int, *, same_tokens: bool) -> Weight | None:
    """What a batch chooses copies by; None if it uses the fixed ones.

    Parameters:
        tokens: in a batch, padding included
        same_tokens: whether all ranks route the same tokens. If not, a batch is what one rank routes: it must use the
            same copies as the others' unless it is large, and then it makes its own pairs even
    """
    if tokens > LARGE_BATCH:
        return BY_TIME if same_tokens else BY_PAIRS
    return BY_ACTIVE if same_tokens and 1 < tokens <= SMALL_BATCH else None


def serving_slots(count_BE: Tensor, prepared: Schedule, tokens: int, *, same_tokens: bool = True) -> Tensor:
    """The copy of each expert that serves batches of `tokens` tokens.

    Parameters:
        count_BE: tokens that chose each logical expert, in each batch
        prepared: the placement
        tokens, same_tokens: as in `chosen_by`

    Returns:
        slot_BE: as `choose_copies` does
    """
    weight = chosen_by(tokens, same_tokens=same_tokens)
    if weight is None:
        return fixed_slots(prepared).expand_as(count_BE)
    return choose_copies(weight.of(count_BE), prepared)


def _weights(weight_BE: Tensor, expert_N: Tensor) -> Tensor:
    """The weights [B, N] of experts in each batch; 0 for expert -1."""
    return weight_BE[:, expert_N.clamp(min=0).long()] * (expert_N >= 0)


def _next(rank: int, cycle: Sequence[int]) -> int:
    return cycle[(cycle.index(rank) + 1) % len(cycle)]


def _table(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of unequal lengths as one int32 tensor, filled up with -1; at least one column."""
    import torch

    width = max(1, *map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.int32)
