"""Finds vLLM's `MoERunner` modules in a model: one per MoE layer, with its router and its experts."""

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
    """Whether the layer's kernel chooses experts by itself, so that its router is never called."""
    return bool(runner.routed_experts.quant_method.is_monolithic)
