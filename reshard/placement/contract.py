"""The routing contract: what an engine must know to route a renumbered group-limited model as the original does.

The output's config.json holds it under ``expert_placement``, with the original values of the keys that were changed to
lock the output. An engine's plugin needs this module and `permutations`, and no other code of reshard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from .permutations import Placement, is_permutation

CONTRACT_KEY = "expert_placement"
CONTRACT_VERSION = 1
LOCKED_KEYS = ("model_type", "architectures", "auto_map")


@dataclass(frozen=True, slots=True)
class Contract:
    """How to route the output. A group is E / n_group consecutive *logical* experts, whatever their slots."""

    strategy: str
    ep_size: int
    n_group: int
    topk_group: int
    physical_to_logical: Placement
    original: Mapping[str, Any]  # the LOCKED_KEYS that the source's config.json had


def lock_config(config: Mapping[str, Any], contract: Contract) -> dict[str, Any]:
    """The source's `config`, changed so that no engine without the plugin can load it.

    `model_type` and `architectures` are both renamed, because some engines look at only one of them. `auto_map` is
    removed, because it names code that would load the model.
    """
    locked = {key: value for key, value in config.items() if key != "auto_map"}
    locked["model_type"] = f"reshard_{config['model_type']}"
    if architectures := config.get("architectures"):
        if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
            raise CheckpointError(f"config.json: architectures must be a list of names, found {architectures!r:.80}")
        locked["architectures"] = [f"Reshard{name}" for name in architectures]
    locked[CONTRACT_KEY] = contract_to_json(contract)
    return locked


def unlock_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `lock_config`: the original's `config`, without the contract."""
    original = config[CONTRACT_KEY]["original"]
    unlocked = {key: value for key, value in config.items() if key != CONTRACT_KEY and key not in LOCKED_KEYS}
    return {**unlocked, **original}


def contract_to_json(contract: Contract) -> dict[str, Any]:
    """The contract as config.json holds it."""
    return {
        "version": CONTRACT_VERSION,
        "strategy": contract.strategy,
        "ep_size": contract.ep_size,
        "n_group": contract.n_group,
        "topk_group": contract.topk_group,
        "physical_to_logical": placement_to_json(contract.physical_to_logical),
        "layers": list(contract.physical_to_logical),
        "original": dict(contract.original),
    }


def contract_from_json(value: Any, where: str) -> Contract:
    """Read a contract. Raises CheckpointError, which names the file `where`, if this version cannot honour it."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {CONTRACT_KEY} must be an object, found {value!r:.80}")
    if value.get("version") != CONTRACT_VERSION:
        raise CheckpointError(
            f"{where}: {CONTRACT_KEY} has version {value.get('version')!r:.80}, this reshard reads version "
            f"{CONTRACT_VERSION}; upgrade reshard"
        )
    fields = {
        "strategy": str,
        "ep_size": int,
        "n_group": int,
        "topk_group": int,
        "layers": list,
        "original": dict,
    }
    for key, kind in fields.items():
        if type(value.get(key)) is not kind:
            raise CheckpointError(
                f"{where}: {CONTRACT_KEY}.{key} must be of type {kind.__name__}, found {value.get(key)!r:.80}"
            )
    placement = placement_from_json(value.get("physical_to_logical"), value["layers"], f"{where}: {CONTRACT_KEY}")
    return Contract(
        value["strategy"],
        value["ep_size"],
        value["n_group"],
        value["topk_group"],
        placement,
        value["original"],
    )


def placement_to_json(placement: Placement) -> list[int] | dict[str, list[int]]:
    """One list [E] if all layers agree, else one list for each layer."""
    permutations = set(placement.values())
    if len(permutations) == 1:
        return list(permutations.pop())
    return {layer: list(permutation) for layer, permutation in placement.items()}


def placement_from_json(value: Any, layers: list[str], where: str) -> Placement:
    """The inverse of `placement_to_json` for the MoE layers named in `layers`."""
    are_names = bool(layers) and all(isinstance(layer, str) for layer in layers)
    by_layer = value if isinstance(value, dict) else dict.fromkeys(layers if are_names else (), value)
    if not are_names or set(by_layer) != set(layers):
        raise CheckpointError(f"{where}.physical_to_logical must have an entry for each of the MoE layers")
    for layer, permutation in by_layer.items():
        are_integers = isinstance(permutation, list) and all(type(expert) is int for expert in permutation)
        if not are_integers or not is_permutation(permutation):
            raise CheckpointError(f"{where}.physical_to_logical: layer {layer}: expected a permutation of 0..E-1")
    return {layer: tuple(by_layer[layer]) for layer in layers}
