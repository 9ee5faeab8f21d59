"""Reads and writes placement files: a placement as JSON, without weights.

`RESHARD_PLACEMENT`, `--map` and `reshard export --to vllm` share this format. `PlacementFile` is its documented form;
`placement.schema.json` is generated from it. Any other JSON object with `physical_to_logical` is read too: a manifest,
or a few lines that a user wrote. Keys that such an object lacks are None, and None fits every model.

`physical_to_logical` may have more slots than there are experts: then some experts have copies. The format allows
copies so that it need not change for them. A caller that cannot place copies refuses the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from blake3 import blake3

from ..arguments import refuse_url
from ..errors import CheckpointError

VERSION_KEY = "reshard_placement"
VERSION = 1
MAX_BYTES = 256 << 20  # largest placement file that we read; DeepSeek-R1's has 60 KB

Positive = Annotated[int, msgspec.Meta(ge=1)]
Expert = Annotated[int, msgspec.Meta(ge=0)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Orders = list[Expert] | dict[str, list[Expert]]
"""One list [P] for all MoE layers, or a list for each layer by name; P is E, or more if experts have copies."""


class PlacementFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A placement file. A null `model_type` fits every model, a null `ep_size` every number of EP ranks.

    `physical_to_logical` gives, for each slot in the order of EP ranks, the id of its expert in the original. It is one
    list for all MoE layers, or one list for each layer by name (`model.layers.3.mlp`). It is longer than `num_experts`
    if experts have copies. `layers` lists all MoE layers that the placement was made for. `digest` is the BLAKE3 of
    what the placement was made for (`ep_size`, `model_type`, `num_experts`, `layers`), so that edits of these are
    detected.
    """

    reshard_placement: Literal[1] = 1
    strategy: str
    ep_size: Positive | None
    model_type: str | None
    num_experts: Positive
    layers: list[str]
    physical_to_logical: Orders
    digest: Digest | None = None

    @property
    def has_copies(self) -> bool:
        """Whether some expert has more than one slot."""
        return any(len(order) > self.num_experts for order in self.orders)

    @property
    def orders(self) -> list[list[int]]:
        """The lists in `physical_to_logical`."""
        found = self.physical_to_logical
        return list(found.values()) if isinstance(found, dict) else [found]

    @property
    def placement_digest(self) -> str:
        """The digest of the placement; see the function of the same name."""
        return placement_digest(self.physical_to_logical, self.ep_size)


def placement_digest(physical_to_logical: Mapping[str, Sequence[int]] | Sequence[int], ep_size: int | None) -> str:
    """BLAKE3 of a placement in canonical form: equal placements have equal digests, whoever wrote them.

    Parameters:
        physical_to_logical: [P], or [P] by layer; if all layers have the same order, it counts as one list
        ep_size: R, EP ranks

    Returns:
        digest: 64 hexadecimal digits
    """
    orders: Any = physical_to_logical
    if isinstance(physical_to_logical, Mapping):
        by_layer = {layer: list(order) for layer, order in sorted(physical_to_logical.items())}
        first = next(iter(by_layer.values()), [])
        orders = by_layer if any(order != first for order in by_layer.values()) else first
    return _digest({"ep_size": ep_size, "physical_to_logical": orders if isinstance(orders, dict) else list(orders)})


def encode_placement_file(file: PlacementFile) -> bytes:
    """The bytes of the file, with its `digest` filled in and one line for each key and each layer."""
    filled = msgspec.structs.replace(file, digest=_made_for_digest(file))
    values = msgspec.to_builtins(filled)
    orders = values["physical_to_logical"]
    if isinstance(orders, dict):
        lines = ",\n".join(f"  {json.dumps(layer)}: {json.dumps(order)}" for layer, order in orders.items())
        text = {"physical_to_logical": f"{{\n{lines}\n }}" if orders else "{}"}
    else:
        text = {"physical_to_logical": json.dumps(orders)}
    entries = (f" {json.dumps(key)}: {text.get(key) or json.dumps(value)}" for key, value in values.items())
    return ("{\n" + ",\n".join(entries) + "\n}\n").encode()


