"""Maps logical expert ids to physical ones on the GPU by each token's position: see `placement.copy_split`.

Import this file only where Triton and a GPU are present.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .choose_copies import Record

BLOCK = 256  # ids per program


def split_ids(ids_TK: Tensor, slot_EN: Tensor, tokens: Tensor | None = None, record: Record | None = None) -> Tensor:
    """Map logical to physical experts; the token at position `t` goes to the slot in column `t % N`.

    Parameters:
        ids_TK: logical ids, of any integer type; negative ids stay as they are
        slot_EN: int32, the slots of each logical expert
        tokens: [1], how many of the rows are tokens, on the GPU; the rest is padding, which is not counted
        record: counts tokens, without padding

    Returns:
        physical ids, contiguous, with the type and shape of `ids_TK`
    """
    ids_TK = ids_TK.contiguous()
    mapped_TK = torch.empty_like(ids_TK)
    if count := ids_TK.numel():
        _split_ids[(triton.cdiv(count, BLOCK),)](
            ids_TK,
            mapped_TK,
            slot_EN,
            tokens,
            record.load_P if record else None,
            record.wanted if record else None,
            count,
            TOP_K=ids_TK.shape[1],
            COLUMNS=slot_EN.shape[1],
            PADDED=tokens is not None,
            RECORD=record is not None,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return mapped_TK


@triton.jit(do_not_specialize=["count"])
def _split_ids(
    ids: tl.tensor,
    mapped: tl.tensor,
    slots: tl.tensor,
    tokens: tl.tensor,
    record: tl.tensor,
    recording: tl.tensor,
    count: tl.tensor,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    RECORD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    logical = tl.load(ids + at, mask=here, other=-1).to(tl.int32)
    chosen = logical >= 0
    column = at // TOP_K % COLUMNS
    physical = tl.load(slots + logical * COLUMNS + column, mask=chosen, other=0)
    tl.store(mapped + at, tl.where(chosen, physical, logical).to(ids.dtype.element_ty), mask=here)
    if RECORD:  # noqa: SIM102 - decided while compiling, without loading
        if tl.load(recording).to(tl.int32) != 0:
            if PADDED:
                chosen &= at < tl.load(tokens) * TOP_K
            tl.atomic_add(record + physical, 1, mask=chosen, sem="relaxed")
