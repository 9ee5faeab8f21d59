"""What placements would do to a checkpoint's load, before anything is written: `reshard analyze`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .analysis import Effect, effect, mean_effect
from .checkpoint import read_checkpoint
from .errors import OutputError
from .moe import read_model
from .resharding import check_ep_size, refuse_resharded
from .source import find_source
from .strategies import Strategy
from .traffic import random_traffic

TOKENS = 4096
BATCH_SIZES = (8, 64, 512, 4096)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One placement's effect: on average over layers, and on each MoE layer by name."""

    strategy: str
    mean: Effect
    layers: dict[str, Effect]


@dataclass(frozen=True, slots=True)
class Analysis:
    """What was measured. `traffic` says in words whose choices these are."""

    path: Path
    num_experts: int
    top_k: int
    ep_size: int
    nodes: int
    tokens: int
    traffic: str
    batch_sizes: tuple[int, ...]
    candidates: tuple[Candidate, ...]


def analyze(
    src: str | Path,
    strategies: Sequence[Strategy],
    *,
    nodes: int = 1,
    tokens: int = TOKENS,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seed: int = 0,
    progress: Callable[[int], None] = lambda layers: None,
) -> Analysis:
    """Route random hidden states through the gates of the checkpoint `src` and see how placements would spread them.

    Reads the gates and no other weights. All `strategies` are for the same number of EP ranks; batch sizes that exceed
    `tokens` are left out. Raises CheckpointError and UnsupportedError as `plan_placement` does, OutputError where
    ranks, nodes or a strategy do not fit.
    """
    root = find_source(src)
    refuse_resharded(root)
    checkpoint = read_checkpoint(root)
    model = read_model(checkpoint)
    (ep_size,) = {strategy.ep_size for strategy in strategies}
    check_ep_size(ep_size, model.routing.num_experts, root)
    if nodes < 1 or ep_size % nodes:
        raise OutputError(f"{root}: --nodes must divide the {ep_size} EP ranks, found {nodes}")
    sizes = tuple(size for size in batch_sizes if 1 <= size <= tokens)
    if not sizes:
        raise OutputError(f"{root}: no batch of {', '.join(map(str, batch_sizes))} tokens can be had from {tokens}")
    placements = {strategy.name: strategy.place(model, root) for strategy in strategies}
    traffic = random_traffic(checkpoint, model, tokens, seed, progress)
    candidates = []
    for name, placement in placements.items():
        layers = {layer: effect(ids, placement[layer], ep_size, nodes, sizes) for layer, ids in traffic.ids.items()}
        candidates.append(Candidate(name, mean_effect(list(layers.values())), layers))
    return Analysis(
        path=root,
        num_experts=model.routing.num_experts,
        top_k=model.routing.top_k,
        ep_size=ep_size,
        nodes=nodes,
        tokens=tokens,
        traffic="random hidden states through the checkpoint's own gates; text is less even, so this is a lower bound",
        batch_sizes=sizes,
        candidates=tuple(candidates),
    )
