"""Reads a tensor's name: which layer and expert it belongs to, and what its name is after renumbering."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from .families import FUSED_MODULES, ROUTER_TENSORS

EXPERT_ID = re.compile(r"(0|[1-9][0-9]{0,8})\.(.+)", re.DOTALL)
_NUMBER = re.compile(r"[0-9]{1,9}")


class ExpertName(NamedTuple):
    """The parts of an expert tensor's name: `<layer>.experts.<expert>.<leaf>`."""

    layer: str
    expert: int
    leaf: str

    def __str__(self) -> str:
        """The whole name."""
        return f"{self.layer}.experts.{self.expert}.{self.leaf}"


def parse_expert_name(name: str, layers: Container[str]) -> ExpertName | None:
    """The parts of an expert tensor's name; None for any other. `layers` are the names of the MoE layers."""
    layer, _, rest = name.partition(".experts.")
    match = EXPERT_ID.fullmatch(rest)
    return ExpertName(layer, int(match[1]), match[2]) if match and layer in layers else None


def renumber(name: str, tables: Mapping[str, Sequence[int]]) -> str:
    """`name` with its expert id mapped by its layer's table; any other name stays as it is."""
    parsed = parse_expert_name(name, tables)
    if parsed is None or parsed.expert >= len(tables[parsed.layer]):
        return name
    return str(ExpertName(parsed.layer, tables[parsed.layer][parsed.expert], parsed.leaf))


class Kind(Enum):
    """What a tensor belongs to."""

    EXPERT = "expert"
    ROUTER = "router"
    SHARED = "everything else"


def kind_of(name: str, layers: Container[str]) -> Kind:
    """What the tensor `name` belongs to, in a model whose MoE layers are `layers`."""
    layer, _, rest = name.partition(".experts.")
    if rest and layer in layers:
        return Kind.EXPERT
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        if ".".join(parts[:length]) in layers:
            if parts[length] in FUSED_MODULES:
                return Kind.EXPERT
            return Kind.ROUTER if ".".join(parts[length:]) in ROUTER_TENSORS else Kind.SHARED
    return Kind.SHARED


def natural_key(name: str) -> list[tuple[bool, int, str]]:
    """Sort key: `layers.10` comes after `layers.9`, and `mtp.0` after all layers."""
    return [(False, int(part), part) if _NUMBER.fullmatch(part) else (True, 0, part) for part in name.split(".")]
