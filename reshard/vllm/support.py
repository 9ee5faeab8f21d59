"""Which vLLM this plugin fits: the versions that were read, with the functions it needs where they were."""

from __future__ import annotations

import inspect
import re

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


def require_support(where: str) -> None:
    """UnsupportedError unless the installed vLLM is one that the plugin can make route `where` rightly."""
    if fault := what_is_wrong():
        raise UnsupportedError(
            f"{where}: this model was resharded and has expert groups; serving it needs vLLM "
            f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}: {fault}. Install one of these, or restore the "
            "original with `reshard restore`"
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
