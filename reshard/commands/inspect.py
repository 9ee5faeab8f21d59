"""What a checkpoint is, seen from its experts: a source by its headers, an output by its manifest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.directory import read_checkpoint
from ..checkpoint.header import Tensor, parse_header
from ..checkpoint.source import find_source
from ..errors import OutputError
from ..model.layers import Kind, Routing, kind_of, parse_expert_name, read_model, why_plugin
from ..placement import permutations as placement
from ..placement.contract import Placement
from ..placement.permutations import invert, rank_slots
from ..record.manifest import MANIFEST, read_manifest, unpack
from .place import check_ep_size


@dataclass(frozen=True, slots=True)
class RankShare:
    """What an EP rank gets under linear placement: its logical experts of a layer, the bytes of all its experts."""

    rank: int
    experts: tuple[int, ...]
    size: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` found. Sizes are bytes of tensors of the source: all, of experts, of routers.

    `staged_ranks` is None but for a staged directory; all else then describes the whole output it was staged from.
    `strategy`, `ep_size` and `ranks` are of the output, or of what `zigzag` would do for the `ep_size` asked about,
    else None and empty. `uniform` says that every MoE layer places its experts alike, else `ranks` shows the first.
    """

    path: str
    resharded: bool
    family: str
    model_type: str
    files: int
    tensors: int
    moe_layers: tuple[str, ...]
    num_experts: int
    top_k: int
    scoring: str
    n_group: int
    topk_group: int
    size: int
    expert_size: int
    router_size: int
    plugin_required: bool
    plugin: str
    strategy: str | None
    ep_size: int | None
    staged_ranks: tuple[int, ...] | None
    uniform: bool
    ranks: tuple[RankShare, ...]


def inspect(directory: str | Path, ep_size: int | None = None) -> Inspection:
    """Describe the checkpoint or the output in `directory`, with `ep_size` also what `zigzag` would make of it.

    Raises CheckpointError and UnsupportedError as `plan_placement` does, IntegrityError for a damaged manifest,
    OutputError where `ep_size` does not fit.
    """
    root = find_source(directory)
    if (root / MANIFEST).exists():
        return _of_output(root, ep_size)
    checkpoint = read_checkpoint(root)
    model = read_model(checkpoint)
    layers = tuple(layer.name for layer in model.layers)
    order: Placement = {}
    if ep_size is not None:
        check_ep_size(ep_size, model.routing.num_experts, root)
        order = dict.fromkeys(layers, placement.zigzag(model.routing.num_experts, ep_size))
    return _inspection(
        root,
        model.family.name,
        model.model_type,
        model.routing,
        layers,
        checkpoint.tensors.values(),
        files=len(checkpoint.shards),
        strategy=None if ep_size is None else "zigzag",
        ep_size=ep_size,
        staged_ranks=None,
        order=order,
        resharded=False,
    )


def _of_output(root: Path, ep_size: int | None) -> Inspection:
    manifest = read_manifest(root)
    if ep_size is not None:
        raise OutputError(f"{root}: an output for {manifest.ep_size} EP ranks already; --ep is for a source")
    shards = [file for file in manifest.source.files if file.header is not None]
    tensors = [
        tensor
        for file in shards
        for tensor in parse_header(unpack(file.header or ""), file.size, Path(file.name)).tensors
    ]
    return _inspection(
        root,
        manifest.family,
        manifest.model_type,
        manifest.routing,
        tuple(layer.name for layer in manifest.moe_layers),
        tensors,
        files=sum(1 for record in manifest.files if record.tensors),
        strategy=manifest.strategy,
        ep_size=manifest.ep_size,
        staged_ranks=None if manifest.staged_ranks is None else tuple(manifest.staged_ranks),
        order=manifest.placement,
        resharded=True,
    )


def _inspection(
    root: Path,
    family: str,
    model_type: str,
    routing: Routing,
    layers: tuple[str, ...],
    tensors: Iterable[Tensor],
    *,
    files: int,
    strategy: str | None,
    ep_size: int | None,
    staged_ranks: tuple[int, ...] | None,
    order: Placement,
    resharded: bool,
) -> Inspection:
    tensors = list(tensors)
    sizes = {kind: sum(tensor.size for tensor in tensors if kind_of(tensor.name, layers) is kind) for kind in Kind}
    return Inspection(
        path=str(root),
        resharded=resharded,
        family=family,
        model_type=model_type,
        files=files,
        tensors=len(tensors),
        moe_layers=layers,
        num_experts=routing.num_experts,
        top_k=routing.top_k,
        scoring=routing.scoring,
        n_group=routing.n_group,
        topk_group=routing.topk_group,
        size=sum(sizes.values()),
        expert_size=sizes[Kind.EXPERT],
        router_size=sizes[Kind.ROUTER],
        plugin_required=routing.group_limited,
        plugin=why_plugin(routing),
        strategy=strategy,
        ep_size=ep_size,
        staged_ranks=staged_ranks,
        uniform=len(set(order.values())) <= 1,
        ranks=tuple(_ranks(tensors, order, ep_size)) if ep_size is not None else (),
    )


def _ranks(tensors: Iterable[Tensor], order: Placement, ep_size: int) -> Iterator[RankShare]:
    tables = {layer: invert(physical_to_logical) for layer, physical_to_logical in order.items()}
    first = next(iter(order.values()))
    slots = rank_slots(len(first), ep_size)
    of_slot = [0] * len(first)
    fused = 0
    for tensor in tensors:
        if expert := parse_expert_name(tensor.name, tables):
            of_slot[tables[expert.layer][expert.expert]] += tensor.size
        elif kind_of(tensor.name, tables) is Kind.EXPERT:
            fused += tensor.size
    for rank, owned in enumerate(slots):
        size = sum(of_slot[slot] for slot in owned) + fused * len(owned) // len(first)
        yield RankShare(rank, tuple(first[slot] for slot in owned), size)
