"""Checks a loaded original against its placement: it serves only if every MoE layer follows the placement."""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import UnsupportedError
from ..placement.layer_names import find_layer, layer_key
from .placed import Placed
from .placed_weights import Filling
from .runners import foreign_part, lets_kernel_route, moe_runners
from .served import ServedPlacement

EXPERT_WEIGHTS = "w13_"  # prefix of experts' parameters, in whichever module holds them


def check_filled(model: Any, served: ServedPlacement, *, is_draft: bool, pipelined: bool, dummy: bool) -> int:
    """Raise UnsupportedError unless every MoE layer of `model` holds its experts where its router expects them.

    Call this after the weights are loaded, and before vLLM processes them for its kernels.

    Parameters:
        model: the whole model, or a draft model
        served: the placement
        is_draft: whether `model` is a draft; its layers may be linear, if both router and experts are
        pipelined: whether other ranks hold other layers
        dummy: whether weights are random, so that nothing was loaded

    Returns:
        the number of placed layers
    """
    runners = moe_runners(model)
    placed = {name: runner for name, runner in runners.items() if isinstance(runner.router, Placed)}
    for name, runner in runners.items():
        if fault := _unknown(runner) or (None if is_draft else _misfit(runner, served)):
            raise _refusal(served, f"layer {name}: {fault}")
        filling: Filling | None = runner.routed_experts.__dict__.get("reshard_filling")
        if (name in placed) != (filling is not None):
            raise _refusal(served, f"layer {name}: only one of its router and its experts is placed")
        experts = runner.routed_experts.global_num_experts
        if filling is None and not (is_draft and served.order(name, experts, draft=True) is None):
            raise _refusal(served, f"layer {name} has a router that create_fused_moe_router did not make")
        if filling is not None and not dummy and (fault := filling.fault(runner.routed_experts)):
            raise _refusal(served, f"layer {name}: {fault}")
    known = {id(runner.routed_experts) for runner in runners.values()}
    for name, module in model.named_modules():
        holds = any(parameter.startswith(EXPERT_WEIGHTS) for parameter, _ in module.named_parameters(recurse=False))
        if holds and id(module) not in known:
            raise _refusal(served, f"{name}: its {type(module).__name__} places experts by itself")
    if not is_draft:
        _check_layers(served, without_experts_suffix(list(placed)), pipelined=pipelined)
    for runner in placed.values():
        runner.routed_experts.reshard_filling.forget()
    return len(placed)


def check_kernels(model: Any, served: ServedPlacement, ep_size: int) -> set[str]:
    """Raise UnsupportedError if a layer's kernel routes by itself, or finds a rank's experts in its own way.

    Call this after vLLM processed the weights: only then do its kernels exist. Returns the kernels' names for the log,
    as vLLM may choose another kernel than for a linear model: it cannot use one that routes by itself.
    """
    names = set()
    for name, runner in moe_runners(model).items():
        if not isinstance(runner.router, Placed):
            continue
        if foreign := foreign_part(runner):
            raise _foreign(served, name, foreign)
        method = runner.routed_experts.quant_method
        if lets_kernel_route(runner):
            raise _refusal(served, f"layer {name} lets its kernel {type(method).__name__} route by itself")
        experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
        if runner.routed_experts.global_num_experts % ep_size and counts_by_rank(type(experts)):
            raise _refusal(
                served,
                f"layer {name}: {runner.routed_experts.global_num_experts} experts cannot be divided evenly among "
                f"{ep_size} EP ranks, and {type(experts).__name__} assumes that they are",
            )
        names.add(type(method if experts is None else experts).__name__)
    return names


def refuse_foreign_parts(model: Any, served: ServedPlacement) -> None:
    """UnsupportedError if another package than vLLM defines a MoE layer of `model` or a part of one.

    For models with EPLB, whose routers are vLLM's own.
    """
    for name, runner in moe_runners(model).items():
        if foreign := foreign_part(runner):
            raise _foreign(served, name, foreign)


def counts_by_rank(kernel: type) -> bool:
    """Whether a kernel computes a rank's first expert as rank times experts per rank; we search its source code."""
    for base in kernel.__mro__:
        if "fused_moe" not in base.__module__ or base.__module__.endswith("modular_kernel"):
            continue
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):
            return True
        if "ep_rank" in source:
            return True
    return False


def _unknown(runner: Any) -> str | None:
    """Describe why a layer cannot be checked: its model builds it from parts of its own; None if it can."""
    try:
        _ = runner.moe_config.moe_parallel_config.ep_size, runner.routed_experts.global_num_experts
    except AttributeError as error:
        return f"reshard does not know how it is built ({error})"
    return None


def _misfit(runner: Any, served: ServedPlacement) -> str | None:
    """Describe why the placement does not fit a layer; None if it does."""
    if (ep_size := runner.moe_config.moe_parallel_config.ep_size) != served.ep_size:
        return f"vLLM spreads it over {ep_size} EP ranks, the placement is for {served.ep_size}"
    if type(runner.routed_experts).__name__ == "SubstitutedRoutedExperts":
        return "it substitutes experts"
    return None


def _check_layers(served: ServedPlacement, placed: list[str], *, pipelined: bool) -> None:
    """Raise UnsupportedError if the placement has a layer that is none of the model's, or has one twice."""
    if not placed and not pipelined:
        raise _refusal(served, "vLLM made no MoE layer that can be placed")
    used = {find_layer(name, served["layers"], served.num_layers) for name in placed}
    for layer in served["layers"]:
        if layer in used or layer_key(layer, served.num_layers).kind == "draft":
            continue
        if (other := find_layer(layer, placed, served.num_layers)) is not None:
            raise UnsupportedError(f"{served.asked}: layer {layer} is {other}, which has another name there as well")
        if not pipelined:
            raise UnsupportedError(f"{served.asked}: layer {layer} is no MoE layer of this model; {served['make']}")


def without_experts_suffix(names: list[str]) -> list[str]:
    """vLLM's layer names without the `.experts` at the end."""
    return [name.removesuffix(".experts") for name in names]


def _foreign(served: ServedPlacement, layer: str, foreign: str) -> UnsupportedError:
    return _refusal(served, f"layer {layer}: a part of it is not vLLM's own ({foreign})")


def _refusal(served: ServedPlacement, fault: str) -> UnsupportedError:
    return UnsupportedError(
        f"{served.asked}: {fault}, so this model cannot be served with a placement; serve it without one, or with "
        "other options"
    )
