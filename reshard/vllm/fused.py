"""The kernel in a router's place, once it was seen to choose as that router does.

The kernel reproduces bits that vLLM promises to nobody. So the first batch of every layer, before CUDA graphs are
captured, goes both ways, and so do random logits with ties and infinities among them; only where not one bit differs
does the kernel route from then on. Elsewhere vLLM's own router goes on, with gathers around it.

Each dtype is looked at for itself: DeepSeek's gates give float32 for up to 16 tokens and bfloat16 for more. So is a
single token, for which PyTorch compiles a router of its own where that is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from .grouped_topk import Choice

TRIAL_ROWS = 1024
TRIAL_SINGLE_ROWS = 33  # each alone
Route = Callable[["Tensor"], tuple["Tensor", "Tensor"]]


@dataclass
class Fused:
    """The kernel, for one layer. `place_E` is the physical id of each logical expert, int32."""

    choices: tuple[Choice, ...]  # what the router may be doing; the first that agrees is taken
    place_E: Tensor
    layer: str
    logical: bool = False  # whether the router is given logits and bias in logical order
    agreed: dict[tuple[Any, bool], Choice | None] = field(default_factory=dict)  # by dtype, and whether of one token

    def route(self, logits_TE: Tensor, bias_E: Tensor | None, router: Route) -> tuple[Tensor, Tensor]:
        """Weights and physical ids: by the kernel if it was seen to agree with `router`, else by `router`."""
        import torch

        from .grouped_topk import grouped_topk

        kind = logits_TE.dtype, len(logits_TE) == 1
        if kind not in self.agreed and len(logits_TE) and not torch.cuda.is_current_stream_capturing():
            trials = [(rows_TE, router(rows_TE)) for rows_TE in (logits_TE, *trial_logits(logits_TE))]
            self.agreed[kind] = next(
                (
                    choice
                    for choice in self.choices
                    if all(
                        same(grouped_topk(rows, bias_E, self.place_E, choice, logical=self.logical), found)
                        for rows, found in trials
                    )
                ),
                None,
            )
            self._say(kind)
        choice = self.agreed.get(kind)
        if choice is None:
            return router(logits_TE)
        return grouped_topk(logits_TE, bias_E, self.place_E, choice, logical=self.logical)

    def _say(self, kind: tuple[Any, bool]) -> None:
        from vllm.logger import init_logger

        logger, (dtype, single) = init_logger("vllm.plugins.reshard"), kind
        logits = f"{str(dtype).removeprefix('torch.')} logits{' of one token' if single else ''}"
        if self.agreed[kind]:
            logger.info_once("routers: one kernel for %s, seen to choose as vLLM's own, bit for bit", logits)
        else:
            logger.warning_once(
                "routers: vLLM's own with gathers around it for %s, as reshard's kernel differs from it there (first "
                "seen in %s); answers are right, routing takes some microseconds more",
                logits,
                self.layer,
            )


def trial_logits(like_TE: Tensor) -> list[Tensor]:
    """Random logits for as many experts and of that dtype: many at once, or one by one if `like_TE` is of one token.

    A third of the rows has many ties, a third infinities too.
    """
    import torch

    rows, together = (TRIAL_SINGLE_ROWS, 1) if len(like_TE) == 1 else (TRIAL_ROWS, TRIAL_ROWS)
    shape = rows, like_TE.shape[1]
    generator = torch.Generator(like_TE.device).manual_seed(0)
    trial_TE = torch.randn(shape, device=like_TE.device, generator=generator)
    trial_TE[1::3] = trial_TE[1::3].round(decimals=0) / 2
    infinite_TE = torch.rand(shape, device=like_TE.device, generator=generator) < 0.1
    trial_TE[2::3].masked_fill_(infinite_TE[2::3], float("-inf"))
    trial_TE = trial_TE.to(like_TE.dtype)
    return [trial_TE[first : first + together] for first in range(0, rows, together)]


def same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    """Whether weights and ids are the same, bit for bit; any NaN is as good as another."""
    import torch

    (weights, ids), (expected_weights, expected_ids) = one, other
    if weights.dtype != expected_weights.dtype or weights.shape != expected_weights.shape:
        return False
    both_nan = weights.isnan() & expected_weights.isnan()
    bits = (weights.view(torch.int32) == expected_weights.view(torch.int32)) | both_nan
    return bool(bits.all()) and torch.equal(ids.to(expected_ids.dtype), expected_ids)


def fused_in_place_of(router: Any, physical_of_logical_E: Tensor, layer: str, *, logical: bool = False) -> Fused | None:
    """The kernel for the layer that `router` was made for, None where there is none for what it does.

    `logical`: the router's logits and bias are in logical order, as in an original that is served placed.
    """
    import torch

    on_cuda = physical_of_logical_E.is_cuda and torch.version.hip is None
    if not on_cuda or type(router).__name__ != "GroupedTopKRouter" or getattr(router, "skip_padding", False):
        return None
    from .grouped_topk import Choice, ways_to_sum

    choices = [
        Choice(
            num_experts=len(physical_of_logical_E),
            n_group=router.num_expert_group,
            topk_group=router.topk_group,
            top_k=router.top_k,
            renormalize=router.renormalize,
            scale=router.routed_scaling_factor,
            softmax=softmax,
            biased=router.e_score_correction_bias is not None,
        )
        for softmax in (ways_to_sum(len(physical_of_logical_E)) if router.scoring_func == "softmax" else [None])
    ]
    if router.scoring_func not in ("sigmoid", "softmax") or choices[0].arithmetic is None:
        return None
    return Fused(tuple(choices), physical_of_logical_E.to(torch.int32), layer, logical)
