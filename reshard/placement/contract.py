"""The routing contract: what an engine must know to route a renumbered group-limited model as the original was routed.

It stands in the output's config.json under ``expert_placement``, together with the values of the keys that were changed
so that nothing loads the output by mistake. This module depends on nothing of the rest but `placement` and `errors`:
it is all that an engine's plugin has to read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from .permutations import is_permutation

CONTRACT_KEY = "expert_placement"
CONTRACT_VERSION = 1
LOCKED_KEYS = ("model_type", "architectures", "auto_map")

Placement = Mapping[str, tuple[int, ...]]
"""physical_to_logical [E] of each MoE layer, by the module that holds its experts (`model.layers.3.mlp`)."""


@dataclass(frozen=True, slots=True)
class Contract:
    """Expert groups are runs of E / n_group consecutive *logical* experts, wherever those physically are."""

    strategy: str
    ep_size: int
    n_group: int
    topk_group: int
    physical_to_logical: Placement
    original: Mapping[str, Any]  # the LOCKED_KEYS that the source's config.json had


def lock_config(config: Mapping[str, Any], contract: Contract) -> dict[str, Any]:
    """The source's `config` made unloadable for every engine that does not know the contract.

    Both `model_type` and `architectures` are renamed: with only one of them renamed some engine still loads the output
    and routes wrongly. Neither may be left to an `auto_map`.
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
    """The inverse of `lock_config`: `config` as the original had it, the contract left out."""
    original = config[CONTRACT_KEY]["original"]
    unlocked = {key: value for key, value in config.items() if key != CONTRACT_KEY and key not in LOCKED_KEYS}
    return {**unlocked, **original}


def contract_to_json(contract: Contract) -> dict[str, Any]:
    """The contract as it stands in config.json."""
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
    """Read a contract; `where` names the file in the CheckpointError for one that this version cannot honour."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {CONTRACT_KEY} must be an object, found {value!r:.80}")
    if value.get("version") != CONTRACT_VERSION:
        raise CheckpointError(
            f"{where}: {CONTRACT_KEY} has version {value.get('version')!r:.80}, this reshard reads version "
            f"{CONTRACT_VERSION}; "
            "upgrade reshard"
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
    """One list [E] where all layers agree, else a list for each layer."""
    permutations = set(placement.values())
    if len(permutations) == 1:
        return list(permutations.pop())
    return {layer: list(permutation) for layer, permutation in placement.items()}


def placement_from_json(value: Any, layers: list[str], where: str) -> Placement:
    """The inverse of `placement_to_json` for the MoE layers named in `layers`."""
    named = bool(layers) and all(isinstance(layer, str) for layer in layers)
    by_layer = value if isinstance(value, dict) else dict.fromkeys(layers if named else (), value)
    if not named or set(by_layer) != set(layers):
        raise CheckpointError(f"{where}.physical_to_logical must have an entry for each of the MoE layers")
    for layer, permutation in by_layer.items():
        numbers = isinstance(permutation, list) and all(type(expert) is int for expert in permutation)
        if not numbers or not is_permutation(permutation):
            raise CheckpointError(f"{where}.physical_to_logical: layer {layer}: expected a permutation of 0..E-1")
    return {layer: tuple(by_layer[layer]) for layer in layers}
