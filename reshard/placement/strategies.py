"""The strategies that a user may ask for, and the placement that each makes: physical_to_logical [E] per MoE layer.

`Copies` alone makes longer ones, which can be served, but not written to an output.

A strategy is made for a number of EP ranks. It reads no weights and no files: the caller passes what it needs to know
about the model as a `MoeShape`, and recorded traffic or a placement file already loaded. `check_placement` checks every
placement before it is used, whatever made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from ..arguments import check_whole
from ..errors import OutputError
from .balance import balanced_layers
from .copies import spare_fault
from .permutations import Placement, is_permutation, node_zigzag, rank_slots, zigzag
from .placement_file import PlacementFile
from .spare import copied_layers, copies_fault, decoding_sizes, evenly_copied
from .steps import DEFAULT_MIX, Step, describe_mix
from .swaps import Aim
from .time_model import DEFAULT_GPU, ExpertShape, read_gpu

if TYPE_CHECKING:
    from torch import Tensor

NO_GROUPS = (
    "this model's router has no expert groups: zigzag is exact for it, but not expected to help "
    "(the published gains are for models with expert groups)"
)
MIN_TOKENS = 4096  # recorded tokens that `balanced` needs to make a placement
T = TypeVar("T")
LayerProgress = Callable[[Sequence[str]], Iterable[str]]
"""Wraps the names of MoE layers in a progress display, as tqdm does."""


@dataclass(frozen=True, slots=True)
class MoeShape:
    """What a strategy needs to know about a model: its MoE layers by name, E, and its expert groups.

    `where` names the model in error messages.
    """

    where: str
    layers: tuple[str, ...]
    num_experts: int
    n_group: int
    group_limited: bool


@dataclass(frozen=True, slots=True)
class Placed:
    """The placement that a strategy made, and notes for its user."""

    placement: Placement
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Linear:
    """Leaves every expert where it is, as an engine does by default."""

    ep_size: int
    name: ClassVar[str] = "linear"

    def place(self, model: MoeShape) -> Placed:
        """The identity in every layer."""
        return _in_every_layer(model, tuple(range(model.num_experts)))


@dataclass(frozen=True, slots=True)
class Zigzag:
    """Deals experts out round-robin to all ranks."""

    ep_size: int
    name: ClassVar[str] = "zigzag"

    def place(self, model: MoeShape) -> Placed:
        """The same permutation in every layer."""
        placed = _in_every_layer(model, zigzag(model.num_experts, self.ep_size))
        return placed if model.group_limited else Placed(placed.placement, (NO_GROUPS,))


@dataclass(frozen=True, slots=True)
class NodeZigzag:
    """Keeps each expert group on its node, and deals experts out round-robin to the ranks of that node."""

    ep_size: int
    nodes: int
    name: ClassVar[str] = "node-zigzag"

    def place(self, model: MoeShape) -> Placed:
        """The same permutation in every layer. Raises OutputError if groups or experts do not divide evenly."""
        check_whole(self.nodes, f"{model.where}: --nodes")
        per_node = self.ep_size // self.nodes
        faults = {
            f"the model has {model.num_experts} experts and no expert groups; use zigzag instead": (
                not model.group_limited
            ),
            f"{self.ep_size} EP ranks cannot be divided evenly among {self.nodes} nodes": self.ep_size % self.nodes > 0,
            f"its {model.n_group} expert groups cannot be divided evenly among {self.nodes} nodes": (
                model.n_group % self.nodes > 0
            ),
        }
        fault = next((fault for fault, found in faults.items() if found), None)
        if fault is None:
            slots = rank_slots(model.num_experts, self.ep_size)
            counts = [sum(map(len, slots[node * per_node : (node + 1) * per_node])) for node in range(self.nodes)]
            if len(set(counts)) > 1:
                fault = f"with {self.ep_size} EP ranks, the nodes would hold {counts} experts, not equally many"
        if fault:
            raise OutputError(
                f"{model.where}: node-zigzag on {self.nodes} nodes: {fault}; choose another --nodes or --ep"
            )
        return _in_every_layer(model, node_zigzag(model.num_experts, self.ep_size, self.nodes))


@dataclass(frozen=True, slots=True)
class Balanced:
    """Places experts by the traffic recorded in the directory `trace`; see `balance`.

    As far as balance allows, it prefers placements with which tokens reach few of the `nodes` nodes. The placement is
    made from the first `share` of every recording; the rest can judge it. `progress` wraps the layers' names. The time
    that it minimizes is that of the steps in `mix` on `gpu`, a name or a file as in `time_model.read_gpu`.
    """

    ep_size: int
    trace: str | Path
    nodes: int = 1
    share: float = 1.0
    progress: LayerProgress = field(default=iter, compare=False)
    gpu: str = DEFAULT_GPU
    mix: tuple[Step, ...] = DEFAULT_MIX
    name: ClassVar[str] = "balanced"

    @property
    def request(self) -> str:
        """The options, as text. When more traffic has been recorded, they give another placement."""
        where = f"{self.nodes} nodes of {self.gpu} for {describe_mix(self.mix)}"
        return f"balanced on {where} from the first {self.share} of {Path(self.trace).absolute()}"

    def place(self, model: MoeShape, expert: ExpertShape, traffic: Mapping[str, Tensor]) -> Placed:
        """Each layer's own permutation; zigzag for a layer without traffic.

        Parameters:
            model: the model to place
            expert: the size of its experts
            traffic: ids_TK of each layer, the logical experts that each token chose

        Raises OutputError if nodes do not divide the ranks, or the trace is too short.

        """
        check_whole(self.nodes, f"{model.where}: --nodes")
        if self.ep_size % self.nodes:
            raise OutputError(
                f"{model.where}: balanced on {self.nodes} nodes: {self.ep_size} EP ranks cannot be divided evenly "
                "among them; choose another --nodes or --ep"
            )
        _refuse_short(traffic, self)
        recorded = [traffic[layer] for layer in model.layers if layer in traffic]
        aim = Aim(self.mix, expert, read_gpu(self.gpu))
        balanced = balanced_layers(recorded, model.num_experts, self.ep_size, aim, self.nodes)
        placement = {
            layer: next(balanced) if layer in traffic else zigzag(model.num_experts, self.ep_size)
            for layer in self.progress(model.layers)
        }
        return Placed(placement, _without_traffic(model, traffic, self.trace, "zigzag"))


@dataclass(frozen=True, slots=True)
class Copies:
    """Gives each rank `spare` more slots, for copies of experts; each batch chooses which copy serves it. See `copies`.

    The placement is made from the first `share` of every recording in `trace`, so that decoding steps of `mix` take
    little time on `gpu`, as for `Balanced`. Without a trace, copies are spread evenly over ranks and expert groups.
    """

    ep_size: int
    spare: int
    trace: str | Path | None = None
    share: float = 1.0
    progress: LayerProgress = field(default=iter, compare=False)
    gpu: str = DEFAULT_GPU
    mix: tuple[Step, ...] = DEFAULT_MIX
    name: ClassVar[str] = "copies"

    def place(self, model: MoeShape, expert: ExpertShape, traffic: Mapping[str, Tensor]) -> Placed:
        """Each layer's physical_to_logical [E + R * S]; evenly spread copies for a layer without traffic.

        Parameters and errors are those of `Balanced.place`; also raises OutputError if the spare slots do not fit.
        """
        check_whole(self.spare, f"{model.where}: --spare")
        if fault := spare_fault(model.num_experts, self.ep_size, self.spare):
            raise OutputError(f"{model.where}: {fault}")
        aim = Aim(self.mix, expert, read_gpu(self.gpu))
        decoding_sizes(aim)
        evenly = evenly_copied(model.num_experts, self.ep_size, self.spare)
        if self.trace is None:
            note = "no trace: copies are spread evenly; copies of the experts that your traffic uses most gain more"
            return Placed(dict.fromkeys(model.layers, evenly), (note,))
        _refuse_short(traffic, self)
        recorded = [traffic[layer] for layer in model.layers if layer in traffic]
        copied = copied_layers(recorded, model.num_experts, self.ep_size, self.spare, aim)
        placement = {layer: next(copied) if layer in traffic else evenly for layer in self.progress(model.layers)}
        return Placed(placement, _without_traffic(model, traffic, self.trace, "zigzag and evenly spread copies"))


@dataclass(frozen=True, slots=True)
class FromFile:
    """Takes the placement in the file `path`: a placement file, a manifest, or any JSON with `physical_to_logical`."""

    ep_size: int
    path: str | Path
    name: ClassVar[str] = "file"

    def place(self, model: MoeShape, file: PlacementFile) -> Placed:
        """The permutations in `file`, which was read from `path`.

        Raises OutputError if it is of other layers, or some expert has copies in it.
        """
        orders = file.physical_to_logical
        by_layer = orders if isinstance(orders, dict) else dict.fromkeys(model.layers, orders)
        if strange := sorted(by_layer.keys() ^ set(model.layers)):
            what = "is not a MoE layer" if strange[0] in by_layer else "has no placement"
            raise OutputError(
                f"{self.path}: physical_to_logical: {strange[0]!r:.200} {what}; {model.where} has {len(model.layers)} "
                f"MoE layers, {model.layers[0]} to {model.layers[-1]}, and each needs one"
            )
        if file.has_copies:
            raise OutputError(
                f"{self.path}: some experts have copies in it, and an output has each expert once; expected "
                f"permutations of the {model.num_experts} experts"
            )
        other = file.ep_size not in (None, self.ep_size)
        notes = (f"{self.path} was made for {file.ep_size} EP ranks, not {self.ep_size}",) if other else ()
        return Placed({name: tuple(by_layer[name]) for name in model.layers}, notes)


Strategy = Linear | Zigzag | NodeZigzag | Balanced | Copies | FromFile
"""Each has a `name`, as on the command line and in the manifest, and an `ep_size`, R."""


def check_placement(placement: Placement, model: MoeShape) -> None:
    """OutputError unless `placement` has a permutation of the model's experts for each of its MoE layers."""
    if sorted(placement) != sorted(model.layers):
        raise OutputError(f"{model.where}: expected a placement for each of its {len(model.layers)} MoE layers")
    for layer, permutation in placement.items():
        if len(permutation) != model.num_experts or not is_permutation(permutation):
            raise OutputError(
                f"{model.where}: {layer}: expected a permutation of 0 to {model.num_experts - 1}, found "
                f"{list(permutation)!r:.80}"
            )


