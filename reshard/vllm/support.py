"""Which vLLM this plugin fits: the versions that were read, with the functions it needs where they were."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

from ..errors import UnsupportedError

OLDEST, NEWEST = (0, 26), (0, 33)
ROUTER_ARGUMENTS = (
    "top_k",
    "global_num_experts",
    "use_grouped_topk",
    "num_expert_group",
    "topk_group",
    "e_score_correction_bias",
    "custom_routing_function",
    "num_fused_shared_experts",
)


VERSIONS = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
# What an original is served placed by: module, class or function, and the parameters that are counted on.
_MOE = "vllm.model_executor.layers.fused_moe"
PLACING_HOOKS = (
    (f"{_MOE}.layer", "create_fused_moe_router", ROUTER_ARGUMENTS),
    (f"{_MOE}.runner.moe_runner", "MoERunner.__init__", ("router", "routed_experts")),
    (f"{_MOE}.routed_experts", "RoutedExperts._map_global_expert_id_to_local_expert_id", ("expert_id",)),
    (
        *(f"{_MOE}.routed_experts", "RoutedExperts.weight_loader"),
        ("param", "loaded_weight", "weight_name", "shard_id", "expert_id", "return_success"),
    ),
    ("vllm.model_executor.model_loader.base_loader", "initialize_model", ("vllm_config",)),
    ("vllm.model_executor.model_loader.base_loader", "process_weights_after_loading", ("model", "model_config")),
    ("vllm.model_executor.model_loader.default_loader", "compute_local_expert_ids", ("num_experts", "ep_rank")),
    ("vllm.model_executor.model_loader.weight_utils", "should_skip_weight", ("weight_name", "local_expert_ids")),
    ("vllm.v1.worker.gpu_worker", "Worker.load_model", ()),
    ("vllm.v1.worker.gpu_worker", "Worker.reload_weights", ()),
    ("vllm.v1.worker.gpu_worker", "Worker.sleep", ("level",)),
    ("vllm.v1.worker.gpu_worker", "Worker.wake_up", ("tags",)),
    ("vllm.distributed.eplb.eplb_state", "EplbState.add_model", ("model", "model_config")),
)
# What is put in front of a router calls these of it.
ROUTER_METHODS = ("_select_experts", "_compute_routing", "_apply_eplb_mapping", "_convert_indices_dtype")


def what_is_wrong_with_placing() -> str | None:
    """Why originals cannot be served placed by the installed vLLM, None where they can; imports much of vLLM."""
    for module, name, parameters in PLACING_HOOKS:
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part, None)
        if not hasattr(function, "replaced_by_reshard"):
            return f"this vLLM has no {module}.{name} that reshard knows"
        known = inspect.signature(function).parameters
        if lacking := [parameter for parameter in parameters if parameter not in known]:
            return f"{module}.{name} of this vLLM takes no {lacking[0]}"
    router = importlib.import_module(f"{_MOE}.router.base_router").BaseRouter
    lacking = [method for method in ROUTER_METHODS if not hasattr(router, method)]
    return f"routers of this vLLM have no {lacking[0]}" if lacking else None


def require_support(where: str) -> None:
    """UnsupportedError unless the installed vLLM is one that the plugin can make route `where` rightly."""
    if fault := what_is_wrong():
        raise UnsupportedError(
            f"{where}: this model was resharded and has expert groups; serving it needs vLLM {VERSIONS}: {fault}. "
            "Install one of these, or restore the original with `reshard restore`"
        )


def what_is_wrong() -> str | None:
    """Why the installed vLLM does not fit, None where it does."""
    import vllm

    version = getattr(vllm, "__version__", "")
    match = re.match(r"(\d+)\.(\d+)", version)
    if not match or not OLDEST <= (int(match[1]), int(match[2])) <= NEWEST:
        return f"found {version or 'no version'}"
    return None


def what_is_wrong_with_hook(function: object) -> str | None:
    """Why `create_fused_moe_router` is not the function that was read, None where it is."""
    if not callable(function):
        return "it has no create_fused_moe_router"
    lacking = [name for name in ROUTER_ARGUMENTS if name not in inspect.signature(function).parameters]
    return f"its create_fused_moe_router takes no {', '.join(lacking)}" if lacking else None
