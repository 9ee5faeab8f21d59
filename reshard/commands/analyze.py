"""What placements would do to a checkpoint's load, before anything is written: `reshard analyze`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..checkpoint.directory import Checkpoint, read_checkpoint
from ..checkpoint.source import find_source
from ..errors import OutputError
from ..model.layers import MoeModel, Routing, read_model
from ..placement.contract import Placement
from ..placement.permutations import rank_slots
from ..placement.strategies import Strategy, check_placement
from ..traffic.choices import MOST_TOKENS, random_traffic, recorded_traffic
from ..traffic.effect import Coselection, Effect, coselection, effect, mean_coselection, mean_effect
from .place import check_ep_size, refuse_resharded

if TYPE_CHECKING:
    from torch import Tensor

RANDOM_TOKENS = 4096
BATCH_SIZES = tuple(2**exponent for exponent in range(13))
MOST_RUNS = 32  # of experts told apart where tokens choose them together: more can be seen by nobody


@runtime_checkable
class Fitted(Protocol):
    """A strategy that is made from the first `share` (0 to 1) of every recording: only the rest may judge it."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    @property
    def share(self) -> float:
        """Of the trace's tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Candidate:
    """One placement's effect: on average over layers, and on each MoE layer by name."""

    strategy: str
    mean: Effect
    layers: dict[str, Effect]


@dataclass(frozen=True, slots=True)
class Together:
    """Which experts tokens choose together, whatever the placement: on average over layers, and in each by name.

    `runs` are the first and last expert of each run of experts that is told apart: the model's groups where
    `are_groups`, else as many as EP ranks.
    """

    runs: tuple[tuple[int, int], ...]
    are_groups: bool
    mean: Coselection
    layers: dict[str, Coselection]


@dataclass(frozen=True, slots=True)
class Analysis:
    """What was measured. `traffic` says in words whose choices these are; others are compared with the first candidate.

    `unrecorded` are the MoE layers that a trace lacks, of which nothing is said; `unfit` the strategies that do not fit
    the model, the ranks or the trace, and why.
    """

    path: Path
    family: str
    num_experts: int
    top_k: int
    n_group: int
    topk_group: int
    ep_size: int
    nodes: int
    tokens: int
    traffic: str
    lower_bound: bool
    unrecorded: tuple[str, ...]
    unfit: dict[str, str]
    batch_sizes: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    together: Together

    @property
    def layers(self) -> tuple[str, ...]:
        """The MoE layers that were measured, in order."""
        return tuple(self.together.layers)


@dataclass(frozen=True, slots=True)
class _Judged:
    """The choices that candidates are judged by, and what `Analysis` says of them."""

    ids: dict[str, Tensor]
    tokens: int
    words: str
    lower_bound: bool
    unrecorded: tuple[str, ...] = ()


