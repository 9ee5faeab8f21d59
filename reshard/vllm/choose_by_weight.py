"""Chooses which copy of each expert serves a large batch, on the GPU, by how many tokens chose each expert.

In large batches all experts are active, and the time of an expert follows its tokens. So the choice is that of
`placement.copy_choice.choose_copies`, with a weight for each expert. There are three kernels: count the tokens of each
expert, choose in one program, map the ids.

Import this file only where Triton and a GPU are present.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..placement.copy_choice import Weight
from .choose_copies import Record, Tables

BLOCK = 1024  # ids per program


def choose_by_weight(
    ids_TK: Tensor,
    tables: Tables,
    weight: Weight,
    tokens: Tensor | None = None,
    record: Record | None = None,
    *,
    all_rows: bool = False,
) -> Tensor:
    """Map logical to physical experts; of each expert, one copy serves the batch.

    Parameters:
        ids_TK: logical ids, of any integer type; negative ids stay as they are
        tables: of the placement
        weight: of each expert, by its tokens
        tokens: [1], how many of the rows are tokens, on the GPU; the rest is padding
        record: counts tokens, without padding
        all_rows: whether padding counts in the choice

    Returns:
        physical ids, contiguous, with the type and shape of `ids_TK`
    """
    ids_TK = ids_TK.contiguous()
    if not (number := ids_TK.numel()):
        return torch.empty_like(ids_TK)
    experts = tables.copy_CE.shape[1]
    count_E = torch.zeros(experts, dtype=torch.int32, device=ids_TK.device)
    padded = tokens is not None and not all_rows
    _count[(triton.cdiv(number, BLOCK),)](
        *(ids_TK, tokens, count_E, number),
        TOP_K=ids_TK.shape[1],
        PADDED=padded,
        EXPERTS=experts,
        BLOCK=BLOCK,
    )
    slot_E = torch.empty_like(count_E)
    _choose[(1,)](
        *(count_E, slot_E, tables.members_MR, tables.next_WR, tables.copy_CE),
        **tables.constants,
        TILE=weight.tile,
        FIRST=weight.first,
        FURTHER=weight.further,
        num_warps=1,
    )
    return map_and_count(ids_TK, slot_E, tokens, record)


def map_and_count(ids_TK: Tensor, slot_E: Tensor, tokens: Tensor | None = None, record: Record | None = None) -> Tensor:
    """Map logical to physical experts by a table.

    Parameters:
        ids_TK: logical ids, of any integer type; negative ids stay as they are
        slot_E: int32, the slot of each logical expert
        tokens: [1], how many of the rows are tokens, on the GPU; the rest is padding
        record: counts tokens, without padding

    Returns:
        physical ids, contiguous, with the type and shape of `ids_TK`
    """
    ids_TK = ids_TK.contiguous()
    mapped_TK = torch.empty_like(ids_TK)
    if number := ids_TK.numel():
        _map[(triton.cdiv(number, BLOCK),)](
            *(ids_TK, mapped_TK, slot_E, tokens),
            record.load_P if record else None,
            record.wanted if record else None,
            number,
            TOP_K=ids_TK.shape[1],
            PADDED=tokens is not None,
            RECORD=record is not None,
            BLOCK=BLOCK,
        )
    return mapped_TK


@triton.jit(do_not_specialize=["number"])
def _count(
    ids: tl.tensor,
    tokens: tl.tensor,
    counts: tl.tensor,
    number: tl.tensor,
    TOP_K: tl.constexpr,
    PADDED: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    logical = tl.load(ids + at, mask=at < number, other=-1).to(tl.int32)
    counted = logical >= 0
    if PADDED:
        counted &= at < tl.load(tokens) * TOP_K
    count_E = tl.histogram(tl.maximum(logical, 0), EXPERTS, mask=counted)
    tl.atomic_add(counts + tl.arange(0, EXPERTS), count_E, mask=count_E > 0, sem="relaxed")


@triton.jit
def _weight(count: tl.tensor, TILE: tl.constexpr, FIRST: tl.constexpr, FURTHER: tl.constexpr) -> tl.tensor:
    """`Weight.of`."""
    return tl.where(count > 0, FIRST + ((count + TILE - 1) // TILE - 1) * FURTHER, 0)


@triton.jit
def _choose(
    counts: tl.tensor,
    slots: tl.tensor,
    members: tl.tensor,
    following: tl.tensor,
    copies: tl.tensor,
    FIXED: tl.constexpr,
    ROUNDS: tl.constexpr,
    COPIES: tl.constexpr,
    SWEEPS: tl.constexpr,
    RANKS: tl.constexpr,
    NEXT_BITS: tl.constexpr,
    PER_WORD: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOT: tl.constexpr,
    RANK: tl.constexpr,
    TILE: tl.constexpr,
    FIRST: tl.constexpr,
    FURTHER: tl.constexpr,
) -> None:
    # 1. the weights of experts without a choice
    rank = tl.arange(0, RANKS)
    fixed_FR = tl.load(members + tl.arange(0, FIXED)[:, None] * RANKS + rank[None, :])
    count_FR = tl.load(counts + tl.maximum(fixed_FR, 0), mask=fixed_FR >= 0, other=0)
    load = tl.sum(_weight(count_FR, TILE, FIRST, FURTHER), axis=0)
    load += rank * 0  # as `rank` is laid out

    # 2. the rounds, as in `choose_copies`
    mine = tl.zeros([RANKS], tl.int64)
    for sweep in tl.static_range(SWEEPS):
        for turn in tl.static_range(ROUNDS):
            expert = tl.load(members + (FIXED + turn) * RANKS + rank)
            count = tl.load(counts + tl.maximum(expert, 0), mask=expert >= 0, other=0)
            weight = _weight(count, TILE, FIRST, FURTHER)
            word = tl.load(following + turn // PER_WORD * RANKS + rank)
            next_R = (word >> (turn % PER_WORD * NEXT_BITS)).to(tl.int32) & (RANKS - 1)
            without = load - ((mine >> turn) & 1).to(tl.int32) * weight
            key = without * RANKS + (rank if (turn + sweep) % 2 == 0 else RANKS - 1 - rank)
            least = key
            other = key
            for _ in tl.static_range(COPIES - 1):
                other = tl.gather(other, next_R, 0)
                least = tl.minimum(least, other)
            take = ((key == least) & (weight > 0)).to(tl.int64)
            load = without + take.to(tl.int32) * weight
            mine = (mine & ~(1 << turn)) | (take << turn)

    # 3. the slot of each expert
    expert_E = tl.arange(0, EXPERTS)
    chosen_E = tl.load(copies + expert_E)
    for copy in tl.static_range(1, COPIES):
        copy_E = tl.load(copies + copy * EXPERTS + expert_E)
        owner_E = (copy_E >> SLOT) & ((1 << RANK) - 1)
        taken_E = tl.gather(mine, owner_E & (RANKS - 1), 0) >> (tl.maximum(copy_E, 0) >> (SLOT + RANK))
        chosen_E = tl.where((copy_E >= 0) & ((taken_E & 1) == 1), copy_E, chosen_E)
    tl.store(slots + expert_E, chosen_E & ((1 << SLOT) - 1))


@triton.jit(do_not_specialize=["number"])
def _map(
    ids: tl.tensor,
    mapped: tl.tensor,
    slots: tl.tensor,
    tokens: tl.tensor,
    record: tl.tensor,
    recording: tl.tensor,
    number: tl.tensor,
    TOP_K: tl.constexpr,
    PADDED: tl.constexpr,
    RECORD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < number
    logical = tl.load(ids + at, mask=here, other=-1).to(tl.int32)
    chosen = logical >= 0
    physical = tl.load(slots + logical, mask=chosen, other=0)
    tl.store(mapped + at, tl.where(chosen, physical, logical).to(ids.dtype.element_ty), mask=here)
    if RECORD:  # noqa: SIM102 - decided while compiling, without loading
        if tl.load(recording).to(tl.int32) != 0:
            if PADDED:
                chosen &= at < tl.load(tokens) * TOP_K
            tl.atomic_add(record + physical, 1, mask=chosen, sem="relaxed")
