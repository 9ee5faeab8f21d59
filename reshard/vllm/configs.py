"""config.json of a group-limited output, read as the original's.

Everything that reads a config (vLLM's registry, Transformers, remote code where the user trusts it, tokenizers) begins
with `PretrainedConfig.get_config_dict`: there the original `model_type`, `architectures` and `auto_map` come back. The
contract stays in, as an attribute of the config object, for `routing` to find.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from ..placement.contract import CONTRACT_KEY, contract_from_json, unlock_config
from .support import require_support


def install(module: ModuleType) -> None:
    """Make configs with a contract readable in this process; `module` defines Transformers' PretrainedConfig."""
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
    """`config` as the original was, with its contract; any other config unchanged.

    Raises CheckpointError where the contract cannot be honoured, UnsupportedError where this vLLM cannot do it.
    """
    if not str(config.get("model_type")).startswith("reshard_") or CONTRACT_KEY not in config:
        return config
    contract_from_json(config[CONTRACT_KEY], where)
    require_support(where)
    return {**unlock_config(config), CONTRACT_KEY: config[CONTRACT_KEY]}
