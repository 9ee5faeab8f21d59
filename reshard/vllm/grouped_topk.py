"""Routing by groups on CUDA in one kernel, or by a single group: it takes logits and returns weights and physical ids.

Logits and bias come in physical order (an output) or in logical order (an original that is served with a placement).
The kernel scores groups of logical experts, and computes everything as vLLM does, to the last bit. vLLM has three ways:

    SMALL   vLLM's kernel for few experts: everything in float32
    FUSED   vLLM's kernel for any number of experts: rounds to the logits' dtype at each step, skips what is not finite
    TORCH   the code that PyTorch compiles from vLLM's `grouped_topk` if there is no correction bias

Experts are chosen by value, then by the lower logical id. Values are compared as integers in the same order, which
defines the order of NaN, infinities and zeros too. One program routes one token. Up to 256 experts, it is one warp: it
keeps scores in registers, [groups, members], and a maximum takes a few instructions per lane and one for the warp.

Import this file only where CUDA and Triton are present.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_wait

LANES = 32
# Up to this many tokens we hide the launch: programs start and read what never changes while the previous kernel still
# runs (programmatic dependent launch). With more tokens, they would take GPU resources from that kernel.
MAX_TOKENS_LAUNCHED_EARLY = 64
# Limits of vLLM's kernel for few experts (csrc/libtorch_stable/moe/grouped_topk_kernels.cu). It has one warp per group,
# for eight groups; vLLM does not check for more groups before it calls this kernel.
SMALL_EXPERTS, SMALL_GROUP, SMALL_CANDIDATES, SMALL_GROUPS, SMALL_CHOSEN_GROUPS, SMALL_TOP_K = 256, 32, 128, 8, 4, 8
SMALL_EXPERTS_IN_ONE_GROUP = 512
MAX_EXPERTS = 1024


class Arithmetic(Enum):
    """Which of vLLM's implementations to reproduce; the module's docstring describes them."""

    SMALL = 0
    FUSED = 1
    TORCH = 2


@dataclass(frozen=True, slots=True)
class Summing:
    """The order in which a kernel that PyTorch compiled sums a softmax.

    First it adds blocks of `block` scores to each other, element by element. Then each lane of the `warps` warps adds
    its own elements of the resulting block: adjacent ones if `side_by_side`, else every 32 * `warps`-th. Then it adds
    the lanes of each warp, and last the warps.
    """

    block: int
    warps: int
    side_by_side: bool


def ways_to_sum(num_experts: int) -> list[Summing]:
    """The orders of summing to try for `num_experts` experts, likelier ones first.

    PyTorch compiles one kernel for any number of experts. Its block size fits the first number that it saw, or half of
    it if that is faster. That may be the number of a model served here earlier, as PyTorch caches compiled code.
    """
    whole = triton.next_power_of_2(num_experts)
    return [
        way
        for size in (1024, 512, 256)
        if size <= whole
        for way in (
            Summing(size, size // 128, side_by_side=False),
            Summing(size // 2, size // 128, side_by_side=False),
            Summing(size, size // 128, side_by_side=True),
        )
    ]


@dataclass(frozen=True, slots=True)
class Choice:
    """How to choose `top_k` of E experts from the best `topk_group` of `n_group` groups of logical experts."""

    num_experts: int
    n_group: int
    topk_group: int
    top_k: int
    renormalize: bool
    scale: float
    softmax: Summing | None = None  # how the softmax is summed; None for sigmoid
    biased: bool = True

    @property
    def group_size(self) -> int:
        """Experts per group."""
        return self.num_experts // self.n_group

    @property
    def arithmetic(self) -> Arithmetic | None:
        """Which of vLLM's implementations makes this choice; None if we do not reproduce it or it is undefined."""
        one_group = self.n_group == self.topk_group == 1
        groups_fit = one_group or self.topk_group < self.n_group <= 32
        if not groups_fit or self.num_experts % self.n_group or self.num_experts > MAX_EXPERTS or self.top_k > LANES:
            return None
        if self.softmax and self.num_experts <= 128:
            return None
        if not self.biased:
            return None if self.renormalize or one_group else Arithmetic.TORCH
        if one_group and self.num_experts <= SMALL_EXPERTS_IN_ONE_GROUP:
            return Arithmetic.SMALL if self.top_k <= SMALL_TOP_K else None
        small = self.num_experts <= SMALL_EXPERTS and self.group_size <= SMALL_GROUP and self.top_k <= SMALL_TOP_K
        small &= self.group_size * self.topk_group <= SMALL_CANDIDATES and self.topk_group <= SMALL_CHOSEN_GROUPS
        if small:
            return Arithmetic.SMALL if self.n_group <= SMALL_GROUPS else None
        return Arithmetic.FUSED