def check_copies(placement: Placement, model: MoeShape, strategy: Copies) -> None:
    """OutputError unless `placement` fills the slots of `strategy` in every layer, with no expert twice on a rank."""
    for layer in model.layers:
        if fault := copies_fault(placement[layer], model.num_experts, strategy.ep_size, strategy.spare):
            raise OutputError(f"{model.where}: {layer}: {fault}")


@dataclass(frozen=True, slots=True)
class Options:
    """What the user may give a strategy beside the number of EP ranks; its `Offer` says which of these it takes."""

    nodes: int | None = None
    trace: Path | None = None
    map: Path | None = None
    gpu: str | None = None
    mix: tuple[Step, ...] | None = None
    spare: int | None = None
    share: float = 1.0
    progress: LayerProgress = iter


@dataclass(frozen=True, slots=True)
class Offer:
    """How to make a strategy, and which of the options it needs, or takes if given."""

    make: Callable[[int, Options], Strategy]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


def _balanced(ep_size: int, options: Options) -> Strategy:
    return Balanced(
        ep_size,
        _given(options.trace),
        options.nodes or 1,
        options.share,
        options.progress,
        options.gpu or DEFAULT_GPU,
        options.mix or DEFAULT_MIX,
    )


def _copies(ep_size: int, options: Options) -> Strategy:
    return Copies(
        ep_size,
        _given(options.spare),
        options.trace,
        options.share,
        options.progress,
        options.gpu or DEFAULT_GPU,
        options.mix or DEFAULT_MIX,
    )


