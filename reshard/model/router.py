"""Runs a router on hidden states with PyTorch: which experts it chooses, and with which weights.

A plain version of what the families' own code does, for `verify` to compare a checkpoint's routers before and after. It
computes in float64 and sums each logit separately, so that a gate row gives the same bits in any position. Tensors
carry their shape in their name: T tokens, H hidden size, E experts, G groups, M experts in a group, K experts chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..checkpoint.files import Files
from ..checkpoint.header import Tensor as Located
from ..checkpoint.header import build_header
from .families import ROUTER_TENSORS, Role
from .layers import MoeLayer
from .routing import Routing

if TYPE_CHECKING:
    from torch import Tensor, dtype


@dataclass(frozen=True, slots=True)
class Router:
    """A layer's router tensors.

    `logit_bias_E` is added to the logits, `correction_E` to the scores for ranking; a chosen expert's weight is
    multiplied with `weight_scale_E`.
    """

    weight_EH: Tensor
    logit_bias_E: Tensor | None
    correction_E: Tensor | None
    weight_scale_E: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """The experts chosen for each token, best first. `tied_T`: true if a chosen expert ties with the next in rank."""

    experts_TK: Tensor
    weights_TK: Tensor
    tied_T: Tensor


def route(hidden_TH: Tensor, router: Router, routing: Routing, group_order: Sequence[int] | None = None) -> Chosen:
    """Choose experts for each token.

    Parameters:
        hidden_TH: float64
        router: the tensors of a layer, in any order of experts
        routing: how to choose
        group_order: physical_to_logical [E] if the tensors are in physical order but groups are ranges of logical
            experts; None if groups are ranges of experts in the tensors' own order

    Returns:
        the chosen experts; an id is a row of the given tensors

    """
    import torch

    logits_TE = torch.stack([(router.weight_EH * hidden_H).sum(dim=1) for hidden_H in hidden_TH])
    if router.logit_bias_E is not None:
        logits_TE = logits_TE + router.logit_bias_E
    chosen = choose(logits_TE, router.correction_E, routing, group_order)
    if router.weight_scale_E is None:
        return chosen
    return replace(chosen, weights_TK=chosen.weights_TK * router.weight_scale_E[chosen.experts_TK])


def choose(
    logits_TE: Tensor, correction_E: Tensor | None, routing: Routing, group_order: Sequence[int] | None = None
) -> Chosen:
    """Choose experts from each token's logits; the other parameters and the result are as in `route`."""
    import torch

    scores_TE = _scores(logits_TE, routing.scoring)
    ranking_TE = scores_TE if correction_E is None else scores_TE + correction_E
    order_E = torch.arange(routing.num_experts)
    if group_order is not None:
        # order_E[e]: the row of logical expert e
        order_E[torch.tensor(group_order)] = torch.arange(routing.num_experts)
    ranking_TE = ranking_TE[:, order_E]
    if routing.group_limited:
        ranking_TE = _mask_groups(ranking_TE, routing, best_two=correction_E is not None)
    ranked_TE = ranking_TE.sort(dim=1, descending=True, stable=True)
    chosen_TK = ranked_TE.indices[:, : routing.top_k]
    top_scores = ranked_TE.values[:, : routing.top_k + 1]  # the chosen experts' and the next one's
    tied_T = (top_scores[:, 1:] == top_scores[:, :-1]).any(dim=1)
    experts_TK = order_E[chosen_TK]
    return Chosen(experts_TK, _weights(scores_TE.gather(1, experts_TK), routing), tied_T)


def read_routers(layer: MoeLayer, load: Callable[[str], Tensor], wanted: dtype) -> Iterator[Router]:
    """Yield the layer's router once for each correction bias it has, or once; `load` reads a tensor by its name."""
    by_role: dict[Role, list[Tensor]] = {role: [] for role in Role}
    for tensor in layer.router:
        known = ROUTER_TENSORS[tensor.name.removeprefix(f"{layer.name}.")]
        value = load(tensor.name).to(wanted)
        shape = tensor.shape if known.role is Role.LOGITS else (-1,)  # an output's gate may have one dimension
        by_role[known.role].append(value.reshape(shape))
    (weight,) = by_role[Role.LOGITS]
    logit_bias, weight_scale = (next(iter(by_role[role]), None) for role in (Role.LOGIT_BIAS, Role.WEIGHT_SCALE))
    corrections: list[Tensor | None] = [*by_role[Role.CORRECTION]]
    for correction in corrections or [None]:
        yield Router(weight, logit_bias, correction, weight_scale)


def load_tensor(files: Files, tensor: Located) -> Tensor:
    """Read a tensor, of any dtype that PyTorch has."""
    from safetensors.torch import load

    data = files.read(tensor.file, tensor.offset, tensor.size)
    return load(build_header([tensor], {}) + data)[tensor.name]


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
        case _:  # "… of the chosen": ranks logits, and scores only the chosen experts
            return logits_TE


def _mask_groups(ranking_TE: Tensor, routing: Routing, *, best_two: bool) -> Tensor:
    """Set -inf outside each token's best groups. A group's score is its best expert's, or the sum of its two best."""
    tokens = len(ranking_TE)
    grouped_TGM = ranking_TE.view(tokens, routing.n_group, -1)
    counted = min(2 if best_two else 1, grouped_TGM.shape[2])
    group_scores_TG = grouped_TGM.topk(counted, dim=2).values.sum(dim=2)
    best_TG = group_scores_TG.sort(dim=1, descending=True, stable=True).indices[:, : routing.topk_group]
    keep_TG = ranking_TE.new_zeros(tokens, routing.n_group).scatter(1, best_TG, 1.0).bool()
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