def grouped_topk(
    logits_TE: Tensor, bias_E: Tensor | None, place_E: Tensor, choice: Choice, *, logical: bool = False
) -> tuple[Tensor, Tensor]:
    """Choose experts for each token.

    Parameters:
        logits_TE: in physical order; float32, bfloat16 or float16
        bias_E: the correction bias, in physical order; used only if `choice` is biased
        place_E: int32, the physical id of each logical expert
        choice: its `arithmetic` must not be None
        logical: whether logits and bias come in logical order instead

    Returns:
        weights_TK (float32) and physical ids_TK (int32), in vLLM's order
    """
    if logits_TE.stride(1) != 1:
        logits_TE = logits_TE.contiguous()
    tokens = len(logits_TE)
    weights_TK = torch.empty(tokens, choice.top_k, dtype=torch.float32, device=logits_TE.device)
    ids_TK = torch.empty(tokens, choice.top_k, dtype=torch.int32, device=logits_TE.device)
    early = tokens <= MAX_TOKENS_LAUNCHED_EARLY and torch.cuda.get_device_capability(logits_TE.device) >= (9, 0)
    arithmetic = choice.arithmetic
    if tokens:
        _grouped_topk[(tokens,)](
            logits_TE,
            bias_E,
            place_E,
            weights_TK,
            ids_TK,
            logits_TE.stride(0),
            EXPERTS=choice.num_experts,
            GROUPS=choice.n_group,
            CHOSEN_GROUPS=choice.topk_group,
            TOP_K=choice.top_k,
            SCALE=choice.scale,
            SCALE_IS_FLOAT32=choice.scale == struct.unpack("f", struct.pack("f", choice.scale))[0],
            RENORMALIZE=choice.renormalize,
            SMALL=arithmetic is Arithmetic.SMALL,
            TORCH=arithmetic is Arithmetic.TORCH,
            SUM_BLOCK=choice.softmax.block if choice.softmax else 0,
            SUM_WARPS=choice.softmax.warps if choice.softmax else 0,
            SIDE_BY_SIDE=bool(choice.softmax and choice.softmax.side_by_side),
            EARLY=early,
            LOGICAL=logical,
            GROUPS_2=triton.next_power_of_2(choice.n_group),
            MEMBERS_2=triton.next_power_of_2(choice.group_size),
            EXPERTS_2=triton.next_power_of_2(choice.num_experts),
            num_warps=1 if choice.num_experts <= 256 else 4,
            launch_pdl=early,
        )
    return weights_TK, ids_TK


