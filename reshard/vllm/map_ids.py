"""Maps logical expert ids to physical ones in one GPU kernel; PyTorch's indexing by int32 takes two.

Import this file only where Triton and a GPU are present.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # ids per program: 64 tokens with 8 each


def map_ids(ids_TK: Tensor, place_E: Tensor) -> Tensor:
    """Return the physical id of each logical id; negative ids, which mark padding, stay as they are.

    Parameters:
        ids_TK: logical ids, of any integer type
        place_E: int32, the physical id of each logical expert

    Returns:
        physical ids, contiguous, with the type and shape of `ids_TK`
    """
    ids_TK = ids_TK.contiguous()
    mapped_TK = torch.empty_like(ids_TK)
    if count := ids_TK.numel():
        _map_ids[(triton.cdiv(count, BLOCK),)](ids_TK, place_E, mapped_TK, count, BLOCK=BLOCK, num_warps=4)
    return mapped_TK


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _map_ids(ids: tl.tensor, place: tl.tensor, mapped: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    logical = tl.load(ids + at, mask=here, other=-1).to(tl.int64)
    physical = tl.load(place + logical, mask=here & (logical >= 0), other=0).to(tl.int64)
    tl.store(mapped + at, tl.where(logical >= 0, physical, logical).to(ids.dtype.element_ty), mask=here)