def analyze(
    src: str | Path,
    strategies: Sequence[Strategy],
    *,
    nodes: int = 1,
    trace: str | Path | None = None,
    tokens: int | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seed: int = 0,
    progress: Callable[[int], None] = lambda layers: None,
) -> Analysis:
    """See how placements would spread what the gates of the checkpoint `src` choose.

    Reads the gates and no other weights, and routes random hidden states through them; with `trace` reads none, and
    takes the choices recorded there.

    Parameters:
        src: directory, or repository id in the Hugging Face cache
        strategies: all for the same number of EP ranks
        nodes: that these are spread over
        trace: directory of a trace
        tokens: how many at most; None for RANDOM_TOKENS, or traffic.MOST_TOKENS with a trace
        batch_sizes: in tokens; those larger than what there is are left out
        seed: of the random hidden states
        progress: called with the number of layers routed

    Raises:
        CheckpointError, UnsupportedError: as `plan_placement` does
        TraceError: the trace is none, or another model's
        OutputError: ranks, nodes or tokens do not fit, or none of the strategies does

    """
    root = find_source(src)
    refuse_resharded(root)
    checkpoint = read_checkpoint(root)
    model = read_model(checkpoint)
    routing = model.routing
    (ep_size,) = {strategy.ep_size for strategy in strategies}
    check_ep_size(ep_size, routing.num_experts, root)
    if nodes < 1 or ep_size % nodes:
        raise OutputError(f"{root}: --nodes must divide the {ep_size} EP ranks, found {nodes}")
    placements, unfit = _place(strategies, model, root)
    if trace is None:
        judged = _random(checkpoint, model, tokens or RANDOM_TOKENS, seed, progress)
    else:
        fitted = [strategy for strategy in strategies if isinstance(strategy, Fitted) and strategy.name in placements]
        judged = _recorded(Path(trace), model, root, tokens or MOST_TOKENS, fitted)
    sizes = tuple(size for size in batch_sizes if 1 <= size <= judged.tokens)
    if not sizes:
        raise OutputError(
            f"{root}: no batch of {', '.join(map(str, batch_sizes))} tokens can be had from {judged.tokens}"
        )
    candidates = []
    for name, placement in placements.items():
        layers = {layer: effect(ids, placement[layer], ep_size, nodes, sizes) for layer, ids in judged.ids.items()}
        candidates.append(Candidate(name, mean_effect(list(layers.values())), layers))
    return Analysis(
        path=root,
        family=model.family.name,
        num_experts=routing.num_experts,
        top_k=routing.top_k,
        n_group=routing.n_group,
        topk_group=routing.topk_group,
        ep_size=ep_size,
        nodes=nodes,
        tokens=judged.tokens,
        traffic=judged.words,
        lower_bound=judged.lower_bound,
        unrecorded=judged.unrecorded,
        unfit=unfit,
        batch_sizes=sizes,
        candidates=tuple(candidates),
        together=_together(judged, routing, ep_size),
    )


def _place(strategies: Sequence[Strategy], model: MoeModel, root: Path) -> tuple[dict[str, Placement], dict[str, str]]:
    """The placements of those that fit, and why others do not; OutputError where none does."""
    placements: dict[str, Placement] = {}
    unfit: dict[str, str] = {}
    for strategy in strategies:
        try:
            placement = strategy.place(model, root).placement
            check_placement(placement, model, root)
        except OutputError as error:
            unfit[strategy.name] = str(error)
        else:
            placements[strategy.name] = placement
    if not placements:
        raise OutputError("; ".join(unfit.values()))
    return placements, unfit


def _random(
    checkpoint: Checkpoint, model: MoeModel, tokens: int, seed: int, progress: Callable[[int], None]
) -> _Judged:
    words = "random hidden states through the checkpoint's own gates; text is less even, so this is a lower bound"
    return _Judged(random_traffic(checkpoint, model, tokens, seed, progress).ids, tokens, words, lower_bound=True)


def _recorded(trace: Path, model: MoeModel, root: Path, wanted: int, fitted: Sequence[Fitted]) -> _Judged:
    """At most `wanted` of the tokens that no strategy was made from."""
    first = max((strategy.share for strategy in fitted), default=0.0)
    traffic = recorded_traffic(trace, model, root, wanted, start=first)
    words = f"tokens recorded in {trace}"
    if first:
        words += (
            f" after the first {first:.0%}, which {' and '.join(strategy.name for strategy in fitted)} was made from"
        )
    if traffic.tokens < traffic.of:
        words += f", spread evenly over the {traffic.of} there"
    unrecorded = tuple(layer.name for layer in model.layers if layer.name not in traffic.ids)
    return _Judged(traffic.ids, traffic.tokens, words, lower_bound=False, unrecorded=unrecorded)


def _together(judged: _Judged, routing: Routing, ep_size: int) -> Together:
    are_groups = 1 < routing.n_group <= MOST_RUNS
    count = routing.n_group if are_groups else min(ep_size, MOST_RUNS)
    layers = {name: coselection(ids, routing.num_experts, count) for name, ids in judged.ids.items()}
    return Together(
        runs=tuple((run.start, run.stop - 1) for run in rank_slots(routing.num_experts, count)),
        are_groups=are_groups,
        mean=mean_coselection(list(layers.values())),
        layers=layers,
    )
