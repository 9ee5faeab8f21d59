"""A placement as a file: JSON, no weights. `RESHARD_PLACEMENT`, `--map` and `reshard export --to vllm` share it.

`PlacementFile` is the documented form, and `placement.schema.json` is generated from it. Any other JSON object that has
`physical_to_logical` is read too: a manifest, or a few lines that a user wrote. What such an object does not say is
None, and fits everything.

`physical_to_logical` may be longer than there are experts: an expert that stands in several places has copies. The form
allows it so that files stay readable; who cannot place copies says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from blake3 import blake3

from ..errors import CheckpointError

VERSION_KEY = "reshard_placement"
VERSION = 1
MAX_BYTES = 256 << 20  # of such a file; DeepSeek-R1's is 60 KB

Positive = Annotated[int, msgspec.Meta(ge=1)]
Expert = Annotated[int, msgspec.Meta(ge=0)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Orders = list[Expert] | dict[str, list[Expert]]
"""One list [P] for all MoE layers, or one for each by name; P is E, or more where experts have copies."""


class PlacementFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The documented form. A null fits every model, or every number of EP ranks.

    `physical_to_logical` has, for each slot in the order of EP ranks, the expert's id in the original: one list for all
    MoE layers, or one for each by name (`model.layers.3.mlp`). It is longer than `num_experts` where experts have
    copies. `layers` are all MoE layers that the placement was made for. `digest` is BLAKE3 of what the placement was
    made for (`ep_size`, `model_type`, `num_experts`, `layers`), so that an edit of these is noticed.
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
        """Whether some expert stands in more than one slot."""
        return any(len(order) > self.num_experts for order in self.orders)

    @property
    def orders(self) -> list[list[int]]:
        """The lists that `physical_to_logical` has."""
        found = self.physical_to_logical
        return list(found.values()) if isinstance(found, dict) else [found]

    @property
    def placement_digest(self) -> str:
        """See the function of that name."""
        return placement_digest(self.physical_to_logical, self.ep_size)


def placement_digest(physical_to_logical: Mapping[str, Sequence[int]] | Sequence[int], ep_size: int | None) -> str:
    """BLAKE3 of a placement in canonical form: equal placements have equal digests, whoever wrote them.

    Parameters:
        physical_to_logical: [P], or by layer [P]; layers that all have the same order count as one list
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
    """The bytes of the file, its `digest` filled in: a line for each key, and for each layer."""
    filled = msgspec.structs.replace(file, digest=_made_for(file))
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
    """The placement in the file `path`; CheckpointError where it has none, or one that cannot be."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise CheckpointError(f"{path}: {size} bytes; expected a placement file, at most {MAX_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read as a placement file: {error.strerror}") from error
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: expected a placement file, which is JSON: {error}") from error
    return placement_file_from_json(value, str(path))


def placement_file_from_json(value: Any, where: str) -> PlacementFile:
    """The same for JSON that was read already; `where` names it in errors."""
    if not isinstance(value, dict) or "physical_to_logical" not in value:
        raise CheckpointError(f"{where}: expected a placement file: a JSON object with physical_to_logical")
    if VERSION_KEY in value:
        if value[VERSION_KEY] != VERSION:
            raise CheckpointError(
                f"{where}: {VERSION_KEY} is {value[VERSION_KEY]!r:.80}, this reshard reads {VERSION}; upgrade reshard"
            )
        fields = value
    else:
        fields = _described(value)
    try:
        file = msgspec.convert(fields, PlacementFile)
    except (msgspec.ValidationError, RecursionError) as error:
        raise CheckpointError(f"{where}: not a placement file: {error}") from error
    if wrong := _inconsistency(file):
        raise CheckpointError(f"{where}: {wrong}")
    return file


def placement_file_schema() -> dict[str, Any]:
    """The JSON schema of the documented form."""
    schema = msgspec.json.schema(PlacementFile)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "reshard placement file", **schema}


def _described(value: Mapping[str, Any]) -> dict[str, Any]:
    """What any JSON object with `physical_to_logical` says, as the documented form has it."""
    orders, records = value["physical_to_logical"], value.get("moe_layers")
    lists = list(orders.values()) if isinstance(orders, dict) else [orders]
    known = [expert for order in lists if isinstance(order, list) for expert in order if isinstance(expert, int)]
    if isinstance(orders, dict):
        layers = list(orders)
    else:  # a manifest, whose layers all have one order
        layers = [record.get("name") for record in records if isinstance(record, dict)] if records else []
    return {
        "strategy": value.get("strategy", "file"),
        "ep_size": value.get("ep_size"),
        "model_type": value.get("model_type"),
        "num_experts": max(known, default=0) + 1,
        "layers": layers,
        "physical_to_logical": orders,
    }


def _inconsistency(file: PlacementFile) -> str | None:
    """What a file that was not written by reshard may have wrong, in words."""
    named = file.physical_to_logical
    if isinstance(named, dict):
        if not named:
            return "physical_to_logical has no layer"
        if strange := sorted(named.keys() ^ set(file.layers)):
            return f"physical_to_logical and layers differ: {strange[0]!r:.200} is in one of them only"
    for layer, order in named.items() if isinstance(named, dict) else [("all layers", named)]:
        if set(order) != set(range(file.num_experts)):
            return (
                f"physical_to_logical: {layer}: expected each of the experts 0 to {file.num_experts - 1}, "
                f"found {order!r:.80}"
            )
        if len(order) > file.num_experts and file.ep_size and len(order) % file.ep_size:
            return f"physical_to_logical: {layer}: {len(order)} slots are not the same number on {file.ep_size} ranks"
    if file.ep_size and file.ep_size > file.num_experts:
        return f"ep_size is {file.ep_size}, but there are {file.num_experts} experts"
    if file.digest is not None and file.digest != _made_for(file):
        return (
            "ep_size, model_type, num_experts or layers were changed after the placement was made (its digest is of "
            "others); make it again with `reshard export --to vllm`"
        )
    return None


def _made_for(file: PlacementFile) -> str:
    return _digest({key: getattr(file, key) for key in ("ep_size", "model_type", "num_experts", "layers")})


def _digest(value: Any) -> str:
    return blake3(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
