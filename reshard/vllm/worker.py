"""Makes vLLM's workers refuse what would misplace experts: of an original with a placement, and of an output.

Loading must go through the functions that the plugin replaces; otherwise the start fails. To an original with a
placement, new weights that name whole tensors with the original's ids go the same way as loading: `reload_weights` from
disk, and updates that vLLM passes to `load_weights`. We refuse operations that know only slots: they would put experts
into wrong slots, or save the model in physical order to files that do not record it. An output takes weights from files
that are numbered as its own, and no others (see `updates`).
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import UnsupportedError
from ..placement.contract import CONTRACT_KEY
from ..placement.permutations import Placement
from .asked import VARIABLE, asked_for, refuse_another
from .lora import require_check
from .outputs import LOAD_FORMATS, format_of, is_output, lies_in, read_placement, refuse_options
from .patching import replace_if_there
from .served import Build, ServedPlacement, building, served_placement
from .support import VERSIONS, placing_fault
from .updates import own_files

SAVING = ("save_sharded_state", "save_tensorized_model")
UPDATING = ("start_weight_update", "update_weights")  # of weight transfer; some versions let its caller name a format
KERNEL_FORMAT = "weights in kernel format are ordered by slot; send them in the checkpoint's format"
WITH_EPLB = "with EPLB the expert maps lie in the memory of the weights and would be lost; serve without EPLB"
_proved: list[str] = []  # digests of the placements that were proved for models of this process
_checked: list[str] = []  # models of this process whose routers were checked against their contract


def install(module: ModuleType) -> None:
    """Wrap the methods that load, reload, save or wake a model; `module` defines Worker."""
    replace_if_there(module.Worker, "load_model", _proved_load)
    replace_if_there(module.Worker, "reload_weights", _checked_reload)
    for name in UPDATING:
        replace_if_there(module.Worker, name, _in_checkpoint_format)
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


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a worker loaded: the numbers that the experts of its model have."""

    model: str
    is_output: bool
    placement: Placement | None  # None for an original, or if the directory does not say

    @classmethod
    def of(cls, model_config: Any) -> Loaded:
        """Read it from a ModelConfig."""
        model = str(model_config.model)
        return cls(model, is_output(model_config), read_placement(model, model_config.hf_config))

    def reload_fault(self, weights: str, own: bool) -> str | None:
        """Describe why weights from `weights` must not be loaded; None if they have the same numbers.

        `own`: whether they are read from files there, as at the start.
        """
        if self.is_output and not own:
            return (
                f"{self.model}: reload_weights is refused while this output of reshard is served, but for the output's "
                "own files in its load format: other weights have the original's expert ids; serve the original"
            )
        found = read_placement(weights)
        if found == self.placement and (self.placement is not None or not self.is_output or weights == self.model):
            return None
        here, there = ("an output of reshard" if one else "an original" for one in (self.is_output, found))
        return (
            f"{weights}: reload_weights is refused: this is {there}, whose experts have other numbers than those of "
            f"{self.model}, {here}; reload a checkpoint that was resharded alike, or start anew"
        )


def _refuse_unresolved(config: Any) -> None:
    """UnsupportedError if a placement is requested, but the process that made the configuration did not resolve it."""
    if asked := asked_for(os.environ, config.additional_config):
        raise UnsupportedError(
            f"{VARIABLE}={asked}: the placement was requested, but the process that made vLLM's configuration did not "
            "resolve it; check that reshard's plugin is installed there and that VLLM_PLUGINS does not exclude it"
        )


def _proved_load(load_model: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(load_model)
    def load_and_check(worker: Any, *args: Any, **kwargs: Any) -> None:
        config, model_config = worker.vllm_config, worker.vllm_config.model_config
        served = served_placement(config)
        if served is None:
            _refuse_unresolved(config)
            if is_output(model_config):
                refuse_options(config, str(model_config.model))
                if config.lora_config is not None:
                    require_check(str(model_config.model))
        else:
            refuse_another(served, os.environ)
            if fault := placing_fault():
                raise UnsupportedError(f"{served.asked}: {fault}; placements need vLLM {VERSIONS}")
        before = len(_proved), len(_checked)
        load_model(worker, *args, **kwargs)
        worker.reshard_loaded = Loaded.of(model_config)
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
        config = worker.vllm_config
        build = Build(config, config.model_config, config.load_config)  # not every vLLM says here what it loads
        if (served := served_placement(config)) is not None:
            eplb = config.parallel_config.enable_eplb
            if fault := reload_fault(weights_path, is_checkpoint_format, eplb):
                raise _refusal(served, "reload_weights", fault)
            with building(build):
                reload(worker, weights_iterator, weights_path, is_checkpoint_format, **more)
            return
        loaded = getattr(worker, "reshard_loaded", None) or Loaded.of(config.model_config)
        own = weights_iterator is None and is_checkpoint_format and format_of(config.load_config) in LOAD_FORMATS
        if fault := loaded.reload_fault(str(weights_path or config.model_config.model), own):
            raise UnsupportedError(fault)
        with building(build), own_files():
            reload(worker, weights_iterator, weights_path, is_checkpoint_format, **more)

    return reload_weights


def reload_fault(weights_path: str | None, is_checkpoint_format: bool, eplb: bool) -> str | None:
    """Describe why a reload would put experts into wrong slots, and what to do; None if it would not."""
    if eplb:
        return WITH_EPLB
    if not is_checkpoint_format:
        return KERNEL_FORMAT
    if weights_path is not None and lies_in(Path(weights_path)):
        return f"{weights_path} is an output of reshard, with other expert ids; reload an original"
    return None


def _in_checkpoint_format(update: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(update)

    @functools.wraps(update)
    def update_or_refuse(worker: Any, *args: Any, **kwargs: Any) -> Any:
        if (served := served_placement(worker.vllm_config)) is not None:
            given = signature.bind(worker, *args, **kwargs).arguments
            infos = given.get("update_info")
            for info in (given, *(infos if isinstance(infos, list) else [infos])):
                if isinstance(info, Mapping) and info.get("is_checkpoint_format", True) is not True:
                    raise _refusal(served, update.__name__, KERNEL_FORMAT)
        return update(worker, *args, **kwargs)

    return update_or_refuse


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
        if is_output(model := worker.vllm_config.model_config):
            raise UnsupportedError(
                f"{model.model}: {save.__name__} is refused while an output of reshard is served: it would save "
                "experts in the order of their slots, in files that do not say so; serve the original"
            )
        save(worker, *args, **kwargs)

    return save_or_refuse


def _refusal(served: ServedPlacement, what: str, fault: str) -> UnsupportedError:
    return UnsupportedError(f"{served.asked}: {what} is refused while the model is served with a placement: {fault}")
