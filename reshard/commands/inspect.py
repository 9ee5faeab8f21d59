"""Describes a checkpoint and its experts: a source by its headers, an output by its manifest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.files import Files
from ..checkpoint.header import Tensor, parse_header
from ..checkpoint.location import Location
from ..checkpoint.source import ANY, Hub, find_source
from ..errors import CheckpointError, OutputError, UnsupportedError
from ..execute.holes import find_hole
from ..model.names import Kind, kind_of, parse_expert_name
from ..model.routing import Routing, why_plugin
from ..placement.contract import mixture, numbering_in
from ..placement.permutations import Placement, invert, rank_slots
from ..placement.strategies import Placed, Zigzag
from ..record.manifest import FileSummary, Manifest, manifest_in, unpack
from .original import Original, check_ep_size, is_output, original_of, refuse_unfinished
from .outline import outline_resharding


@dataclass(frozen=True, slots=True)
class RankShare:
    """What an EP rank owns: its logical experts in a layer, and the bytes of its experts in all layers."""

    rank: int
    experts: tuple[int, ...]
    size: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` found. `files` are those that hold tensors. Sizes are bytes of the source's tensors: of all, of
    experts, of routers.

    For an output, `strategy`, `ep_size` and `ranks` are its own. For a source, they are what `zigzag` would make of it
    for the requested `ep_size`, or None and empty without one. If `uniform`, every MoE layer has the same placement;
    otherwise `ranks` shows the first layer's. `staged_ranks` is None unless the directory is staged; all else then
    describes the whole output that it was staged from. With `ep_size`, `notes` has what `zigzag` would say of a source,
    also if it would refuse it. Of an output, `notes` says whether its files' headers contradict its manifest.
    """

    path: str
    resharded: bool
    family: str
    model_type: str
    files: tuple[FileSummary, ...]
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
    notes: tuple[str, ...]
    ranks: tuple[RankShare, ...]


def inspect(directory: str | Path, ep_size: int | None = None, hub: Hub = ANY) -> Inspection:
    """Describe the checkpoint or output `directory`, which `find_source` finds. With `ep_size`, add what `zigzag` would
    make of a checkpoint.

    Raises CheckpointError and UnsupportedError as `plan_placement` does, IntegrityError if the manifest is damaged, and
    OutputError if `ep_size` does not fit or `directory` is an output.
    """
    source = find_source(directory, hub)
    refuse_unfinished(source)
    return _of_output(source, ep_size) if is_output(source) else _of_original(original_of(source), ep_size)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What both kinds of directory provide: tensors by the original's names, and the placement, {} if none."""

    root: Location
    family: str
    model_type: str
    routing: Routing
    layers: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    files: tuple[FileSummary, ...]
    placement: Placement
    strategy: str | None
    ep_size: int | None
    staged_ranks: tuple[int, ...] | None = None
    resharded: bool = False
    notes: tuple[str, ...] = ()


def _of_original(original: Original, ep_size: int | None) -> Inspection:
    checkpoint, model = original.checkpoint, original.model
    placed = None
    if ep_size is not None:
        check_ep_size(ep_size, original)
        placed = Zigzag(ep_size).place(original.shape)
    return _describe(
        _Facts(
            root=original.root,
            family=model.family.name,
            model_type=model.model_type,
            routing=model.routing,
            layers=original.shape.layers,
            tensors=tuple(checkpoint.tensors.values()),
            files=tuple(
                FileSummary(name, checkpoint.files[name].size, tensors=len(header.tensors))
                for name, header in checkpoint.shards.items()
            ),
            placement={} if placed is None else placed.placement,
            strategy=None if placed is None else Zigzag.name,
            ep_size=ep_size,
            notes=tuple(_notes(original, ep_size, placed)),
        )
    )