def read_placement_file(path: Path) -> PlacementFile:
    """Read the placement file `path`; raise CheckpointError if it holds no placement, or an impossible one."""
    refuse_url(path, CheckpointError)
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise CheckpointError(f"{path}: {size} bytes; expected a placement file of at most {MAX_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read as a placement file: {error.strerror}") from error
    try:
        msgspec.json.decode(data)  # stricter: NaN, for one, is no JSON
        value = json.loads(data, object_pairs_hook=_unique)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a placement file in JSON: {error}") from error
    return placement_file_from_json(value, str(path))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; ValueError for a key that comes twice: nobody can tell which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in found if keys.count(key) > 1)!r:.80} comes twice")
    return found


def placement_file_from_json(value: Any, where: str) -> PlacementFile:
    """Check JSON that was already decoded, and return it as a placement file; `where` names it in errors."""
    if not isinstance(value, dict) or "physical_to_logical" not in value:
        raise CheckpointError(f"{where}: expected a placement file: a JSON object with physical_to_logical")
    if VERSION_KEY in value:
        if value[VERSION_KEY] != VERSION:
            raise CheckpointError(
                f"{where}: {VERSION_KEY} is {value[VERSION_KEY]!r:.80}, but this reshard reads only {VERSION}; upgrade "
                "reshard"
            )
        fields = value
    else:
        fields = _described(value)
    try:
        file = msgspec.convert(fields, PlacementFile)
    except (msgspec.ValidationError, RecursionError) as error:
        raise CheckpointError(f"{where}: not a placement file: {error}") from error
    if fault := _fault(file):
        raise CheckpointError(f"{where}: {fault}")
    return file


def placement_file_schema() -> dict[str, Any]:
    """The JSON schema of the documented form."""
    schema = msgspec.json.schema(PlacementFile)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "reshard placement file", **schema}


def _described(value: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the documented form, taken from any JSON object with `physical_to_logical`."""
    orders, records = value["physical_to_logical"], value.get("moe_layers")
    lists = list(orders.values()) if isinstance(orders, dict) else [orders]
    known = [expert for order in lists if isinstance(order, list) for expert in order if isinstance(expert, int)]
    if isinstance(orders, dict):
        layers = list(orders)
    else:  # a manifest in which all layers have the same order
        layers = [record.get("name") for record in records if isinstance(record, dict)] if records else []
    return {
        "strategy": value.get("strategy", "file"),
        "ep_size": value.get("ep_size"),
        "model_type": value.get("model_type"),
        "num_experts": max(known, default=0) + 1,
        "layers": layers,
        "physical_to_logical": orders,
    }


def _fault(file: PlacementFile) -> str | None:
    """Describe what makes a file inconsistent, as one written by hand may be; None if it is sound."""
    orders = file.physical_to_logical
    if isinstance(orders, dict):
        if not orders:
            return "physical_to_logical has no layer"
        if differing := sorted(orders.keys() ^ set(file.layers)):
            return f"physical_to_logical and layers differ: only one of them has {differing[0]!r:.200}"
    for layer, order in orders.items() if isinstance(orders, dict) else [("all layers", orders)]:
        if len(found := set(order)) != file.num_experts or max(found) != file.num_experts - 1:
            return (
                f"physical_to_logical: {layer}: expected each of the experts 0 to {file.num_experts - 1}, "
                f"found {order!r:.80}"
            )
        if len(order) > file.num_experts and file.ep_size and len(order) % file.ep_size:
            return (
                f"physical_to_logical: {layer}: {len(order)} slots cannot be divided evenly among {file.ep_size} ranks"
            )
    if file.ep_size and file.ep_size > file.num_experts:
        return f"ep_size is {file.ep_size}, but there are {file.num_experts} experts"
    if file.digest is not None and file.digest != _made_for_digest(file):
        return (
            "ep_size, model_type, num_experts or layers were changed after the placement was made (they do not match "
            "its digest); make it again with `reshard export --to vllm`"
        )
    return None


def _made_for_digest(file: PlacementFile) -> str:
    return _digest({key: getattr(file, key) for key in ("ep_size", "model_type", "num_experts", "layers")})


def _digest(value: Any) -> str:
    return blake3(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
