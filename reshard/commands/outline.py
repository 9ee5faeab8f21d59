"""Decides all of an output but the bytes of its files: what `zigzag` and `place` refuse and note is said here.

`resharding` goes on from an `Outline`, and `inspect --ep` ends with it: that takes a fraction of the time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ..arguments import check_one_of, check_whole
from ..checkpoint.directory import CONFIG, Checkpoint
from ..errors import CheckpointError, OutputError
from ..model.config_ids import map_config_files
from ..model.layers import MoeModel
from ..placement.contract import Contract, lock_config, locked_values
from ..placement.permutations import Placement
from ..placement.strategies import Placed, check_placement
from ..plan.files import Digests
from ..plan.layouts import Shard, as_source, by_rank, headers_fit, output_files, shared_size, why_not_shared
from ..plan.sharing import NOTHING_SHARED, Sharing
from ..record.manifest import LAYOUTS, Layout
from .notes import PARAMS, known_checksums, notes, refuse_adapters
from .original import Original, check_ep_size

DEFAULT_MAX_SHARD_SIZE = 5_000_000_000
_RANK_FILE_NAME = re.compile(r"model-ep\d+-of-\d+-")


@dataclass(frozen=True, slots=True)
class Writing:
    """How an output is written: which files, how large, what is shared with the source, what gets a digest.

    OutputError for a value that is none of these.
    """

    layout: Layout = "ranks"
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE  # bytes of tensors in a file; unused with layout "source"
    sharing: Sharing = NOTHING_SHARED
    digests: Digests = Digests.ALL
    check_source: bool = False  # compare the source with the checksums that it was downloaded by
    ranks: tuple[int, ...] | None = None  # write only what these EP ranks need

    def __post_init__(self) -> None:
        check_one_of(self.layout, LAYOUTS, "--layout")
        check_whole(self.max_shard_size, "--max-shard-size, in bytes,")
        check_one_of(self.digests, Digests, "--digests")
        for rank in self.ranks or ():
            check_whole(rank, "each of --ranks", 0)


@dataclass(frozen=True, slots=True)
class Outline:
    """What is decided before the bytes of the output's files are.

    `shards` are its weight files, of which those of `ranks` are written; None for all. `rewritten` has the bytes of
    each small file that is not as in the source. `originals` has the source's bytes of these, of its indices, and of
    `PARAMS`, if that would open the lock. `checksums` are those that source files are compared with, {} if the user did
    not ask for that.
    """

    contract: Contract | None
    shards: Sequence[Shard]
    sharing: Sharing
    ranks: tuple[int, ...] | None
    rewritten: Mapping[str, bytes]
    config: bytes
    originals: Mapping[str, bytes]
    checksums: Mapping[str, str]
    notes: tuple[str, ...]


def outline_resharding(
    original: Original, strategy: str, ep_size: int, placed: Placed, writing: Writing | None = None
) -> Outline:
    """Decide how `original` is rewritten, as `plan_resharding` does, and raise what it raises."""
    checkpoint, model, placement = original.checkpoint, original.model, placed.placement
    writing = writing or Writing()
    check_ep_size(ep_size, original)
    check_placement(placement, original.shape)
    contract = None
    if model.routing.group_limited:
        groups = model.routing.n_group, model.routing.topk_group
        contract = Contract(strategy, ep_size, *groups, placement, locked_values(checkpoint.config), model.gates)
    shards, sharing = _shards(original, placement, ep_size, writing)
    if not headers_fit(checkpoint):
        output_files(shards, checkpoint, model, placement, writing.digests)  # refuses a header that is too long
    ranks = _ranks(original, shards, ep_size, writing)
    _refuse_collisions(checkpoint, shards)
    refuse_adapters(checkpoint)
    rewritten = _rewritten_configs(checkpoint, model, placement, contract)
    replaced = {*rewritten, *checkpoint.indices, *(() if contract is None else (PARAMS,))}
    return Outline(
        contract=contract,
        shards=shards,
        sharing=sharing,
        ranks=ranks,
        rewritten=rewritten,
        checksums=known_checksums(checkpoint) if writing.check_source else {},
        config=rewritten.get(CONFIG) or checkpoint.source.read(CONFIG),
        originals={name: checkpoint.source.read(name) for name in replaced if name in checkpoint.files},
        notes=(*placed.notes, *notes(checkpoint, model, ep_size), *_why_all_ranks(writing, ranks)),
    )


def _shards(original: Original, placement: Placement, ep_size: int, writing: Writing) -> tuple[list[Shard], Sharing]:
    """The weight files of the output, and which blocks they really share."""
    checkpoint, model, sharing = original.checkpoint, original.model, writing.sharing
    if writing.layout == "source":
        shards = as_source(checkpoint, block_size=sharing.block_size)
        if sharing.required and not shared_size(shards, model, placement, sharing.block_size):
            raise OutputError(f"{checkpoint.root}: --reflink always, but its tensors are too small to share blocks")
        return shards, sharing
    cut = partial(by_rank, checkpoint, model, placement, ep_size, max_shard_size=writing.max_shard_size)
    shards = cut(block_size=sharing.block_size)
    if sharing.block_size and (
        why := why_not_shared(shards, checkpoint, model, placement, ep_size, sharing.block_size)
    ):
        if sharing.required:
            raise OutputError(f"{checkpoint.root}: files by rank cannot share its blocks: {why}; try --layout source")
        return cut(block_size=None), Sharing(None, why)
    return shards, sharing


def _ranks(original: Original, shards: Sequence[Shard], ep_size: int, writing: Writing) -> tuple[int, ...] | None:
    """The EP ranks whose files are written; None if these are all files."""
    if writing.ranks is None:
        return None
    ranks = tuple(sorted(set(writing.ranks)))
    if not ranks or ranks[-1] >= ep_size:
        raise OutputError(f"{original.root}: --ranks must be some of the {ep_size} EP ranks, 0-{ep_size - 1}")
    return None if all(shard.rank in (None, *ranks) for shard in shards) else ranks


def _why_all_ranks(writing: Writing, ranks: Collection[int] | None) -> Iterator[str]:
    if writing.ranks is not None and ranks is None:
        yield "--ranks leaves nothing out: it names all ranks, or no file is of one rank only; the output is whole"


def _rewritten_configs(
    checkpoint: Checkpoint, model: MoeModel, placement: Placement, contract: Contract | None
) -> dict[str, bytes]:
    changed = map_config_files(checkpoint, model, placement)
    if contract is not None:
        changed[CONFIG] = lock_config(changed.get(CONFIG, checkpoint.config), contract)
    return {name: (json.dumps(value, indent=2) + "\n").encode() for name, value in changed.items()}


def _refuse_collisions(checkpoint: Checkpoint, shards: Sequence[Shard]) -> None:
    for shard in shards:
        if shard.rank is None and _RANK_FILE_NAME.match(shard.name):
            raise CheckpointError(
                f"{checkpoint.root / shard.name}: named like a file of one EP rank, so only that rank would read it; "
                "rename it in the source, or leave out --layout source"
            )
    kept = {file.name for file in checkpoint.other_files}
    for shard in shards:
        if shard.name in kept:
            raise CheckpointError(f"{checkpoint.root / shard.name}: the output needs this name; move the file away")
