"""Checks that the installed vLLM is one that the plugin supports.

The plugin replaces functions inside vLLM; `hooks` lists them. We read the source of the versions from OLDEST to NEWEST.
A newer one is refused, unless the user allows it with RESHARD_UNTESTED_VLLM=1 and its sources have every function on
the list. After loading, `loading` and `proof` check the model itself, whatever the version.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError
from .hooks import OUTPUT, PLACEMENT, ROUTER_ARGUMENTS, VLLM_HOOKS

OLDEST, NEWEST = (0, 26), (0, 33)
VERSIONS = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
UNTESTED = "RESHARD_UNTESTED_VLLM"


def placing_fault() -> str | None:
    """Describe why the running vLLM cannot serve placements; None if it can. This imports much of vLLM."""
    for hook in VLLM_HOOKS:
        if PLACEMENT not in hook.needed_by:
            continue
        function: Any = importlib.import_module(hook.module)
        for part in hook.name.split("."):
            function = getattr(function, part, None)
        if function is None or (hook.replaced and not hasattr(function, "replaced_by_reshard")):
            return f"this vLLM has no {hook} that reshard knows"
        known = inspect.signature(function).parameters if hook.parameters else ()
        if missing := [parameter for parameter in hook.parameters if parameter not in known]:
            return f"{hook} of this vLLM takes no {missing[0]}"
    return None


def require_support(where: str) -> None:
    """Raise UnsupportedError unless the plugin supports the installed vLLM; `where` names the model in the error."""
    if fault := version_fault(OUTPUT):
        raise UnsupportedError(
            f"{where}: this model was resharded and has expert groups; serving it needs vLLM {VERSIONS}: {fault}. "
            "Install one of these, or restore the original with `reshard restore`"
        )


def version_fault(purpose: str) -> str | None:
    """Describe why the version of the installed vLLM is not supported; None if it is, or if the user allows it.

    A newer version must have the functions that `purpose`, one of those in `hooks`, needs.
    """
    import vllm

    version = getattr(vllm, "__version__", "")
    match = re.match(r"(\d+)\.(\d+)", version)
    if not match or (number := (int(match[1]), int(match[2]))) < OLDEST:
        return f"found {version or 'no version'}"
    if number <= NEWEST:
        return None
    if os.environ.get(UNTESTED) != "1":
        return f"found {version}, with which reshard was not tried; {UNTESTED}=1 allows it if its functions fit"
    if faults := _source_faults(Path(vllm.__file__).parent.parent, purpose):
        return f"found {version}, whose functions do not fit: {'; '.join(faults)}"
    from vllm.logger import init_logger

    init_logger("vllm.plugins.reshard").warning_once(
        "vLLM %s is newer than the versions that reshard was tried with (%s); its functions fit, so %s=1 allows it",
        version,
        VERSIONS,
        UNTESTED,
    )
    return None


@functools.cache  # vLLM reads a config several times in each process
def _source_faults(root: Path, purpose: str) -> tuple[str, ...]:
    from .hook_check import source_faults

    return source_faults(root, [hook for hook in VLLM_HOOKS if purpose in hook.needed_by])


def hook_fault(function: object) -> str | None:
    """Describe how `create_fused_moe_router` differs from the function that we rely on; None if it does not."""
    if not callable(function):
        return "it has no create_fused_moe_router"
    missing = [name for name in ROUTER_ARGUMENTS if name not in inspect.signature(function).parameters]
    return f"its create_fused_moe_router takes no {', '.join(missing)}" if missing else None
