"""Checks that the installed vLLM is one that the plugin supports.

The plugin replaces functions inside vLLM. We read the source of the versions from OLDEST to NEWEST; only these are
supported, and only if the functions that the plugin replaces exist and take the expected parameters.
"""

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
# The functions that apply a placement to an original: module, function, and the parameters that we rely on.
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
# The methods of vLLM's routers that our mixins call or override.
ROUTER_METHODS = ("_select_experts", "_compute_routing", "_apply_eplb_mapping", "_convert_indices_dtype")


def placing_fault() -> str | None:
    """Describe why the installed vLLM cannot serve placements; None if it can. This imports much of vLLM."""
    for module, name, parameters in PLACING_HOOKS:
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part, None)
        if not hasattr(function, "replaced_by_reshard"):
            return f"this vLLM has no {module}.{name} that reshard knows"
        known = inspect.signature(function).parameters
        if missing := [parameter for parameter in parameters if parameter not in known]:
            return f"{module}.{name} of this vLLM takes no {missing[0]}"
    router = importlib.import_module(f"{_MOE}.router.base_router").BaseRouter
    missing = [method for method in ROUTER_METHODS if not hasattr(router, method)]
    return f"routers of this vLLM have no {missing[0]}" if missing else None


def require_support(where: str) -> None:
    """Raise UnsupportedError unless the plugin supports the installed vLLM; `where` names the model in the error."""
    if fault := version_fault():
        raise UnsupportedError(
            f"{where}: this model was resharded and has expert groups; serving it needs vLLM {VERSIONS}: {fault}. "
            "Install one of these, or restore the original with `reshard restore`"
        )


def version_fault() -> str | None:
    """Describe why the version of the installed vLLM is not supported; None if it is."""
    import vllm

    version = getattr(vllm, "__version__", "")
    match = re.match(r"(\d+)\.(\d+)", version)
    if not match or not OLDEST <= (int(match[1]), int(match[2])) <= NEWEST:
        return f"found {version or 'no version'}"
    return None


def hook_fault(function: object) -> str | None:
    """Describe how `create_fused_moe_router` differs from the function that we rely on; None if it does not."""
    if not callable(function):
        return "it has no create_fused_moe_router"
    missing = [name for name in ROUTER_ARGUMENTS if name not in inspect.signature(function).parameters]
    return f"its create_fused_moe_router takes no {', '.join(missing)}" if missing else None
