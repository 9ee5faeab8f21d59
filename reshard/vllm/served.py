"""What travels in vLLM's configuration to every process: the placement of an original, or the contract of an output.

The placement is stored in `VllmConfig.additional_config["reshard"]`, the contract in `hf_config.expert_placement`. Both
are dictionaries of JSON values, so that vLLM's compile cache includes them in its key. To unpickle one, a process needs
reshard, and registers the plugin. So a worker without reshard fails with ModuleNotFoundError, and cannot serve linear
beside ranks with the placement, or an output as if it were the original.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedError
from ..placement.layer_names import find_layer, layer_key
from ..placement.permutations import node_zigzag, zigzag
from ..placement.placement_file import PlacementFile, placement_digest

KEY = "reshard"  # in additional_config
ZIGZAG, NODE_ZIGZAG = "zigzag", "node-zigzag"


@dataclass(frozen=True, slots=True)
class Build:
    """What vLLM is loading. A draft has a model of its own, and may have its own ways to load and to run."""

    vllm_config: Any
    model_config: Any  # of the model itself: the other one may be its target's
    load_config: Any


_build: ContextVar[Build | None] = ContextVar("build", default=None)


class Travelling(dict[str, Any]):
    """JSON values that can be unpickled only where reshard is, and then register the plugin. Copies keep the class."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Travelling:
        return type(self)(copy.deepcopy(dict(self), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (type(self), dict(self))


class ServedContract(Travelling):
    """An output's contract, as config.json has it."""


class ServedPlacement(Travelling):
    """A resolved placement; `served_strategy` and `served_file` make it, and its properties describe it."""

    @property
    def asked(self) -> str:
        """The placement as the user requested it."""
        return str(self["placement"])

    @property
    def ep_size(self) -> int:
        """R, the number of EP ranks that it was resolved for."""
        return int(self["ep_size"])

    @property
    def digest(self) -> str:
        """The digest that the log shows; see `placement_file.placement_digest`."""
        return str(self["digest"])

    @property
    def agreed(self) -> str:
        """The digest that ranks compare: of all that decides where experts are, those of drafts included.

        Paths may differ among nodes.
        """
        decides = {key: value for key, value in self.items() if key not in ("placement", "make")}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    @property
    def is_linear(self) -> bool:
        """Whether every expert stays where it is without a placement."""
        orders = self["physical_to_logical"]
        every = orders.values() if isinstance(orders, dict) else [orders]
        return all(list(order) == sorted(order) for order in every)

    @property
    def redundant(self) -> int:
        """How many more slots than experts each layer has: its redundant experts. 0 if no expert has copies."""
        return int(self["redundant"])

    @property
    def rearranges(self) -> bool:
        """Whether vLLM's EPLB, if it is on, moves experts while it serves."""
        return bool(self["rearrange"])

    @property
    def num_layers(self) -> int:
        """Number of layers of the model itself; layers from this number on belong to a draft."""
        return int(self["num_layers"])

    def order(self, layer: str, num_experts: int, *, draft: bool = False) -> tuple[int, ...] | None:
        """The placement of one layer.

        Parameters:
            layer: its name in vLLM or in the checkpoint, or the name of one of its tensors
            num_experts: E of that layer
            draft: whether it is known to belong to a draft, whatever its name

        Returns:
            physical_to_logical [E + redundant]; None for a draft's layer that the placement does not contain: it stays
            linear

        Raises:
            UnsupportedError: the placement lacks a layer of the model itself, or has another number of experts for it
        """
        nodes = self["nodes"]
        if nodes is not None:  # a strategy fits any layer
            even = num_experts % self.ep_size == 0
            return node_zigzag(num_experts, self.ep_size, nodes) if even else zigzag(num_experts, self.ep_size)
        orders, layers = self["physical_to_logical"], self["layers"]
        order = None
        if not layers:  # one order for all layers, whatever their names
            order = orders
        elif (name := find_layer(layer, layers, self.num_layers)) is not None:
            order = orders[name] if isinstance(orders, dict) else orders
        if order is not None and len(order) == num_experts + self.redundant:
            return tuple(order)
        if draft or layer_key(layer, self.num_layers).kind == "draft":
            return None
        expected = f"has {num_experts} experts" + (f" and {self.redundant} copies" if self.redundant else "")
        found = f"{expected}, but the placement {len(order)}" if order else "is not in the placement"
        raise UnsupportedError(f"{self.asked}: layer {layer} {found}; {self['make']}")


def _unpickle(kind: type[Travelling], values: dict[str, Any]) -> Travelling:
    from . import register

    register()
    return kind(values)


def served_strategy(
    asked: str, nodes: int, num_experts: int, ep_size: int, num_layers: int, *, rearrange: bool = True
) -> ServedPlacement:
    """Zigzag among `nodes` nodes, for a model with `num_experts` experts per layer."""
    order = zigzag(num_experts, ep_size) if nodes == 1 else node_zigzag(num_experts, ep_size, nodes)
    return ServedPlacement(
        placement=asked,
        ep_size=ep_size,
        nodes=nodes,
        physical_to_logical=list(order),
        layers=[],
        num_layers=num_layers,
        redundant=0,
        rearrange=rearrange,
        digest=placement_digest(order, ep_size),
        make="",
    )


def served_file(
    asked: str, file: PlacementFile, ep_size: int, num_layers: int, make: str, *, rearrange: bool = True
) -> ServedPlacement:
    """The placement of a file, whose layers have equally many slots; `make` tells in errors how to make one that fits.

    `rearrange`: whether vLLM's EPLB moves experts while it serves.
    """
    orders = file.physical_to_logical
    return ServedPlacement(
        placement=asked,
        ep_size=ep_size,
        nodes=None,
        physical_to_logical=orders,
        layers=file.layers,
        num_layers=num_layers,
        redundant=len(file.orders[0]) - file.num_experts,
        rearrange=rearrange,
        digest=placement_digest(orders, ep_size),
        make=make,
    )


@contextlib.contextmanager
def building(build: Build) -> Iterator[None]:
    """Context in which vLLM builds a model and loads its weights."""
    token = _build.set(build)
    try:
        yield
    finally:
        _build.reset(token)


def current_build() -> Build:
    """The model that vLLM is building; outside of its usual loaders, the model of vLLM's current configuration."""
    if (build := _build.get()) is not None:
        return build
    from vllm.config import get_current_vllm_config

    config = get_current_vllm_config()
    return Build(config, config.model_config, config.load_config)


def is_building() -> bool:
    """Whether one of vLLM's usual loaders is at work, so that what it loads is checked."""
    return _build.get() is not None


def builds_draft() -> bool:
    """Whether vLLM is building a draft; its layers need not be in the placement."""
    build = _build.get()
    return build is not None and getattr(build.model_config, "runner_type", None) == "draft"


def served_placement(config: Any) -> ServedPlacement | None:
    """The placement in a VllmConfig, None if the model is served without one."""
    more = getattr(config, "additional_config", None)
    found = more.get(KEY) if isinstance(more, Mapping) else None
    return found if isinstance(found, ServedPlacement) else None


def current_placement() -> ServedPlacement | None:
    """The placement of the model that vLLM is building, None if it has none."""
    return served_placement(current_build().vllm_config)
