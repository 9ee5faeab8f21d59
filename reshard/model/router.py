"""A router, run on hidden states with PyTorch: which experts it chooses and with which weights.

A plain statement of what the families' own code does, for `verify` to compare a checkpoint's routers before and after.
Everything is computed in float64, each logit as its own sum, so that equal rows give equal bits wherever they stand.
Tensors carry their shape in their name: T tokens, H hidden size, E experts, G groups, K experts chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .layers import MoeLayer
from .routing import Routing

if TYPE_CHECKING:
    from torch import Tensor, dtype


@dataclass(frozen=True, slots=True)
class Router:
    """A layer's router tensors: `logit_bias_E` is added to the logits, `correction_E` only to what is compared."""

    weight_EH: Tensor
    logit_bias_E: Tensor | None
    correction_E: Tensor | None


@dataclass(frozen=True, slots=True)
class Choice:
    """The experts chosen for each token, best first; `tied_T` where one of them was no better than the next best."""

    experts_TK: Tensor
    weights_TK: Tensor
    tied_T: Tensor


def route(hidden_TH: Tensor, router: Router, routing: Routing, group_order: Sequence[int] | None = None) -> Choice:
    """Choose experts for each token.

    Parameters:
        hidden_TH: float64
        router: the tensors of a layer, in any order of experts
        routing: how to choose
        group_order: [E] physical_to_logical where groups are runs of logical experts but the tensors are in physical
            order; None where the tensors are in the order that groups are runs of

    Returns:
        expert ids in the order of the tensors

    """
    import torch

    logits_TE = torch.stack([(router.weight_EH * hidden_H).sum(dim=1) for hidden_H in hidden_TH])
    if router.logit_bias_E is not None:
        logits_TE = logits_TE + router.logit_bias_E
    return choose(logits_TE, router.correction_E, routing, group_order)


def choose(
    logits_TE: Tensor, correction_E: Tensor | None, routing: Routing, group_order: Sequence[int] | None = None
) -> Choice:
    """Choose experts by the logits of each token; the other parameters and what comes back are those of `route`."""
    import torch

    scores_TE = _scores(logits_TE, routing.scoring)
    compared_TE = scores_TE if correction_E is None else scores_TE + correction_E
    order_E = torch.arange(routing.num_experts)
    if group_order is not None:
        # order_E[e]: where logical expert e stands
        order_E[torch.tensor(group_order)] = torch.arange(routing.num_experts)
    compared_TE = compared_TE[:, order_E]
    if routing.group_limited:
        compared_TE = _mask_groups(compared_TE, routing, best_two=correction_E is not None)
    ranked_TE = compared_TE.sort(dim=1, descending=True, stable=True)
    chosen_TK = ranked_TE.indices[:, : routing.top_k]
    compared = ranked_TE.values[:, : routing.top_k + 1]
    tied_T = (compared[:, 1:] == compared[:, :-1]).any(dim=1)
    experts_TK = order_E[chosen_TK]
    return Choice(experts_TK, _weights(scores_TE.gather(1, experts_TK), routing), tied_T)


def read_routers(layer: MoeLayer, files: Mapping[str, Path], wanted: dtype) -> Iterator[Router]:
    """The layer's router, once for each correction bias it may be used with; `files` says where its tensors are."""
    from safetensors import safe_open

    tensors = {}
    for tensor in layer.router:
        with safe_open(files[tensor.name], framework="pt") as file:
            leaf = tensor.name.removeprefix(f"{layer.name}.")
            tensors[leaf] = file.get_tensor(tensor.name).to(wanted)
    weight = tensors.pop("gate.weight", None)
    if weight is None:
        weight = tensors.pop("router.weight")
    logit_bias = tensors.pop("router.bias", None)
    for correction in tensors.values() or [None]:
        yield Router(weight, logit_bias, correction)


def _scores(logits_TE: Tensor, scoring: str) -> Tensor:
    import torch

    match scoring:
        case "softmax":
            # summed in sorted order, so that the bits do not depend on the order of the experts
            exp_TE = (logits_TE - logits_TE.amax(dim=1, keepdim=True)).exp()
            return exp_TE / exp_TE.sort(dim=1).values.sum(dim=1, keepdim=True)
        case "sigmoid":
            return logits_TE.sigmoid()
        case "sqrtsoftplus":
            return torch.nn.functional.softplus(logits_TE).sqrt()
        case _:  # "… of the chosen": logits are compared, scores are of what was chosen
            return logits_TE


def _mask_groups(compared_TE: Tensor, routing: Routing, *, best_two: bool) -> Tensor:
    """-inf outside each token's best groups; a group's score is its best expert's, or the sum of its two best."""
    tokens = len(compared_TE)
    grouped_TGM = compared_TE.view(tokens, routing.n_group, -1)
    counted = min(2 if best_two else 1, grouped_TGM.shape[2])
    group_scores_TG = grouped_TGM.topk(counted, dim=2).values.sum(dim=2)
    best_TG = group_scores_TG.sort(dim=1, descending=True, stable=True).indices[:, : routing.topk_group]
    keep_TG = compared_TE.new_zeros(tokens, routing.n_group).scatter(1, best_TG, 1.0).bool()
    return grouped_TGM.masked_fill(~keep_TG.unsqueeze(2), float("-inf")).view(tokens, -1)


def _weights(chosen_TK: Tensor, routing: Routing) -> Tensor:
    match routing.scoring:
        case "softmax of the chosen":
            return chosen_TK.softmax(dim=1)
        case "sigmoid of the chosen":
            return chosen_TK.sigmoid()
    if routing.norm_topk_prob:
        chosen_TK = chosen_TK / chosen_TK.sum(dim=1, keepdim=True)
    return chosen_TK * routing.routed_scaling_factor