def _notes(original: Original, ep_size: int | None, placed: Placed | None) -> Iterator[str]:
    """What stands in the way of writing an output, or would not be in it. With `placed`, what `zigzag` would say."""
    if hole := find_hole(original.root, original.checkpoint.shards):
        yield f"{hole.tensor.name} in {hole.tensor.file} was not all written: a hole; download the file again"
    if ep_size is not None and placed is not None:
        try:
            yield from outline_resharding(original, Zigzag.name, ep_size, placed).notes
        except (CheckpointError, UnsupportedError) as error:
            yield f"zigzag would refuse it: {error}"
    elif original.checkpoint.left_out:
        yield f"no part of the checkpoint, and not copied: {', '.join(original.checkpoint.left_out)}"


def _of_output(source: Files, ep_size: int | None) -> Inspection:
    root, manifest = source.root, manifest_in(source)
    if ep_size is not None:
        raise OutputError(f"{root}: an output for {manifest.ep_size} EP ranks; leave out --ep, which is for originals")
    headers = (
        parse_header(unpack(file.header), file.size, Path(file.name)) for file in manifest.source.files if file.header
    )
    return _describe(
        _Facts(
            root=root,
            family=manifest.family,
            model_type=manifest.model_type,
            routing=manifest.routing,
            layers=tuple(layer.name for layer in manifest.moe_layers),
            tensors=tuple(tensor for header in headers for tensor in header.tensors),
            files=tuple(record.summary for record in manifest.files if record.tensors),
            placement=manifest.placement,
            strategy=manifest.strategy,
            ep_size=manifest.ep_size,
            staged_ranks=None if manifest.staged_ranks is None else tuple(manifest.staged_ranks),
            resharded=True,
            notes=tuple(_mixed(source, manifest)),
        )
    )


def _mixed(source: Files, manifest: Manifest) -> Iterator[str]:
    """What the headers of the output's files say against its manifest."""
    try:
        headers = source.headers([file.name for file in manifest.files if file.tensors and source.has(file.name)])
        numberings = {name: numbering_in(header.metadata) for name, header in headers.items()}
    except CheckpointError as error:
        yield str(error)
        return
    if fault := mixture(numberings, manifest.placement):
        yield f"{fault}: files of two checkpoints lie here; run `reshard verify`, and write the output anew"


def _describe(facts: _Facts) -> Inspection:
    routing = facts.routing
    layers = frozenset(facts.layers)
    sizes = dict.fromkeys(Kind, 0)
    for tensor in facts.tensors:
        sizes[kind_of(tensor.name, layers)] += tensor.size
    return Inspection(
        path=str(facts.root),
        resharded=facts.resharded,
        family=facts.family,
        model_type=facts.model_type,
        files=facts.files,
        tensors=len(facts.tensors),
        moe_layers=facts.layers,
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
        strategy=facts.strategy,
        ep_size=facts.ep_size,
        staged_ranks=facts.staged_ranks,
        notes=facts.notes,
        uniform=len(set(facts.placement.values())) <= 1,
        ranks=() if facts.ep_size is None else tuple(_ranks(facts.tensors, facts.placement, facts.ep_size)),
    )


def _ranks(tensors: Iterable[Tensor], placement: Placement, ep_size: int) -> Iterator[RankShare]:
    tables = {layer: invert(physical_to_logical) for layer, physical_to_logical in placement.items()}
    first = next(iter(placement.values()))
    slots = rank_slots(len(first), ep_size)
    slot_sizes = [0] * len(first)
    fused = 0
    for tensor in tensors:
        if expert := parse_expert_name(tensor.name, tables):
            slot_sizes[tables[expert.layer][expert.expert]] += tensor.size
        elif kind_of(tensor.name, tables) is Kind.EXPERT:
            fused += tensor.size
    for rank, owned in enumerate(slots):
        size = sum(slot_sizes[slot] for slot in owned) + fused * len(owned) // len(first)
        yield RankShare(rank, tuple(first[slot] for slot in owned), size)
