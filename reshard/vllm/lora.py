"""Refuses LoRA adapters that would change another expert than they were trained for.

An adapter names experts by the original's ids, and adds to the router's logits in the original's order. In an output
both are renumbered. Adapters of other layers, such as attention, work as ever.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..errors import UnsupportedError
from .outputs import is_output
from .patching import replace_if_there

# What is known to be neither an expert nor a router; anything else in an adapter is refused.
_HAS_NO_EXPERTS = re.compile(
    r"(^|\.)(\w*attn\w*|\w*attention\w*|shared_experts?\w*|(\w+_)?embed\w*|lm_head|\w*norm\w*)\."
    r"|\.mlp\.(gate|up|down|gate_up)_proj\."
)


def install(module: ModuleType) -> None:
    """Check each adapter before its tensors are taken; `module` defines vLLM's WorkerLoRAManager."""
    replace_if_there(module.WorkerLoRAManager, "__init__", _with_check)


def require_check(output: str) -> None:
    """UnsupportedError if this vLLM loads adapters without the check."""
    from vllm.lora.worker_manager import WorkerLoRAManager

    if not hasattr(WorkerLoRAManager.__init__, "replaced_by_reshard"):
        raise UnsupportedError(
            f"{output}: reshard cannot check adapters for this output in this vLLM; serve without LoRA, or the original"
        )


def touches_experts(tensor: str) -> bool:
    """Whether an adapter's tensor may change an expert or a router."""
    return "experts" in tensor.split(".") or not _HAS_NO_EXPERTS.search(tensor)


def _with_check(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(manager: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - vLLM's own name
        init(manager, vllm_config, *args, **kwargs)
        if is_output(vllm_config.model_config):
            manager._lora_model_cls = _checking(manager._lora_model_cls, str(vllm_config.model_config.model))

    return __init__


def _checking(adapter: type[Any], output: str) -> type[Any]:
    """A subclass of vLLM's class for an adapter, which refuses tensors of experts and routers."""
    make = adapter.from_lora_tensors
    signature = inspect.signature(make)

    def from_lora_tensors(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
        tensors = signature.bind(*args, **kwargs).arguments["tensors"]
        if found := next(filter(touches_experts, tensors), None):
            raise UnsupportedError(
                f"{output}: this is an output of reshard, whose experts are renumbered, and the adapter's tensor "
                f"{found} may belong to an expert or a router; serve the original with this adapter, or use one of "
                "attention layers only"
            )
        return make.__func__(cls, *args, **kwargs)

    return type(adapter.__name__, (adapter,), {"from_lora_tensors": classmethod(from_lora_tensors)})
