"""How long a step takes under each placement: its MoE layers by the time model, and an estimate of the rest.

Every rank is given all tokens, as vLLM does without all-to-all kernels. If experts have copies, each batch chooses
which of them serve it (`copy_choice`). Times are in seconds. Tensors carry their shape in their name: T tokens, K
experts chosen, E experts, B batches, P slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..model.sizes import ModelSizes
from ..placement.copy_choice import BY_ACTIVE, chosen_by, schedule, serving_slots
from ..placement.permutations import Placement, rank_of_each
from ..placement.steps import Phase, Step, count_experts
from ..placement.time_model import GpuProfile, flops, rank_times

if TYPE_CHECKING:
    from torch import Tensor

MAX_BATCHES = 512  # of each size: their mean is within a tenth of a percent of the mean over all
# Of the rest of a step, per layer: what its kernels take at one token beside reading weights (fitted to decoding one
# sequence with R1's layers on an H200, docs/gpu/placed-step-time.json), one all-reduce of few bytes, and passes over
# the hidden states. The last two and the context are assumed.
LAYER_SECONDS = 60e-6
ALL_REDUCE_SECONDS = 12e-6
ALL_REDUCES, PASSES = 2, 10
CONTEXT = 1024  # tokens that each decoded token attends to
# What maps ids to copies takes per layer beyond the router, and how much of it each token adds: by active experts, by a
# table, and by weight. Measured on an H200 (docs/gpu/copies-time.json).
CHOICE_SECONDS, CHOICE_TOKEN_SECONDS = 4.0e-6, 5.0e-9
MAP_SECONDS = 1.7e-6
WEIGHT_SECONDS, WEIGHT_TOKEN_SECONDS = 28.9e-6, 0.22e-9


@dataclass(frozen=True, slots=True)
class StepTime:
    """The time of one step: `moe` has that of its MoE layers under each strategy, `rest` an estimate of all else."""

    phase: Phase
    tokens: int
    rest: float
    moe: dict[str, float]

    def total(self, strategy: str) -> float:
        """Seconds of the step."""
        return self.rest + self.moe[strategy]

    def share(self, strategy: str) -> float:
        """The part of the step that is its MoE layers'."""
        return self.moe[strategy] / self.total(strategy)


def step_times(
    ids: Mapping[str, Tensor],
    placements: Mapping[str, Placement],
    steps: Iterable[Step],
    ep_size: int,
    sizes: ModelSizes,
    gpu: GpuProfile,
) -> tuple[StepTime, ...]:
    """The time of each step under each placement, the mean over batches.

    Parameters:
        ids: ids_TK of each MoE layer
        placements: by strategy; each has these layers. With copies, an order has more slots than there are experts
        steps: in the order of the result; each of at most T tokens
        ep_size: R
        sizes: of the model
        gpu: R of these compute

    """
    return tuple(
        StepTime(step.phase, step.tokens, rest_time(step, ep_size, sizes, gpu), moe)
        for step in steps
        for moe in [_moe_times(ids, placements, step, ep_size, sizes, gpu)]
    )


def _moe_times(
    ids: Mapping[str, Tensor],
    placements: Mapping[str, Placement],
    step: Step,
    ep_size: int,
    sizes: ModelSizes,
    gpu: GpuProfile,
) -> dict[str, float]:
    """Seconds of all MoE layers of a step, by strategy: each layer's slowest rank."""
    import torch

    moe = dict.fromkeys(placements, 0.0)
    weight = sizes.moe_layers / len(ids)  # a layer without traffic counts as the mean of the others
    for layer, ids_TK in ids.items():
        num_experts = max(next(iter(placements.values()))[layer]) + 1
        count_BE = count_experts(ids_TK, num_experts, step, MAX_BATCHES)
        tokens_B = torch.full((len(count_BE),), step.tokens)
        for name, placement in placements.items():
            order, has_copies = placement[layer], len(placement[layer]) > num_experts
            if has_copies:
                count_BP, rank_P = _of_slots(count_BE, order, ep_size, step.tokens)
            else:
                count_BP, rank_P = count_BE, torch.tensor(rank_of_each(order, ep_size))
            time_BR = rank_times(count_BP, rank_P, ep_size, tokens_B, sizes.expert, gpu)
            moe[name] += (float(time_BR.amax(dim=1).mean()) + has_copies * choice_time(step.tokens)) * weight
    return moe


def _of_slots(count_BE: Tensor, order: Sequence[int], ep_size: int, tokens: int) -> tuple[Tensor, Tensor]:
    """The tokens that each slot computes, count_BP, and its rank, rank_P, if each batch chooses copies."""
    import torch

    slot_BE = serving_slots(count_BE, schedule(order, count_BE.shape[1], ep_size), tokens)
    count_BP = count_BE.new_zeros(len(count_BE), len(order)).scatter_(1, slot_BE, count_BE)
    return count_BP, torch.arange(len(order)) // (len(order) // ep_size)


def choice_time(tokens: int, *, same_tokens: bool = True) -> float:
    """Seconds of a layer in which a batch's ids are mapped to copies, and these chosen before if batches choose.

    `tokens` are those that a rank routes, and `same_tokens` says whether all ranks route the same.
    """
    weight = chosen_by(tokens, same_tokens=same_tokens)
    if weight is None:
        return MAP_SECONDS
    if weight is BY_ACTIVE:
        return CHOICE_SECONDS + CHOICE_TOKEN_SECONDS * tokens
    return WEIGHT_SECONDS + WEIGHT_TOKEN_SECONDS * tokens


def rest_time(step: Step, ep_size: int, sizes: ModelSizes, gpu: GpuProfile) -> float:
    """Estimate what a step takes beside its MoE layers: attention, dense layers, shared experts, all-reduces, the head.

    All of these are taken as shared evenly by R ranks (tensor parallelism). Attention counts as reading a context of
    CONTEXT tokens for each decoded token; in prefill its own part is left out, which grows with the prompts.
    """
    kernels, tokens, hidden = gpu.kernels, step.tokens, sizes.expert.hidden
    read = sizes.rest / ep_size / (gpu.bandwidth * kernels.read_share)
    computed = 2 * sizes.rest_parameters * tokens / ep_size / (flops(gpu, sizes.rest_dtype) * kernels.flops_share)
    row = 2 * hidden * tokens
    sent = ALL_REDUCES * (ALL_REDUCE_SECONDS + 2 * row * (ep_size - 1) / ep_size / gpu.link)
    passed = PASSES * row / (gpu.bandwidth * kernels.rows_share)
    context = CONTEXT * tokens * sizes.kv / min(ep_size, sizes.kv_heads) / (gpu.bandwidth * kernels.read_share)
    of_layer = LAYER_SECONDS + sent + passed + (context if step.phase == "decode" else 0.0)
    return max(read, computed) + sizes.layers * of_layer


def mean_time(times: Sequence[StepTime], strategy: str, base: str) -> float:
    """The mean over steps of a step's time under `strategy`, over its time under `base`."""
    return sum(step.total(strategy) / step.total(base) for step in times) / len(times)
