"""Reads the original, for every command that takes one: finds it, parses it, and refuses an output of reshard.

A path, a repository id or a URL comes in, and an `Original` goes out. `checkpoint.source` finds the files.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.directory import CONFIG, Checkpoint, read_files
from ..checkpoint.files import Files
from ..checkpoint.location import Location
from ..checkpoint.source import ANY, Hub, find_source
from ..errors import CheckpointError, OutputError
from ..execute.holes import find_hole
from ..model.layers import MoeModel, read_model
from ..model.memory import CopiesMemory, copies_memory
from ..model.sizes import ModelSizes, read_sizes
from ..placement.contract import CONTRACT_KEY, numbering_in
from ..placement.placement_file import read_placement_file
from ..placement.strategies import (
    Balanced,
    Copies,
    FromFile,
    MoeShape,
    Placed,
    Strategy,
    check_copies,
    check_placement,
)
from ..placement.time_model import read_gpu
from ..record.manifest import JOURNAL, MANIFEST, UNFINISHED
from ..traffic.choices import recorded_traffic


@dataclass(frozen=True, slots=True)
class Original:
    """A checkpoint that reshard can place, and what is known of its MoE layers."""

    checkpoint: Checkpoint
    model: MoeModel

    @property
    def root(self) -> Location:
        """Its directory, or its URL."""
        return self.checkpoint.root

    @property
    def num_experts(self) -> int:
        """E, the experts of a layer."""
        return self.model.routing.num_experts

    @property
    def shape(self) -> MoeShape:
        """What a strategy needs to know of it."""
        routing = self.model.routing
        layers = tuple(layer.name for layer in self.model.layers)
        return MoeShape(str(self.root), layers, routing.num_experts, routing.n_group, routing.group_limited)

    @property
    def sizes(self) -> ModelSizes:
        """How large its parts are."""
        return read_sizes(self.checkpoint, self.model)


def is_output(source: Files) -> bool:
    """Whether reshard wrote the files of `source`."""
    return source.has(MANIFEST)


def read_original(src: str | Path, hub: Hub = ANY) -> Original:
    """Read the checkpoint `src`: a directory, a repository id, or a URL, as `find_source` says. Reads no weights.

    Raises:
        CheckpointError: the checkpoint is not sound, or is an output of reshard
        UnsupportedError: renumbering its experts is not known to be exact

    """
    return original_of(find_source(src, hub))


def original_of(source: Files) -> Original:
    """The same for a checkpoint that consists of the files of `source`."""
    root = source.root
    refuse_unfinished(source)
    if is_output(source):
        raise CheckpointError(
            f"{root / MANIFEST}: already resharded: an output of reshard, not an original; give the original, which "
            "`reshard restore` rebuilds"
        )
    checkpoint = read_files(source)
    locked = "a model type of reshard" if str(checkpoint.config.get("model_type")).startswith("reshard_") else None
    if mark := CONTRACT_KEY if CONTRACT_KEY in checkpoint.config else locked:
        raise CheckpointError(
            f"{root / CONFIG}: has {mark}: already resharded, though {MANIFEST} is missing; give the original"
        )
    for name, header in checkpoint.shards.items():
        if numbering_in(header.metadata) is not None:
            raise CheckpointError(
                f"{root / name}: its metadata says that its experts are renumbered: already resharded, though "
                f"{MANIFEST} is missing; give the original"
            )
    return Original(checkpoint, read_model(checkpoint))


def refuse_holes(original: Original, names: Collection[str] | None = None) -> None:
    """CheckpointError if a tensor was never written, as far as the file system tells; with `names`, one of these."""
    if hole := find_hole(original.root, original.checkpoint.shards, names):
        raise CheckpointError(
            f"{original.checkpoint.where(hole.tensor)}: {hole.size} of its bytes, from byte {hole.offset} of the file "
            "on, were never written: a hole, which reads as zeros; download the file again, or if these zeros are the "
            "model's (some tools and file systems keep zeros as holes), add --allow-holes"
        )


def refuse_unfinished(source: Files) -> None:
    """CheckpointError if a run that writes the files of `source` was interrupted."""
    if source.has(JOURNAL):
        raise CheckpointError(f"{source.root}: {UNFINISHED}")


def check_ep_size(ep_size: int, original: Original) -> None:
    """OutputError unless the experts of a layer can be dealt to `ep_size` ranks."""
    if type(ep_size) is not int or not 2 <= ep_size <= original.num_experts:
        raise OutputError(
            f"{original.root}: --ep must be from 2 to the {original.num_experts} experts of a layer, found "
            f"{ep_size!r:.80}" + ", which is no int" * (type(ep_size) is not int)
        )


def check_strategy(strategy: Strategy, original: Original) -> None:
    """OutputError unless `strategy` is one, for a number of ranks that experts can be dealt to."""
    if not isinstance(strategy, Strategy):
        raise OutputError(f"{original.root}: expected a strategy such as Zigzag(8), found {strategy!r:.80}")
    check_ep_size(strategy.ep_size, original)


def memory_of(original: Original, strategy: Copies) -> CopiesMemory:
    """What the copies of `strategy` take of each GPU's memory."""
    gpu = read_gpu(strategy.gpu)
    return copies_memory(original.checkpoint, original.model, strategy.ep_size, strategy.spare, gpu)


def place_experts(original: Original, strategy: Strategy) -> Placed:
    """Load what `strategy` works from, let it place the experts of `original`, and check the placement.

    Raises:
        OutputError: the strategy or its `ep_size` does not fit the model
        CheckpointError: its placement file cannot be read
        TraceError: its trace cannot be read, or is another model's

    """
    check_strategy(strategy, original)
    shape = original.shape
    match strategy:
        case Balanced():
            traffic = recorded_traffic(Path(strategy.trace), original.model, original.root, end=strategy.share)
            placed = strategy.place(shape, original.sizes.expert, traffic.ids)
        case Copies():
            ids = {}
            if strategy.trace is not None:
                ids = recorded_traffic(Path(strategy.trace), original.model, original.root, end=strategy.share).ids
            placed = strategy.place(shape, original.sizes.expert, ids)
            check_copies(placed.placement, shape, strategy)
            return placed
        case FromFile():
            placed = strategy.place(shape, read_placement_file(Path(strategy.path)))
        case _:
            placed = strategy.place(shape)
    check_placement(placed.placement, shape)
    return placed
