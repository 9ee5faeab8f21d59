"""Makes config.json of a group-limited output read as the original's, to vLLM and to nobody else in its process.

Everything that reads a config starts with Transformers' `PretrainedConfig.get_config_dict`. While vLLM's own parser
reads one, we restore the original `model_type`, `architectures` and `auto_map` there. The contract stays in the config
as an attribute, where `routing` finds it; it can be unpickled only where reshard is installed. Transformers' classes
that choose a tokenizer or a processor see the original's config too: they choose by `model_type`, and pass none on.

For everybody else in the process, such as a trainer or an evaluation, the lock stays closed. If they get hold of a
config that vLLM has opened, Transformers refuses to build a model from it, and to save it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from ..errors import UnsupportedError
from ..placement.contract import CONTRACT_KEY, contract_from_json, unlock_config
from .patching import replace_if_there, replace_once
from .served import ServedContract
from .support import require_support

PARSERS = ("HFConfigParser", "MistralConfigParser")
# By the module of transformers.models.auto, the class that chooses by a config.
CHOOSERS = {
    "tokenization_auto": "AutoTokenizer",
    "processing_auto": "AutoProcessor",
    "image_processing_auto": "AutoImageProcessor",
    "video_processing_auto": "AutoVideoProcessor",
    "feature_extraction_auto": "AutoFeatureExtractor",
}
_lock_is_open: ContextVar[bool] = ContextVar("lock_is_open", default=False)


def install(module: ModuleType) -> None:
    """Let configs with a contract be read while the lock is open; `module` defines Transformers' PretrainedConfig."""
    replace_once(module.PretrainedConfig, "get_config_dict", _by_lock)
    for name in ("save_pretrained", "to_json_file"):
        replace_if_there(module.PretrainedConfig, name, _unless_opened)


def install_parsers(module: ModuleType) -> None:
    """Open the lock while vLLM reads a config; `module` is its own that reads them."""
    for name in PARSERS:
        replace_if_there(getattr(module, name, None), "parse", _with_open_lock)


def install_chooser(module: ModuleType) -> None:
    """Open the lock while a tokenizer or a processor is chosen; `module` is one of `CHOOSERS`."""
    name = CHOOSERS[module.__name__.rpartition(".")[2]]
    replace_if_there(getattr(module, name, None), "from_pretrained", _with_open_lock)


def install_models(module: ModuleType) -> None:
    """Let Transformers build no model that has a contract; `module` defines its PreTrainedModel."""
    replace_once(module.PreTrainedModel, "__init__", _without_contract)


def read_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a locked `config` as the original's plus the contract; return any other config unchanged.

    Raises CheckpointError for a contract that cannot be honoured, UnsupportedError if this vLLM is not supported.
    """
    if not str(config.get("model_type")).startswith("reshard_") or CONTRACT_KEY not in config:
        return config
    contract_from_json(config[CONTRACT_KEY], where)
    require_support(where)
    return {**unlock_config(config), CONTRACT_KEY: ServedContract(config[CONTRACT_KEY])}


@contextmanager
def open_lock() -> Iterator[None]:
    """While this lasts, configs that are read in this thread are read as the originals'."""
    token = _lock_is_open.set(True)
    try:
        yield
    finally:
        _lock_is_open.reset(token)


def _with_open_lock(read: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(read)
    def read_with_open_lock(*args: Any, **kwargs: Any) -> Any:
        with open_lock():
            return read(*args, **kwargs)

    return read_with_open_lock


def _by_lock(read: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(read)
    def get_config_dict(
        cls: type[Any], /, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        config, rest = read(cls, pretrained_model_name_or_path, **kwargs)
        return read_config(config, str(pretrained_model_name_or_path)) if _lock_is_open.get() else config, rest

    return get_config_dict


def _unless_opened(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def save_or_refuse(config: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(config, CONTRACT_KEY, None) is not None:
            raise UnsupportedError(
                f"{_name(config)}: this config is of a resharded model, and saved it would no longer say so; copy the "
                "output's config.json as it is"
            )
        return save(config, *args, **kwargs)

    return save_or_refuse


def _without_contract(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(model: Any, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - Transformers' own name
        if getattr(config, CONTRACT_KEY, None) is not None:
            raise UnsupportedError(
                f"{_name(config)}: this model was resharded and has expert groups, and Transformers would answer "
                "wrongly; load the original, or restore it with `reshard restore`"
            )
        init(model, config, *args, **kwargs)

    return __init__


def _name(config: Any) -> str:
    return str(getattr(config, "name_or_path", "") or type(config).__name__)
