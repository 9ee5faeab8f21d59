"""A model's MoE layers in vLLM: finds their `MoERunner` modules, and keeps their kernels from routing by themselves."""

from __future__ import annotations

from typing import Any


def moe_runners(model: Any) -> dict[str, Any]:
    """The MoERunner of each MoE layer, by the layer's name in vLLM (`model.layers.3.mlp.experts`)."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "router") and hasattr(module, "routed_experts")
    }


def lets_kernel_route(runner: Any) -> bool:
    """Whether the layer's kernel chooses experts by itself, so that its router is never called; True if unknown."""
    return bool(getattr(getattr(runner.routed_experts, "quant_method", None), "is_monolithic", True))


class RoutesItself:
    """A mixin before a router's own class: vLLM then picks no kernel that would route from the logits by itself."""

    @property
    def routing_method_type(self) -> Any:
        """`Unspecified`: no kernel can do this routing."""
        from vllm.model_executor.layers.fused_moe.config import RoutingMethodType

        return RoutingMethodType.Unspecified

    @property
    def supports_monolithic_kernels(self) -> bool:
        """Always False: such a kernel routes by itself, by other groups or to other slots."""
        return False


def foreign_part(runner: Any) -> str | None:
    """The class of the layer, or of a part of it, that another package than vLLM defines; None if vLLM has them all.

    Platform plugins replace such classes, and theirs may route in their own way. Our own subclasses do not count.
    """
    experts = runner.routed_experts
    for part in (runner, runner.router, experts, getattr(experts, "quant_method", experts)):
        own = next(base for base in type(part).__mro__ if not issubclass(base, RoutesItself))
        if not own.__module__.startswith("vllm."):
            return f"{own.__module__}.{own.__qualname__}"
    return None
