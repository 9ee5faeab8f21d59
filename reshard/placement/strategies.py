"""What a user may ask for, and the placement that it makes of a model: physical_to_logical [E] for each MoE layer.

A strategy is made for a number of EP ranks and knows nothing of weights. Whatever made a placement, `check_placement`
looks at it before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from ..checkpoint.directory import read_json_object
from ..errors import OutputError
from ..model.layers import MoeLayer, MoeModel
from ..traffic.choices import recorded_traffic
from .balance import balanced_layers
from .contract import Placement
from .permutations import is_permutation, node_zigzag, rank_slots, zigzag

NO_GROUPS = (
    "this model's router has no expert groups: zigzag is exact for it, but not expected to help "
    "(the published gains are for models with expert groups)"
)
LEAST_TOKENS = 4096  # of a trace that a placement is made for
T = TypeVar("T")
Progress = Callable[[Sequence[MoeLayer]], Iterable[MoeLayer]]


@dataclass(frozen=True, slots=True)
class Placed:
    """What a strategy made of a model, and what its user should know of that."""

    placement: Placement
    notes: tuple[str, ...] = ()


class Strategy(Protocol):
    """Where experts shall live."""

    @property
    def name(self) -> str:
        """As on the command line, and in the manifest."""
        ...

    @property
    def ep_size(self) -> int:
        """R, EP ranks."""
        ...

    def place(self, model: MoeModel, root: Path) -> Placed:
        """The placement of the model in `root`, or OutputError for one that the strategy does not fit."""
        ...


@dataclass(frozen=True, slots=True)
class Linear:
    """Experts left where they are: what an engine does by itself."""

    ep_size: int
    name: ClassVar[str] = "linear"

    def place(self, model: MoeModel, root: Path) -> Placed:
        """The same permutation in every layer, and it changes nothing."""
        return _in_every_layer(model, tuple(range(model.routing.num_experts)))


@dataclass(frozen=True, slots=True)
class Zigzag:
    """Experts dealt round-robin to ranks."""

    ep_size: int
    name: ClassVar[str] = "zigzag"

    def place(self, model: MoeModel, root: Path) -> Placed:
        """The same permutation in every layer."""
        placed = _in_every_layer(model, zigzag(model.routing.num_experts, self.ep_size))
        return placed if model.routing.group_limited else Placed(placed.placement, (NO_GROUPS,))


@dataclass(frozen=True, slots=True)
class NodeZigzag:
    """Groups of experts left on their node, and dealt round-robin to the ranks of that node."""

    ep_size: int
    nodes: int
    name: ClassVar[str] = "node-zigzag"

    def place(self, model: MoeModel, root: Path) -> Placed:
        """The same permutation in every layer; OutputError where groups or experts do not come out even."""
        routing, per_node = model.routing, self.ep_size // self.nodes
        faults = {
            f"it has {routing.num_experts} experts and no expert groups; without groups zigzag is all there is": (
                not routing.group_limited
            ),
            f"{self.ep_size} EP ranks are not the same number on each of {self.nodes} nodes": (
                self.ep_size % self.nodes > 0
            ),
            f"its {routing.n_group} expert groups are not the same number on each of {self.nodes} nodes": (
                routing.n_group % self.nodes > 0
            ),
        }
        fault = next((fault for fault, found in faults.items() if found), None)
        if fault is None:
            slots = rank_slots(routing.num_experts, self.ep_size)
            held = [sum(map(len, slots[node * per_node : (node + 1) * per_node])) for node in range(self.nodes)]
            if len(set(held)) > 1:
                fault = f"{self.ep_size} EP ranks of its {routing.num_experts} experts make nodes of {held} experts"
        if fault:
            raise OutputError(f"{root}: node-zigzag on {self.nodes} nodes: {fault}; choose another --nodes or --ep")
        return _in_every_layer(model, node_zigzag(routing.num_experts, self.ep_size, self.nodes))


@dataclass(frozen=True, slots=True)
class Balanced:
    """Experts where the traffic recorded in the directory `trace` wants them; see `balance`.

    A token's experts are kept on few of `nodes` nodes, as far as balance allows. `share` is the part of every
    recording, from its beginning on, that the placement is made from: the rest can judge it. `progress` wraps the
    layers that one waits for, as tqdm does.
    """

    ep_size: int
    trace: Path
    nodes: int = 1
    share: float = 1.0
    progress: Progress = field(default=iter, compare=False)
    name: ClassVar[str] = "balanced"

    def place(self, model: MoeModel, root: Path) -> Placed:
        """Each layer's own permutation, and zigzag where a layer was not recorded.

        TraceError for a directory that is no trace of this model, OutputError for nodes that do not divide the
        ranks and for a trace that is too short.
        """
        if self.nodes < 1 or self.ep_size % self.nodes:
            raise OutputError(
                f"{root}: balanced on {self.nodes} nodes: {self.ep_size} EP ranks are not the same number on each; "
                "choose another --nodes or --ep"
            )
        traffic = recorded_traffic(self.trace, model, root, end=self.share)
        if traffic.tokens < LEAST_TOKENS:
            part = "were recorded" if self.share == 1 else f"are in the {self.share:.0%} that it is to be made from"
            raise OutputError(
                f"{self.trace}: {traffic.tokens} tokens {part}, and balanced needs at least {LEAST_TOKENS}; record "
                "more of what the model is used for"
            )
        recorded = traffic.ids
        experts = model.routing.num_experts
        found = balanced_layers(
            [recorded[layer.name] for layer in model.layers if layer.name in recorded],
            experts,
            self.ep_size,
            self.nodes,
        )
        placement, without = {}, []
        for layer in self.progress(model.layers):
            if layer.name in recorded:
                placement[layer.name] = next(found)
            else:
                placement[layer.name] = zigzag(experts, self.ep_size)
                without.append(layer.name)
        if not without:
            return Placed(placement)
        names = ", ".join(without[:3]) + (f" and {len(without) - 3} more" if len(without) > 3 else "")
        return Placed(placement, (f"{self.trace} has no traffic of {names}: zigzag there",))


@dataclass(frozen=True, slots=True)
class FromFile:
    """Whatever the JSON file `path` says: an object with `physical_to_logical`, such as a manifest.

    That is one list [E] for all MoE layers, or an object that has one for each layer by name (`model.layers.3.mlp`).
    """

    ep_size: int
    path: Path
    name: ClassVar[str] = "file"

    def place(self, model: MoeModel, root: Path) -> Placed:
        """Each layer's own permutation; CheckpointError for a file of another shape, OutputError for other layers."""
        found = read_json_object(self.path).get("physical_to_logical")
        names = [layer.name for layer in model.layers]
        by_layer: dict[str, Any] = found if isinstance(found, dict) else dict.fromkeys(names, found)
        if strange := sorted(by_layer.keys() ^ set(names)):
            what = "is no MoE layer" if strange[0] in by_layer else "has no placement"
            raise OutputError(
                f"{self.path}: physical_to_logical: {strange[0]!r:.200} {what}; {root} has {len(names)} MoE layers, "
                f"{names[0]} to {names[-1]}, and each needs one"
            )
        for name, permutation in by_layer.items():
            if not isinstance(permutation, list) or not all(type(expert) is int for expert in permutation):
                raise OutputError(
                    f"{self.path}: physical_to_logical: {name}: expected a list of the {model.routing.num_experts} "
                    f"logical experts in the order of physical ones, found {permutation!r:.80}"
                )
        return Placed({name: tuple(by_layer[name]) for name in names})


