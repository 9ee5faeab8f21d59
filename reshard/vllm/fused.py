"""Replaces a layer's router by one fused kernel, after checking that both choose the same, bit for bit.

The kernel reproduces bits that vLLM does not guarantee. So before CUDA graphs are captured, each layer's first batch
goes through both the kernel and vLLM's router, and so do random logits with ties and infinities. If every bit agrees,
the kernel routes from then on. Otherwise vLLM's own router stays, with gathers around it.

Each dtype is checked separately, as DeepSeek's gates return float32 for up to 16 tokens and bfloat16 for more. A single
token is checked separately too, as PyTorch may compile a separate router for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from .grouped_topk import Choice

# What vLLM 0.26 to 0.33 keep in a GroupedTopKRouter. No kernel replaces a router that has more, such as `skip_padding`.
KNOWN_ATTRIBUTES = (
    *("top_k", "global_num_experts", "num_expert_group", "topk_group", "renormalize", "scoring_func"),
    *("routed_scaling_factor", "e_score_correction_bias", "num_fused_shared_experts"),
    *("eplb_state", "enable_eplb", "indices_type_getter", "capture_fn", "_routing_replay_out"),
)
# Arguments of a call that change nothing: only routers with a hash table read the tokens' ids.
KNOWN_IN_A_CALL = ("indices_type", "topk_indices_dtype", "input_ids")
TRIAL_ROWS = 1024
TRIAL_SINGLE_ROWS = 33  # routed one at a time
Route = Callable[["Tensor"], tuple["Tensor", "Tensor"]]


@dataclass
class Fused:
    """The kernel of one layer. `place_E` is the physical id of each logical expert, int32."""

    choices: tuple[Choice, ...]  # candidates for what vLLM's router does; the first that agrees with it is used
    place_E: Tensor
    layer: str
    logical: bool = False  # whether logits and bias come in logical order
    agreed: dict[tuple[Any, bool], Choice | None] = field(default_factory=dict)  # key: dtype, whether one token

    def route(self, logits_TE: Tensor, bias_E: Tensor | None, router: Route) -> tuple[Tensor, Tensor]:
        """Return weights and physical ids: from the kernel if it agreed with `router`, else from `router`."""
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
                        same_bits(grouped_topk(rows, bias_E, self.place_E, choice, logical=self.logical), found)
                        for rows, found in trials
                    )
                ),
                None,
            )
            self._log(kind)
        choice = self.agreed.get(kind)
        if choice is None:
            return router(logits_TE)
        return grouped_topk(logits_TE, bias_E, self.place_E, choice, logical=self.logical)

    def _log(self, kind: tuple[Any, bool]) -> None:
        from vllm.logger import init_logger

        logger, (dtype, single) = init_logger("vllm.plugins.reshard"), kind
        logits = f"{str(dtype).removeprefix('torch.')} logits{' of one token' if single else ''}"
        if self.agreed[kind]:
            logger.info_once("routers: one kernel for %s; it agreed with vLLM's own router bit for bit", logits)
        else:
            logger.warning_once(
                "routers: vLLM's own with gathers around it for %s, because reshard's kernel differs from it (first in "
                "layer %s); answers are right, routing takes a few microseconds longer",
                logits,
                self.layer,
            )


def set_names(values: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    """The names in `values`, other than the `known` ones, that have a value: not None, False or 0."""
    return [
        name
        for name, value in values.items()
        if name not in known and value is not None and not (isinstance(value, (bool, int, float)) and not value)
    ]


def understood(more: Sequence[Any], named: Mapping[str, Any]) -> bool:
    """Whether the kernel does what a router does that is called with these further arguments."""
    return not any(value is not None for value in more) and not set_names(named, KNOWN_IN_A_CALL)


def trial_logits(like_TE: Tensor) -> list[Tensor]:
    """Random logits with the dtype and number of experts of `like_TE`, as batches of rows.

    They come as one batch, or one row at a time if `like_TE` has a single row. A third of the rows has many ties, and
    another third has infinities.
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


def same_bits(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    """Whether weights and ids are equal bit for bit; any NaN equals any other."""
    import torch

    (weights, ids), (expected_weights, expected_ids) = one, other
    if weights.dtype != expected_weights.dtype or weights.shape != expected_weights.shape:
        return False
    both_nan = weights.isnan() & expected_weights.isnan()
    bits = (weights.view(torch.int32) == expected_weights.view(torch.int32)) | both_nan
    return bool(bits.all()) and torch.equal(ids.to(expected_ids.dtype), expected_ids)


def fused_in_place_of(router: Any, physical_of_logical_E: Tensor, layer: str, *, logical: bool = False) -> Fused | None:
    """The kernel that can replace `router` in `layer`; None if no kernel does what this router does.

    `logical`: logits and bias come in logical order, as in an original that is served with a placement.
    """
    import torch

    on_cuda = physical_of_logical_E.is_cuda and torch.version.hip is None
    if not on_cuda or type(router).__name__ != "GroupedTopKRouter" or set_names(vars(router), KNOWN_ATTRIBUTES):
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
