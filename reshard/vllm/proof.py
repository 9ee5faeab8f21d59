"""The last look at an original that is served placed: it serves only where every layer is as it was placed."""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import UnsupportedError
from ..placement.layer_names import find_layer, layer_key
from .placed import Placed
from .placed_weights import Filling
from .runners import lets_kernel_route, moe_runners
from .served import ServedPlacement

EXPERT_WEIGHTS = "w13_"  # how the names of experts' parameters begin, whatever holds them


def check_filled(model: Any, served: ServedPlacement, *, is_draft: bool, pipelined: bool, dummy: bool) -> int:
    """UnsupportedError unless the experts of every MoE layer of `model` are where their router says.

    To be called when weights are loaded, and not yet processed for the kernel.

    Parameters:
        model: the whole model, or a draft's
        served: what was asked for
        is_draft: a draft's layers may have been left linear, router and experts both
        pipelined: whether other ranks hold other layers
        dummy: whether weights are random, and nothing was loaded

    Returns:
        how many layers are placed
    """
    runners = moe_runners(model)
    placed = {name: runner for name, runner in runners.items() if isinstance(runner.router, Placed)}
    for name, runner in runners.items():
        if (fault := _misfit(runner, served)) and not is_draft:
            raise _refuse(served, f"layer {name}: {fault}")
        filling: Filling | None = runner.routed_experts.__dict__.get("reshard_filling")
        if (name in placed) != (filling is not None):
            raise _refuse(served, f"layer {name}: only one of its router and its experts is placed")
        experts = runner.routed_experts.global_num_experts
        if filling is None and not (is_draft and served.order(name, experts, draft=True) is None):
            raise _refuse(served, f"layer {name} has a router that vLLM's factory did not make")
        if filling is not None and not dummy and (fault := filling.fault(runner.routed_experts)):
            raise _refuse(served, f"layer {name}: {fault}")
    known = {id(runner.routed_experts) for runner in runners.values()}
    for name, module in model.named_modules():
        holds = any(parameter.startswith(EXPERT_WEIGHTS) for parameter, _ in module.named_parameters(recurse=False))
        if holds and id(module) not in known:
            raise _refuse(served, f"{name}: its {type(module).__name__} places experts by itself")
    if not is_draft and not pipelined:
        _check_none_is_absent(served, list(placed))
    for runner in placed.values():
        runner.routed_experts.reshard_filling.forget()
    return len(placed)


def check_kernels(model: Any, served: ServedPlacement, ep_size: int) -> set[str]:
    """UnsupportedError where a layer's kernel would route by itself, or count experts in another way than vLLM.

    To be called when weights have been processed: then vLLM has made its kernels. Returns their names, for the log:
    with a kernel that routes by itself left out, vLLM may have taken another than it does for a linear model.
    """
    names = set()
    for name, runner in moe_runners(model).items():
        if not isinstance(runner.router, Placed):
            continue
        method = runner.routed_experts.quant_method
        if lets_kernel_route(runner):
            raise _refuse(served, f"layer {name} lets its kernel {type(method).__name__} route by itself")
        experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
        if runner.routed_experts.global_num_experts % ep_size and counts_by_rank(type(experts)):
            raise _refuse(
                served,
                f"layer {name}: {runner.routed_experts.global_num_experts} experts are not the same number on "
                f"{ep_size} EP ranks, and {type(experts).__name__} takes that for granted",
            )
        names.add(type(method if experts is None else experts).__name__)
    return names


def counts_by_rank(kernel: type) -> bool:
    """Whether a kernel takes a rank's number times its number of experts for its first expert, as its source tells."""
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


def _misfit(runner: Any, served: ServedPlacement) -> str | None:
    """Why a layer is another than the placement was resolved for, in words; None where it is not."""
    if (ep_size := runner.moe_config.moe_parallel_config.ep_size) != served.ep_size:
        return f"vLLM spreads it over {ep_size} EP ranks, the placement is for {served.ep_size}"
    if type(runner.routed_experts).__name__ == "SubstitutedRoutedExperts":
        return "it substitutes experts"
    return None


def _check_none_is_absent(served: ServedPlacement, placed: list[str]) -> None:
    if not placed:
        raise _refuse(served, "vLLM made no MoE layer that can be placed")
    for layer in served["layers"]:
        is_own = layer_key(layer, served.num_layers).kind == "layer"
        if is_own and find_layer(layer, placed_names(placed), served.num_layers) is None:
            raise UnsupportedError(f"{served.asked}: layer {layer} is no MoE layer of this model; {served['make']}")


def placed_names(names: list[str]) -> list[str]:
    """vLLM's names without the `.experts` at the end."""
    return [name.removesuffix(".experts") for name in names]


def _refuse(served: ServedPlacement, fault: str) -> UnsupportedError:
    return UnsupportedError(
        f"{served.asked}: {fault}, so it cannot be served placed; serve it without a placement, or with other options"
    )