def check_placement(placement: Placement, model: MoeModel, root: Path) -> None:
    """OutputError unless `placement` has a permutation of its experts for each MoE layer of the model in `root`."""
    num_experts = model.routing.num_experts
    if sorted(placement) != sorted(layer.name for layer in model.layers):
        raise OutputError(f"{root}: expected a placement for each of its {len(model.layers)} MoE layers")
    for layer, permutation in placement.items():
        if len(permutation) != num_experts or not is_permutation(permutation):
            raise OutputError(
                f"{root}: {layer}: expected a permutation of 0 to {num_experts - 1}, found {list(permutation)!r:.80}"
            )


@dataclass(frozen=True, slots=True)
class Options:
    """What strategies may be given beside the number of EP ranks; see those that take it."""

    nodes: int | None = None
    trace: Path | None = None
    map: Path | None = None
    share: float = 1.0
    progress: Progress = iter


@dataclass(frozen=True, slots=True)
class Offer:
    """How a strategy is made, and which of `nodes`, `trace` and `map` it needs, or takes if given."""

    make: Callable[[int, Options], Strategy]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


def _balanced(ep_size: int, options: Options) -> Strategy:
    return Balanced(ep_size, _given(options.trace), options.nodes or 1, options.share, options.progress)


# By name, in the order in which they are shown.
STRATEGIES: Mapping[str, Offer] = {
    Linear.name: Offer(lambda ep_size, options: Linear(ep_size)),
    Zigzag.name: Offer(lambda ep_size, options: Zigzag(ep_size)),
    NodeZigzag.name: Offer(lambda ep_size, options: NodeZigzag(ep_size, _given(options.nodes)), needs=("nodes",)),
    Balanced.name: Offer(_balanced, needs=("trace",), takes=("nodes",)),
    FromFile.name: Offer(lambda ep_size, options: FromFile(ep_size, _given(options.map)), needs=("map",)),
}


def _given(value: T | None) -> T:
    if value is None:
        raise OutputError("a strategy was not given what it needs; see reshard.placement.strategies.STRATEGIES")
    return value


def _in_every_layer(model: MoeModel, physical_to_logical: tuple[int, ...]) -> Placed:
    return Placed(dict.fromkeys((layer.name for layer in model.layers), physical_to_logical))
