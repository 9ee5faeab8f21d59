"""Chooses which copy of each expert serves a batch, on the GPU: one program, between the router and the experts.

It computes what `placement.copy_choice.choose_copies` does, with integers only: so every rank that sees the same tokens
chooses the same. All warps play the rounds, with a lane for each rank and no barrier.

Import this file only where Triton and a GPU are present.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from ..placement.copy_choice import SWEEPS, Schedule

MAX_TOKENS_LAUNCHED_EARLY = 64  # as in grouped_topk
MIN_BLOCK = 256  # ids; all smaller batches share one compiled kernel
SLOT_BITS, RANK_BITS = 16, 8  # of a number in `copy_CE`
LOAD_BITS = 16  # of the number with a rank's load and its rounds


@dataclass(frozen=True, eq=False, slots=True)
class Tables:
    """A `Schedule` as the kernel reads it, on the GPU, padded to powers of two.

    Attributes:
        members_MR: int32, the logical experts of each rank: `fixed` rows of those without a choice, then a row for each
            round; -1 for none
        next_WR: int64, `next_GR` with several rounds in each number
        copy_CE: int32, the copies of each logical expert: slot, rank and round in one number, from the lowest bits on;
            -1 for none
        fixed: see `members_MR`
        rounds: G
    """

    members_MR: Tensor
    next_WR: Tensor
    copy_CE: Tensor
    fixed: int
    rounds: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All of them."""
        return self.members_MR, self.next_WR, self.copy_CE

    @property
    def constants(self) -> dict[str, int]:
        """What a kernel that reads them is compiled for."""
        copies, experts = self.copy_CE.shape
        ranks = self.members_MR.shape[1]
        return {
            **{"FIXED": self.fixed, "ROUNDS": self.rounds, "COPIES": copies, "EXPERTS": experts, "RANKS": ranks},
            **{"NEXT_BITS": bits(ranks), "PER_WORD": rounds_per_word(ranks), "SLOT": SLOT_BITS, "RANK": RANK_BITS},
            "SWEEPS": SWEEPS,
        }

    def to(self, device: torch.device | str) -> Tables:
        """The same tables on a device."""
        members_MR, next_WR, copy_CE = (tensor.to(device) for tensor in self.tensors)
        return Tables(members_MR, next_WR, copy_CE, self.fixed, self.rounds)


@dataclass(frozen=True, slots=True)
class Room:
    """What tables can hold. Layers with the same room share compiled kernels, and CUDA graphs depend on it.

    Attributes:
        rounds: G at most
        copies: C at most
        fixed: F at most
    """

    rounds: int
    copies: int
    fixed: int

    @classmethod
    def of(cls, prepared: Schedule) -> Room:
        """What this schedule takes."""
        return cls(len(prepared.expert_GR), prepared.slot_EC.shape[1], prepared.fixed_RF.shape[1])