@triton.jit
def _ordered(x: tl.tensor) -> tl.tensor:
    """Map float32 to int32 in the same order, -0 below 0 and NaN above all; applied to its own result, map back."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score(x: tl.tensor, highest: tl.tensor, total: tl.tensor, TORCH: tl.constexpr, SOFTMAX: tl.constexpr) -> tl.tensor:
    if SOFTMAX:
        return libdevice.exp(x - highest) / total
    if TORCH:
        return tl.sigmoid(x)
    return 0.5 * libdevice.tanh(0.5 * x) + 0.5


@triton.jit
def _sum_blocks(x: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Reduce x [SIZE] to [BLOCK] by adding its blocks one after the other."""
    if SIZE > BLOCK:
        blocks = x.reshape([SIZE // BLOCK, BLOCK])
        number = tl.arange(0, SIZE // BLOCK)[:, None]
        x = tl.zeros([BLOCK], tl.float32)
        for block in tl.static_range(SIZE // BLOCK):
            x += tl.sum(tl.where(number == block, blocks, 0.0), axis=0)  # selects one block: the others are 0
    return x


@triton.jit
def _sum_like_torch(
    x: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr, SIDE_BY_SIDE: tl.constexpr
) -> tl.tensor:
    """Sum x [SIZE] in the order that `Summing` describes."""
    lanes = _sum_blocks(x, SIZE, BLOCK)
    if SIDE_BY_SIDE:
        lanes = lanes.reshape([32 * WARPS, BLOCK // (32 * WARPS)]).trans().reshape([BLOCK])
    lanes = _sum_blocks(lanes, BLOCK, 32 * WARPS)
    for step in tl.static_range(5):
        lanes = tl.sum(lanes.reshape([WARPS, 2, 16 >> step]), axis=1)
    warps = lanes.reshape([WARPS])
    if WARPS >= 8:
        warps = tl.sum(warps.reshape([2, 4]), axis=0)
    if WARPS >= 4:
        warps = tl.sum(warps.reshape([2, 2]), axis=0)
    return tl.sum(warps, axis=0)


@triton.jit
def _grouped_topk(
    logits: tl.tensor,
    bias: tl.tensor,
    place: tl.tensor,
    weights: tl.tensor,
    ids: tl.tensor,
    row: tl.tensor,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHOSEN_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_IS_FLOAT32: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SMALL: tl.constexpr,
    TORCH: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    SUM_WARPS: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    EARLY: tl.constexpr,
    LOGICAL: tl.constexpr,
    GROUPS_2: tl.constexpr,
    MEMBERS_2: tl.constexpr,
    EXPERTS_2: tl.constexpr,
) -> None:
    NONE: tl.constexpr = -(2**31)  # below the order of any number
    SOFTMAX: tl.constexpr = SUM_BLOCK > 0
    given: tl.constexpr = logits.dtype.element_ty
    score_dtype: tl.constexpr = tl.float32 if SMALL and not SOFTMAX else given
    value_dtype: tl.constexpr = tl.float32 if SMALL else given
    token = tl.program_id(0).to(tl.int64)
    logits += token * row

    # 1. the value of each expert, in logical order
    group = tl.arange(0, GROUPS_2)
    member = tl.arange(0, MEMBERS_2)
    expert = group[:, None] * (EXPERTS // GROUPS) + member[None, :]
    exists = (group < GROUPS)[:, None] & (member < EXPERTS // GROUPS)[None, :]
    at = expert if LOGICAL else tl.load(place + expert, mask=exists, other=0)
    if not TORCH:
        b = tl.load(bias + at, mask=exists, other=0).to(value_dtype).to(tl.float32)
    if EARLY:
        gdc_wait()  # everything read above this line is constant once the model is loaded
    x = tl.load(logits + at, mask=exists, other=0).to(tl.float32)
    highest = 0.0
    total = 1.0
    if SOFTMAX:
        flat = tl.arange(0, EXPERTS_2)
        flat_at = flat if LOGICAL else tl.load(place + flat, mask=flat < EXPERTS, other=0)
        flat_x = tl.load(logits + flat_at, mask=flat < EXPERTS, other=float("-inf")).to(tl.float32)
        highest = tl.max(flat_x, axis=0)
        powers = tl.where(flat < EXPERTS, libdevice.exp(flat_x - highest), 0.0)
        total = _sum_like_torch(powers, EXPERTS_2, SUM_BLOCK, SUM_WARPS, SIDE_BY_SIDE)
    score = _score(x, highest, total, TORCH, SOFTMAX).to(score_dtype).to(tl.float32)
    value = score if TORCH else (score + b).to(value_dtype).to(tl.float32)
    key = tl.where(exists, _ordered(value), NONE)

    # 2. the value of each group: its best expert's value, or the sum of its two best
    best = tl.max(key, axis=1)
    if TORCH:
        group_key = best
    else:
        is_best = key == best[:, None]
        alone = tl.sum(is_best.to(tl.int32), axis=1) == 1
        second = tl.where(alone, tl.max(tl.where(is_best, NONE, key), axis=1), best)
        sums = _ordered(best).to(tl.float32, bitcast=True) + _ordered(second).to(tl.float32, bitcast=True)
        group_key = tl.where(group < GROUPS, _ordered(sums.to(value_dtype).to(tl.float32)), NONE)

    # 3. the best groups: fewer than CHOSEN_GROUPS other groups rank ahead of them
    ahead = group_key[None, :] > group_key[:, None]
    ahead |= (group_key[None, :] == group_key[:, None]) & (group[None, :] < group[:, None])
    chosen = tl.sum(ahead.to(tl.int32), axis=1) < CHOSEN_GROUPS

    # 4. the best experts in these groups; lane k keeps the k-th. The first loop removes all experts of the top value:
    # so it need not wait for an id. If it removed too many, or found too few, the second chooses again one by one
    eligible = chosen[:, None] & exists
    if not SMALL and not TORCH:
        eligible &= tl.abs(score if SOFTMAX else x) < float("inf")
    key = tl.where(eligible, key, NONE)
    rest = key
    lane = tl.arange(0, 32)
    mine = tl.zeros([32], tl.int32)
    tops = tl.full([32], NONE, tl.int32)
    for k in tl.static_range(TOP_K):
        top = tl.max(rest)
        is_top = rest == top
        mine = tl.where(lane == k, tl.min(tl.where(is_top, expert, EXPERTS)), mine)
        tops = tl.where(lane == k, top, tops)
        rest = tl.where(is_top, NONE, rest)
    if (tl.sum((rest != key).to(tl.int32)) != TOP_K) | (top == NONE):
        for k in tl.static_range(TOP_K):
            top = tl.max(key)
            which = tl.min(tl.where(key == top, expert, EXPERTS))
            if not SMALL:
                which = tl.where(top == NONE, 0, which)  # too few to choose from: logical expert 0 again
            mine = tl.where(lane == k, which, mine)
            tops = tl.where(lane == k, top, tops)
            key = tl.where(expert == which, NONE, key)

    # 5. their weights. vLLM uses float64 here; we need it only where adding 1e-20 changes the sum
    at = tl.load(place + mine)
    score = (
        _score(tl.load(logits + (mine if LOGICAL else at)).to(tl.float32), highest, total, TORCH, SOFTMAX)
        .to(score_dtype)
        .to(tl.float32)
    )
    score = tl.where(lane < TOP_K, score, 0.0)
    if SMALL:
        weight = score * SCALE if SCALE_IS_FLOAT32 else (score.to(tl.float64) * SCALE).to(tl.float32)
        if RENORMALIZE:
            norm = tl.sum(score, axis=0)
            if norm > 0.001:
                weight = tl.div_rn(weight, tl.zeros([32], tl.float32) + norm)
            else:
                weight = (weight.to(tl.float64) / (norm.to(tl.float64) + 1e-20)).to(tl.float32)
    elif RENORMALIZE:
        weight = score * tl.div_rn(tl.full([], SCALE, tl.float32), tl.sum(score, axis=0) + 1e-20)
    else:
        weight = score * SCALE

    # 6. their order: by value, or as torch.topk leaves them: by id, but experts of the lowest value last
    to = lane
    if TORCH:
        last = tops == tl.min(tl.where(lane < TOP_K, tops, 2**31 - 1), axis=0)
        earlier = (last[:, None] & ~last[None, :]) | (
            (last[:, None] == last[None, :]) & (mine[None, :] < mine[:, None])
        )
        to = tl.sum((earlier & (lane < TOP_K)[None, :]).to(tl.int32), axis=1)
    tl.store(weights + token * TOP_K + to, weight, mask=lane < TOP_K)
    tl.store(ids + token * TOP_K + to, at, mask=lane < TOP_K)
