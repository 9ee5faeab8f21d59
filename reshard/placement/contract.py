"""The routing contract: what an engine must know to route a renumbered group-limited model as the original does.

The output's config.json holds it under ``expert_placement``, with the original values of the keys that were changed to
lock the output. An engine's plugin needs this module and `permutations`, and no other code of reshard.

The lock has three parts. Renamed `model_type` and `architectures` stop engines that look a model up by name. A text in
the place of the group counts stops those that are told the model's class by hand: they cannot compute with a text. A
null or 0 would not stop them, because some models then route without groups. Gates [E, hidden] that lie in the files as
[E * hidden] stop those that are given the original's config: their loaders compare shapes. Version 1 had only the first
part, version 2 the first two.

Every safetensors file of every output is marked in its metadata: its experts are renumbered, and in which way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from .permutations import Placement, is_permutation

CONTRACT_KEY = "expert_placement"
CONTRACT_VERSION = 3
READ_VERSIONS = (1, 2, 3)
FLATTENED_SINCE = 3
LOCKED_KEYS = ("model_type", "architectures", "auto_map")
GROUP_KEYS = ("n_group", "topk_group")
LOCKED_GROUPS = "resharded: needs the reshard plugin"  # in the place of their values
MARK = {"reshard": "experts are renumbered"}  # in the metadata of an output's safetensors files
NUMBERING = "reshard_numbering"  # there too, but for outputs of earlier versions: the SHA-256 of the placement


@dataclass(frozen=True, slots=True)
class Contract:
    """How to route the output. A group is E / n_group consecutive *logical* experts, whatever their slots.

    `flattened` names the gates that the files hold as [E * hidden]; an engine gives them the shape [E, hidden] again.
    """

    strategy: str
    ep_size: int
    n_group: int
    topk_group: int
    physical_to_logical: Placement
    original: Mapping[str, Any]  # what `locked_values` found in the source's config.json
    flattened: tuple[str, ...] = ()


def locked_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values in the source's `config` that `lock_config` changes, nested as in `config`."""
    return {**_groups(config), **{key: config[key] for key in LOCKED_KEYS if key in config}}


def _groups(config: Mapping[str, Any]) -> dict[str, Any]:
    """The group counts in `config` and in the objects inside it, nested as there."""
    inside = {key: _groups(value) for key, value in config.items() if isinstance(value, dict)}
    own = {key: config[key] for key in GROUP_KEYS if key in config}
    return {**{key: found for key, found in inside.items() if found}, **own}


def lock_config(config: Mapping[str, Any], contract: Contract) -> dict[str, Any]:
    """The source's `config`, changed so that no engine without the plugin can load it or route by it.

    `model_type` and `architectures` are both renamed, because some engines look at only one of them. `auto_map` is
    removed, because it names code that would load the model. `LOCKED_GROUPS` takes the place of the group counts,
    wherever they stand.
    """
    locked = _without_groups({key: value for key, value in config.items() if key != "auto_map"})
    locked["model_type"] = f"reshard_{config['model_type']}"
    if architectures := config.get("architectures"):
        if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
            raise CheckpointError(f"config.json: architectures must be a list of names, found {architectures!r:.80}")
        locked["architectures"] = [f"Reshard{name}" for name in architectures]
    locked[CONTRACT_KEY] = contract_to_json(contract)
    return locked


def _without_groups(config: Mapping[str, Any]) -> dict[str, Any]:
    locked = {key: _without_groups(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {**locked, **{key: LOCKED_GROUPS for key in GROUP_KEYS if key in config}}


def unlock_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `lock_config`: the original's `config`, without the contract."""
    kept = {key: value for key, value in config.items() if key != CONTRACT_KEY and key not in LOCKED_KEYS}
    return _with_values(kept, config[CONTRACT_KEY]["original"])


def _with_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `values` in the place of its own, object by object."""
    inside = {
        key: _with_values(config[key], value)
        for key, value in values.items()
        if isinstance(value, dict) and isinstance(config.get(key), dict)
    }
    return {**config, **values, **inside}


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
        "flattened": list(contract.flattened),
    }


def contract_from_json(value: Any, where: str) -> Contract:
    """Read a contract. Raises CheckpointError, which names the file `where`, if this version cannot honour it."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {CONTRACT_KEY} must be an object, found {value!r:.80}")
    if type(value.get("version")) is not int or value["version"] not in READ_VERSIONS:
        raise CheckpointError(
            f"{where}: {CONTRACT_KEY} has version {value.get('version')!r:.80}, this reshard reads versions "
            f"{READ_VERSIONS[0]} to {READ_VERSIONS[-1]}; upgrade reshard"
        )
    fields = {
        "strategy": str,
        "ep_size": int,
        "n_group": int,
        "topk_group": int,
        "layers": list,
        "original": dict,
        **({"flattened": list} if value["version"] >= FLATTENED_SINCE else {}),
    }
    for key, kind in fields.items():
        if type(value.get(key)) is not kind:
            raise CheckpointError(
                f"{where}: {CONTRACT_KEY}.{key} must be of type {kind.__name__}, found {value.get(key)!r:.80}"
            )
    placement = placement_from_json(value.get("physical_to_logical"), value["layers"], f"{where}: {CONTRACT_KEY}")
    flattened = value["flattened"] if value["version"] >= FLATTENED_SINCE else []
    if not all(isinstance(name, str) for name in flattened):
        raise CheckpointError(f"{where}: {CONTRACT_KEY}.flattened must name tensors, found {flattened!r:.80}")
    return Contract(
        value["strategy"],
        value["ep_size"],
        value["n_group"],
        value["topk_group"],
        placement,
        value["original"],
        tuple(flattened),
    )


def mark_of(placement: Placement) -> dict[str, str]:
    """What the metadata of an output's safetensors files says of it."""
    orders = json.dumps({layer: list(order) for layer, order in placement.items()}, sort_keys=True)
    return {**MARK, NUMBERING: hashlib.sha256(orders.encode()).hexdigest()}


def numbering_in(metadata: Mapping[str, str]) -> str | None:
    """How the metadata of a safetensors file says that its experts are numbered.

    A digest of the placement; "" in files of earlier versions, which only say that it is another numbering than the
    original's; None for the original's, and in files of the first version, which say nothing.
    """
    return metadata.get(NUMBERING, "") if MARK.items() <= metadata.items() else None


def mixture(
    numberings: Mapping[str, str | None], placement: Placement | None = None, *, marked: bool = False
) -> str | None:
    """Say which files do not number their experts alike; None if all that is known of them agrees.

    Parameters:
        numberings: by file, what `numbering_in` found
        placement: of the output that they are to be files of; None if it is not known
        marked: whether that output has digests in the marks of its files
    """
    if not numberings:
        return None
    first, expected = next(iter(numberings.items()))
    for name, numbering in numberings.items():
        if (numbering is None) != (expected is None):
            renumbered, other = (name, first) if expected is None else (first, name)
            return f"the experts in {renumbered} are renumbered, and those in {other} are not, by their headers"
        if numbering != expected:
            return f"the experts in {name} and in {first} are numbered in different ways, by their headers"
    if marked and not expected:
        return f"the header of {first} does not say that its experts are numbered as in this output"
    if expected and placement is not None and expected != mark_of(placement)[NUMBERING]:
        return f"the experts in {first} are numbered in another way than the placement says, by its header"
    return None


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