def tables(prepared: Schedule, device: torch.device | str, room: Room | None = None) -> Tables:
    """The tables of a schedule, with `room` or just enough."""
    room = room or Room.of(prepared)
    rounds, ep_size = prepared.expert_GR.shape
    ranks, experts = _power(ep_size), _power(len(prepared.round_E))
    fixed = max(_power(room.fixed), _power(room.rounds))
    members_MR = torch.full((2 * fixed, ranks), -1, dtype=torch.int32)
    members_MR[: prepared.fixed_RF.shape[1], :ep_size] = prepared.fixed_RF.T
    members_MR[fixed : fixed + rounds, :ep_size] = prepared.expert_GR
    per_word = rounds_per_word(ranks)
    next_WR = torch.zeros(max(1, -(-room.rounds // per_word)), ranks, dtype=torch.int64)
    for turn, next_R in enumerate(prepared.next_GR):
        next_WR[turn // per_word, :ep_size] |= next_R.long() << (turn % per_word * bits(ranks))
    copy_CE = torch.full((room.copies, experts), -1, dtype=torch.int32)
    round_E1 = prepared.round_E.clamp(min=0).unsqueeze(1)
    copy_EC = prepared.slot_EC | prepared.rank_EC << SLOT_BITS | round_E1 << SLOT_BITS + RANK_BITS
    copy_CE[: copy_EC.shape[1], : len(copy_EC)] = torch.where(prepared.slot_EC < 0, -1, copy_EC).T
    return Tables(members_MR.to(device), next_WR.to(device), copy_CE.to(device), fixed, room.rounds)


@dataclass(frozen=True, eq=False, slots=True)
class Record:
    """Where the kernel counts the tokens of each physical expert: added to load_P, int32, while `wanted` is not 0."""

    load_P: Tensor
    wanted: Tensor


def choose_copies(
    ids_TK: Tensor,
    tables: Tables,
    tokens: Tensor | None = None,
    record: Record | None = None,
    *,
    warps: int = 8,
) -> Tensor:
    """Map logical to physical experts; of each expert, one copy serves the batch.

    Parameters:
        ids_TK: logical ids of at most SMALL_BATCH tokens, of any integer type; negative ids stay as they are
        tables: of the placement
        tokens: [1], how many of the rows are tokens, on the GPU; the rest is padding and makes no expert active
        record: counts tokens, without padding
        warps: of the program; 8 were fastest on an H100, of 1, 4 and 8

    Returns:
        physical ids, contiguous, with the type and shape of `ids_TK`
    """
    ids_TK = ids_TK.contiguous()
    mapped_TK = torch.empty_like(ids_TK)
    rows, top_k = ids_TK.shape
    if not rows:
        return mapped_TK
    block = max(MIN_BLOCK, _power(rows * top_k))
    early = torch.cuda.get_device_capability(ids_TK.device) >= (9, 0)
    _choose_copies[(1,)](
        ids_TK,
        mapped_TK,
        tokens,
        tables.members_MR,
        tables.next_WR,
        tables.copy_CE,
        record.load_P if record else None,
        record.wanted if record else None,
        ids_TK.numel(),
        TOP_K=top_k,
        **tables.constants,
        PADDED=tokens is not None,
        RECORD=record is not None,
        EARLY=early,
        BLOCK=block,
        MEMBERS=len(tables.members_MR),
        LOAD=LOAD_BITS,
        num_warps=warps,
        launch_pdl=early,
    )
    return mapped_TK


def rounds_per_word(ranks: int) -> int:
    """How many rounds one int64 of `next_WR` holds."""
    return 63 // bits(ranks)


def bits(ranks: int) -> int:
    """How many bits the number of a rank has."""
    return max(1, (ranks - 1).bit_length())


def _power(number: int) -> int:
    return int(triton.next_power_of_2(number))


@triton.jit(do_not_specialize=["numel"])
def _choose_copies(
    ids: tl.tensor,
    mapped: tl.tensor,
    tokens: tl.tensor,
    members: tl.tensor,
    following: tl.tensor,
    copies: tl.tensor,
    record: tl.tensor,
    recording: tl.tensor,
    numel: tl.tensor,
    TOP_K: tl.constexpr,
    FIXED: tl.constexpr,
    ROUNDS: tl.constexpr,
    COPIES: tl.constexpr,
    SWEEPS: tl.constexpr,
    PADDED: tl.constexpr,
    RECORD: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
    NEXT_BITS: tl.constexpr,
    PER_WORD: tl.constexpr,
    MEMBERS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOT: tl.constexpr,
    RANK: tl.constexpr,
    LOAD: tl.constexpr,
) -> None:
    # 1. what depends on the placement only
    rank = tl.arange(0, RANKS)
    expert = tl.arange(0, EXPERTS)
    member_MR = tl.load(members + tl.arange(0, MEMBERS * RANKS))
    first_word = tl.load(following + rank)
    chosen_E = tl.load(copies + expert)
    second_E = tl.load(copies + EXPERTS + expert) if COPIES > 1 else chosen_E
    if EARLY:
        gdc_wait()  # everything read above this line changes only between steps; the program waits beside the router's

    # 2. which experts are active; of each rank, how many without a choice, and in which rounds it has one to choose
    at = tl.arange(0, BLOCK)
    logical = tl.load(ids + at, mask=at < numel, other=-1).to(tl.int32)
    counts = logical >= 0
    if PADDED:
        counts &= at < tl.load(tokens) * TOP_K
    count_E = tl.histogram(tl.maximum(logical, 0), EXPERTS, mask=counts)
    active_E = (count_E > 0).to(tl.int64)
    active_MR = tl.where(member_MR >= 0, tl.gather(active_E, tl.maximum(member_MR, 0), 0), 0)
    bit = tl.maximum(tl.arange(0, MEMBERS) - FIXED + LOAD, 0)
    bit = tl.where(tl.arange(0, MEMBERS) < FIXED, 0, bit)
    sums = tl.sum(active_MR.reshape([MEMBERS, RANKS]) << bit[:, None], axis=0)
    sums += rank * 0  # as `rank` is laid out: then a round's exchange of loads is one instruction
    load = (sums & ((1 << LOAD) - 1)).to(tl.int32)
    asked = sums >> LOAD

    # 3. the rounds: each expert goes to the least loaded of its ranks; `mine` has a bit for each round
    mine = tl.zeros([RANKS], tl.int64)
    for sweep in tl.static_range(SWEEPS):
        for turn in tl.static_range(ROUNDS):
            word = first_word if turn < PER_WORD else tl.load(following + turn // PER_WORD * RANKS + rank)
            next_R = (word >> (turn % PER_WORD * NEXT_BITS)).to(tl.int32) & (RANKS - 1)
            without = load - ((mine >> turn) & 1).to(tl.int32)
            key = without * RANKS + (rank if (turn + sweep) % 2 == 0 else RANKS - 1 - rank)
            least = key
            other = key
            for _ in tl.static_range(COPIES - 1):
                other = tl.gather(other, next_R, 0)
                least = tl.minimum(least, other)
            take = (key == least).to(tl.int64) & (asked >> turn) & 1
            load = without + take.to(tl.int32)
            mine = (mine & ~(1 << turn)) | (take << turn)

    # 4. the slot of each expert
    for copy in tl.static_range(1, COPIES):
        copy_E = second_E if copy == 1 else tl.load(copies + copy * EXPERTS + expert)
        owner_E = (copy_E >> SLOT) & ((1 << RANK) - 1)
        taken_E = tl.gather(mine, owner_E & (RANKS - 1), 0) >> (tl.maximum(copy_E, 0) >> (SLOT + RANK))
        chosen_E = tl.where((copy_E >= 0) & ((taken_E & 1) == 1), copy_E, chosen_E)
    chosen_E = chosen_E & ((1 << SLOT) - 1)
    physical = tl.gather(chosen_E, tl.maximum(logical, 0), 0)
    tl.store(mapped + at, tl.where(logical >= 0, physical, logical).to(ids.dtype.element_ty), mask=at < numel)
    if RECORD:  # noqa: SIM102 - decided while compiling, without loading
        if tl.load(recording).to(tl.int32) != 0:
            tl.atomic_add(record + chosen_E, count_E, mask=count_E > 0, sem="relaxed")
