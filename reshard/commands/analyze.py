"""`reshard analyze`: how placements would load the ranks of a checkpoint, how long steps would take, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import check_whole
from ..checkpoint.source import ANY, Hub
from ..errors import OutputError
from ..model.routing import Routing
from ..placement.permutations import Placement, rank_slots
from ..placement.steps import DEFAULT_MIX, PHASES, Step
from ..placement.strategies import Balanced, Copies, Strategy
from ..placement.time_model import DEFAULT_GPU, read_gpu
from ..traffic.advice import advise
from ..traffic.analysis import Analysis, Candidate, Together
from ..traffic.choices import MAX_TOKENS, random_traffic, recorded_traffic
from ..traffic.effect import coselection, effect, mean_coselection, mean_effect
from ..traffic.step_time import step_times
from .original import Original, check_ep_size, memory_of, place_experts, read_original, refuse_holes
from .serving import record_command, serve_commands

if TYPE_CHECKING:
    from torch import Tensor

RANDOM_TOKENS = 4096
BATCH_SIZES = tuple(2**exponent for exponent in range(15))
MAX_RANGES = 32  # of experts in the heat map; nobody could tell more apart


@dataclass(frozen=True, slots=True)
class _EvaluationTraffic:
    """The traffic that candidates are measured on, and how `Analysis` describes it."""

    ids: dict[str, Tensor]
    tokens: int
    description: str
    recorded: bool
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
    gpu: str = DEFAULT_GPU,
    mix: Sequence[Step] = DEFAULT_MIX,
    hub: Hub = ANY,
    progress: Callable[[int], None] = lambda layers: None,
) -> Analysis:
    """Measure how placements would load the EP ranks of the checkpoint `src`, and predict how long steps would take.

    Reads the gates and no other weights, and routes random hidden states through them. With `trace`, reads no weights
    at all and takes the recorded choices.

    Parameters:
        src: as in `plan_placement`
        strategies: all for the same number of EP ranks
        nodes: the number of nodes that these ranks are spread over
        trace: directory of a trace
        tokens: the most tokens to measure; None for RANDOM_TOKENS, or traffic.choices.MAX_TOKENS with a trace
        batch_sizes: in tokens; batches larger than the traffic are left out
        seed: of the random hidden states
        gpu: what computes: a name in `time_model.gpu_names`, or a JSON file
        mix: the steps that the recommendation counts; those larger than the traffic are left out
        hub: how to ask the Hugging Face Hub
        progress: called with the number of layers just routed, or measured for a placement

    Raises:
        CheckpointError, UnsupportedError: as `plan_placement` does
        TraceError: `trace` cannot be read, or is another model's
        OutputError: ranks, nodes or tokens do not fit, or no strategy does

    """
    profile = read_gpu(gpu)
    original = read_original(src, hub)
    root, model, routing = original.root, original.model, original.model.routing
    ep_sizes = [strategy.ep_size for strategy in strategies]
    if len(set(ep_sizes)) != 1:
        raise OutputError(f"{root}: expected strategies for one number of EP ranks, found {ep_sizes}")
    ep_size = ep_sizes[0]
    check_ep_size(ep_size, original)
    for value, what in ((nodes, "nodes"), (tokens, "tokens"), *((size, "batch") for size in batch_sizes)):
        if value is not None:
            check_whole(value, f"{root}: --{what}")
    if ep_size % nodes:
        raise OutputError(f"{root}: --nodes must divide the {ep_size} EP ranks, found {nodes}")
    placements, unfit = _place_all(strategies, original)
    if trace is None:
        refuse_holes(original, {tensor.name for layer in model.layers for tensor in (*layer.router, *layer.expert_ids)})
        traffic = _random(original, tokens or RANDOM_TOKENS, seed, progress)
    else:
        fitted = [
            strategy
            for strategy in strategies
            if isinstance(strategy, (Balanced, Copies)) and strategy.trace and strategy.name in placements
        ]
        traffic = _recorded(Path(trace), original, tokens or MAX_TOKENS, fitted)
    sizes = tuple(size for size in batch_sizes if 1 <= size <= traffic.tokens)
    if not sizes:
        raise OutputError(
            f"{root}: {traffic.tokens} tokens are too few for a batch of {', '.join(map(str, batch_sizes))}; "
            "choose a smaller --batch or more --tokens"
        )
    candidates = []
    for name, placement in placements.items():
        layers = {}
        for layer, ids in traffic.ids.items():
            layers[layer] = effect(ids, placement[layer], ep_size, nodes, sizes)
            progress(1)
        candidates.append(Candidate(name, mean_effect(list(layers.values())), layers))
    counted = [step for step in mix if step.tokens <= traffic.tokens] or [Step("decode", sizes[-1])]
    steps = {Step(phase, size) for phase in PHASES for size in sizes}.union(counted)
    ordered = sorted(steps, key=lambda step: (step.phase, step.tokens))
    times = step_times(traffic.ids, placements, ordered, ep_size, original.sizes, profile)
    copied = (strategy for strategy in strategies if isinstance(strategy, Copies) and strategy.name in placements)
    memory = next((memory_of(original, strategy) for strategy in copied), None)
    serve = serve_commands(root, [strategy for strategy in strategies if strategy.name in placements])
    return Analysis(
        path=root,
        family=model.family.name,
        num_experts=routing.num_experts,
        top_k=routing.top_k,
        n_group=routing.n_group,
        topk_group=routing.topk_group,
        ep_size=ep_size,
        nodes=nodes,
        tokens=traffic.tokens,
        traffic=traffic.description,
        recorded=traffic.recorded,
        unrecorded=traffic.unrecorded,
        unfit=unfit,
        batch_sizes=sizes,
        gpu=profile.name,
        gpu_source=f"{profile.source}; MoE kernels: {profile.kernels.source}",
        steps=times,
        advice=advise(
            times,
            counted,
            serve,
            recorded=traffic.recorded,
            nodes=nodes,
            record=record_command(root, ep_size),
            copies=memory,
        ),
        serve=serve,
        candidates=tuple(candidates),
        together=_together(traffic, routing, ep_size),
        copies=memory,
    )


def _place_all(strategies: Sequence[Strategy], original: Original) -> tuple[dict[str, Placement], dict[str, str]]:
    """The placements of the strategies that fit, and why the others do not. OutputError if none fits."""
    placements: dict[str, Placement] = {}
    unfit: dict[str, str] = {}
    for strategy in strategies:
        try:
            placements[strategy.name] = place_experts(original, strategy).placement
        except OutputError as error:
            unfit[strategy.name] = str(error)
    if not placements:
        raise OutputError("; ".join(unfit.values()))
    return placements, unfit


def _random(original: Original, tokens: int, seed: int, progress: Callable[[int], None]) -> _EvaluationTraffic:
    description = (
        "random hidden states through the checkpoint's own gates; text may load ranks quite differently, so record a "
        "trace to know"
    )
    traffic = random_traffic(original.checkpoint, original.model, tokens, seed, progress)
    return _EvaluationTraffic(traffic.ids, tokens, description, recorded=False)


def _recorded(
    trace: Path, original: Original, max_tokens: int, fitted: Sequence[Balanced | Copies]
) -> _EvaluationTraffic:
    """At most `max_tokens` recorded tokens, none of which a strategy in `fitted` made its placement from."""
    model = original.model
    start = max((strategy.share for strategy in fitted), default=0.0)
    traffic = recorded_traffic(trace, model, original.root, max_tokens, start=start)
    description = f"tokens recorded in {trace}"
    if start:
        names = " and ".join(strategy.name for strategy in fitted)
        description += f" after the first {start:.0%}, which {names} {'was' if len(fitted) == 1 else 'were'} made from"
    if traffic.tokens < traffic.of:
        description += f", sampled evenly from {traffic.of}"
    unrecorded = tuple(layer.name for layer in model.layers if layer.name not in traffic.ids)
    return _EvaluationTraffic(traffic.ids, traffic.tokens, description, recorded=True, unrecorded=unrecorded)


def _together(traffic: _EvaluationTraffic, routing: Routing, ep_size: int) -> Together:
    are_groups = 1 < routing.n_group <= MAX_RANGES
    count = routing.n_group if are_groups else min(ep_size, MAX_RANGES)
    layers = {name: coselection(ids, routing.num_experts, count) for name, ids in traffic.ids.items()}
    return Together(
        ranges=tuple((experts.start, experts.stop - 1) for experts in rank_slots(routing.num_experts, count)),
        are_groups=are_groups,
        mean=mean_coselection(list(layers.values())),
        layers=layers,
    )
