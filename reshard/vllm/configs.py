"""Makes config.json of a group-limited output read as the original's.

Everything that reads a config (vLLM's registry, Transformers, tokenizers, trusted remote code) starts with
`PretrainedConfig.get_config_dict`. We wrap it, and restore the original `model_type`, `architectures` and `auto_map`
there. The contract stays in the config as an attribute, where `routing` finds it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from ..placement.contract import CONTRACT_KEY, contract_from_json, unlock_config
from .support import require_support


def install(module: ModuleType) -> None:
    """Unlock configs with a contract in this process; `module` defines Transformers' PretrainedConfig."""
    old = module.PretrainedConfig.get_config_dict
    if hasattr(old, "replaced_by_reshard"):
        return

    def get_config_dict(
        cls: type[Any], /, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        config, rest = old.__func__(cls, pretrained_model_name_or_path, **kwargs)
        return read_config(config, str(pretrained_model_name_or_path)), rest

    get_config_dict.replaced_by_reshard = True  # type: ignore[attr-defined]
    module.PretrainedConfig.get_config_dict = classmethod(get_config_dict)


def read_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a locked `config` as the original's plus the contract; return any other config unchanged.

    Raises CheckpointError for a contract that cannot be honoured, UnsupportedError if this vLLM is not supported.
    """
    if not str(config.get("model_type")).startswith("reshard_") or CONTRACT_KEY not in config:
        return config
    contract_from_json(config[CONTRACT_KEY], where)
    require_support(where)
    return {**unlock_config(config), CONTRACT_KEY: config[CONTRACT_KEY]}
