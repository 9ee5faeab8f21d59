"""Makes vLLM's workers refuse what would misplace experts of an original that is served with a placement.

Loading must go through the functions that the plugin replaces; otherwise the start fails. New weights that name whole
tensors with the original's ids go the same way as loading: `reload_weights` from disk, and updates that vLLM passes to
`load_weights`. We refuse operations that know only slots: they would put experts into wrong slots, or save the model in
physical order to files that do not record it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import UnsupportedError
from ..placement.contract import CONTRACT_KEY
from .patching import replace_if_there
from .request import MANIFEST
from .served import ServedPlacement, served_placement
from .support import VERSIONS, placing_fault

SAVING = ("save_sharded_state", "save_tensorized_model")
WITH_EPLB = "with EPLB the expert maps lie in the memory of the weights and would be lost; serve without EPLB"
_proved: list[str] = []  # digests of the placements that were proved for models of this process
_checked: list[str] = []  # models of this process whose routers were checked against their contract


def install(module: ModuleType) -> None:
    """Wrap the methods that load, reload, save or wake a model; `module` defines Worker."""
    replace_if_there(module.Worker, "load_model", _proved_load)
    replace_if_there(module.Worker, "reload_weights", _checked_reload)
    replace_if_there(module.Worker, "sleep", _checked_sleep)
    replace_if_there(module.Worker, "wake_up", _restoring)
    for name in SAVING:
        replace_if_there(module.Worker, name, _refused)


def mark_proved(served: ServedPlacement) -> None:
    """Note that a model of this process follows the placement; `loading` and `eplb` call this after their checks."""
    _proved.append(served.digest)


def mark_checked(model: str) -> None:
    """Note that every router of an output was checked, which is no draft; `loading` calls this."""
    _checked.append(model)


def has_placement() -> bool:
    """Whether a model of this process was proved to follow a placement."""
    return bool(_proved)


def _proved_load(load_model: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(load_model)
    def load_and_check(worker: Any, *args: Any, **kwargs: Any) -> None:
        served, model_config = served_placement(worker.vllm_config), worker.vllm_config.model_config
        if served is not None and (fault := placing_fault()):
            raise UnsupportedError(f"{served.asked}: {fault}; placements need vLLM {VERSIONS}")
        before = len(_proved), len(_checked)
        load_model(worker, *args, **kwargs)
        if served is not None and len(_proved) == before[0]:
            raise UnsupportedError(
                f"{served.asked}: vLLM loaded the model without the functions that reshard replaces; placements need "
                f"vLLM {VERSIONS} and one of its usual load formats"
            )
        if getattr(model_config.hf_config, CONTRACT_KEY, None) is not None and len(_checked) == before[1]:
            raise UnsupportedError(
                f"{model_config.model}: this model was resharded and has expert groups, but vLLM loaded it without the "
                f"functions that reshard replaces, and would answer wrongly; serve it with vLLM {VERSIONS} and one of "
                "its usual load formats, or restore the original with `reshard restore`"
            )

    return load_and_check


def _checked_reload(reload: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(reload)
    def reload_weights(
        worker: Any,
        weights_iterator: Any = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
        **more: Any,
    ) -> None:
        if (served := served_placement(worker.vllm_config)) is not None:
            eplb = worker.vllm_config.parallel_config.enable_eplb
            if fault := reload_fault(weights_path, is_checkpoint_format, eplb):
                raise _refusal(served, "reload_weights", fault)
        reload(worker, weights_iterator, weights_path, is_checkpoint_format, **more)

    return reload_weights


def reload_fault(weights_path: str | None, is_checkpoint_format: bool, eplb: bool) -> str | None:
    """Describe why a reload would put experts into wrong slots, and what to do; None if it would not."""
    if eplb:
        return WITH_EPLB
    if not is_checkpoint_format:
        return "weights in kernel format are ordered by slot; send them in the checkpoint's format"
    if weights_path is not None and Path(weights_path, MANIFEST).is_file():
        return f"{weights_path} is an output of reshard, with other expert ids; reload an original"
    return None


def _checked_sleep(sleep: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(sleep)
    def sleep_or_refuse(worker: Any, level: int = 1, *args: Any, **kwargs: Any) -> None:
        served = served_placement(worker.vllm_config)
        if served is not None and level == 2 and worker.vllm_config.parallel_config.enable_eplb:
            raise _refusal(served, "sleep level 2", WITH_EPLB)
        sleep(worker, level, *args, **kwargs)

    return sleep_or_refuse


def _restoring(wake_up: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(wake_up)
    def wake_up_and_restore(worker: Any, tags: list[str] | None = None, *args: Any, **kwargs: Any) -> None:
        wake_up(worker, tags, *args, **kwargs)
        if tags is None or "weights" in tags:  # of outputs, too
            from .placed import restore_places  # imports torch

            restore_places()

    return wake_up_and_restore


def _refused(save: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(save)
    def save_or_refuse(worker: Any, *args: Any, **kwargs: Any) -> None:
        if (served := served_placement(worker.vllm_config)) is not None:
            raise _refusal(
                served, save.__name__, "it would save experts in the order of their slots; serve without a placement"
            )
        save(worker, *args, **kwargs)

    return save_or_refuse


def _refusal(served: ServedPlacement, what: str, fault: str) -> UnsupportedError:
    return UnsupportedError(f"{served.asked}: {what} is refused while the model is served with a placement: {fault}")