# By name, in the order in which they are shown.
STRATEGIES: Mapping[str, Offer] = {
    Linear.name: Offer(lambda ep_size, options: Linear(ep_size)),
    Zigzag.name: Offer(lambda ep_size, options: Zigzag(ep_size)),
    NodeZigzag.name: Offer(lambda ep_size, options: NodeZigzag(ep_size, _given(options.nodes)), needs=("nodes",)),
    Balanced.name: Offer(_balanced, needs=("trace",), takes=("nodes", "gpu", "mix")),
    FromFile.name: Offer(lambda ep_size, options: FromFile(ep_size, _given(options.map)), needs=("map",)),
    Copies.name: Offer(_copies, needs=("spare",), takes=("trace", "gpu", "mix")),
}


def _given(value: T | None) -> T:
    if value is None:
        raise OutputError("an option that this strategy needs is missing; see reshard.placement.strategies.STRATEGIES")
    return value


def _refuse_short(traffic: Mapping[str, Tensor], strategy: Balanced | Copies) -> None:
    """OutputError if a placement cannot be made from so few tokens."""
    tokens = min(map(len, traffic.values()), default=0)
    if tokens < MIN_TOKENS:
        share = strategy.share
        part = "recorded" if share == 1 else f"in its first {share:.0%}, which the placement is made from"
        raise OutputError(
            f"{strategy.trace}: {tokens} tokens {part}; {strategy.name} needs at least {MIN_TOKENS}: record more of "
            "the traffic that the model serves"
        )


def _without_traffic(model: MoeShape, traffic: Mapping[str, Tensor], trace: object, got: str) -> tuple[str, ...]:
    """A note of the layers that have no traffic in `trace`, if there are any."""
    without = [layer for layer in model.layers if layer not in traffic]
    names = ", ".join(without[:3]) + (f" and {len(without) - 3} more" if len(without) > 3 else "")
    return (f"{trace} has no traffic of {names}: these layers got {got}",) if without else ()


def _in_every_layer(model: MoeShape, physical_to_logical: tuple[int, ...]) -> Placed:
    return Placed(dict.fromkeys(model.layers, physical_to_logical))
