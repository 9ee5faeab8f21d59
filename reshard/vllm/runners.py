"""What vLLM makes of a model's MoE layers."""

from __future__ import annotations

from typing import Any


def moe_runners(model: Any) -> dict[str, Any]:
    """What vLLM makes of each MoE layer, its router among it, by name (`model.layers.3.mlp.experts`)."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "router") and hasattr(module, "routed_experts")
    }


def lets_kernel_route(runner: Any) -> bool:
    """Whether a layer's kernel chooses by itself, and its router is never asked."""
    return bool(runner.routed_experts.quant_method.is_monolithic)
