"""From an original to its output: `plan_placement` decides everything, `write_resharding` carries it out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.directory import CONFIG, INDEX
from ..checkpoint.source import ANY, Hub
from ..errors import OutputError
from ..execute.checksums import check_sources
from ..execute.destination import free_space
from ..execute.fill import Progress
from ..execute.ready import Room, find_room
from ..execute.reflink import find_sharing
from ..execute.remote import sources_of
from ..execute.run import Outcome, count_workers, run
from ..placement.strategies import Balanced, Strategy, Zigzag
from ..plan.files import Digests, OutputFile, fingerprint, literal_file
from ..plan.sharing import Reflink
from ..record.manifest import MANIFEST, FileRecord, Layout, Manifest, encode_manifest, record_bytes
from .earlier import already_complete, earlier_placement, finished_output, names_of, refuse_other
from .original import check_strategy, place_experts, read_original, refuse_holes
from .resharding import (
    DEFAULT_MAX_SHARD_SIZE,
    Resharding,
    Writing,
    manifest_of,
    plan_resharding,
    records_of,
    source_text,
)


def plan_placement(
    src: str | Path,
    strategy: Strategy,
    out: str | Path,
    *,
    hub: Hub = ANY,
    layout: Layout = "ranks",
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    reflink: Reflink = "auto",
    digests: Digests | None = None,
    allow_holes: bool = False,
    check_source: bool = False,
    ranks: Sequence[int] | None = None,
    restart: bool = False,
) -> Resharding:
    """Decide how the checkpoint `src` is rewritten into `out`. Reads no weights, writes nothing.

    Parameters:
        src: a checkpoint directory; a repository of the Hugging Face Hub, org/name or hf://org/name@revision, which is
            read from the cache if it is there, or else from the Hub; or a folder of an object store, s3://… or gs://…
        strategy: decides where experts go; its ep_size R is 2 to E and need not divide E
        out: absent, empty, an unfinished run or a finished one. This function checks whether it can share blocks with
            `src`, and takes from such a run a placement that the same options may not make again
        hub: how to ask the Hugging Face Hub
        layout: "ranks" writes files by EP rank; "source" writes a file for each file of the source
        max_shard_size: the most bytes of tensors in a file; with layout "source" files are as large as the source's
        reflink: "auto" shares disk blocks with the source if the file system can; "always" refuses if it cannot
        digests: which tensors to checksum; None for all, or with layout "source" for those that are copied
        allow_holes: take parts of tensors that were never written for the model's zeros
        check_source: compare each file of `src` with the checksum that it was downloaded by, if one is known
        ranks: write only the files of these EP ranks and those that every rank needs, as `stage` would copy them from
            the whole output; None for all
        restart: as `write_resharding` will be told; the placement is then made anew

    Raises:
        CheckpointError: the checkpoint is not sound, or has no checksums to check
        UnsupportedError: renumbering its experts is not known to be exact
        OutputError: `strategy`, `max_shard_size` or `reflink` does not fit

    """
    original = read_original(src, hub)
    check_strategy(strategy, original)
    if not allow_holes:
        refuse_holes(original)
    checkpoint, out_path = original.checkpoint, Path(out)
    writing = Writing(
        layout,
        max_shard_size,
        find_sharing(original.root, checkpoint.shards, checkpoint.directories, out_path, reflink),
        (Digests.COPIED if layout == "source" else Digests.ALL) if digests is None else digests,
        check_source,
        None if ranks is None else tuple(ranks),
    )
    request = strategy.request if isinstance(strategy, Balanced) else ""
    if request and not restart and (earlier := earlier_placement(out_path, strategy.name, original.shape)):
        resharding = plan_resharding(original, strategy.name, strategy.ep_size, earlier.placed, writing, request)
        if earlier.fingerprint in (fingerprint(resharding.plan), resharding.fingerprint):
            return resharding
    placed = place_experts(original, strategy)
    return plan_resharding(original, strategy.name, strategy.ep_size, placed, writing, request)


def place(
    src: str | Path,
    strategy: Strategy,
    out: str | Path,
    *,
    hub: Hub = ANY,
    layout: Layout = "ranks",
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    reflink: Reflink = "auto",
    digests: Digests | None = None,
    allow_holes: bool = False,
    check_source: bool = False,
    ranks: Sequence[int] | None = None,
    restart: bool = False,
    workers: int | None = None,
    progress: Progress = lambda written: None,
) -> Outcome:
    """Rewrite the checkpoint `src` into `out` so that linear placement becomes the placement of `strategy`.

    Call it again to resume after an interruption; if all is done, that is checked quickly and said. `restart` starts
    over, also if all is done. Calls `progress` with the number of bytes just done. The other parameters and errors are
    those of `plan_placement`; also raises OutputError if `out` is refused or cannot be written.
    """
    resharding = plan_placement(
        src,
        strategy,
        out,
        hub=hub,
        layout=layout,
        max_shard_size=max_shard_size,
        reflink=reflink,
        digests=digests,
        allow_holes=allow_holes,
        check_source=check_source,
        ranks=ranks,
        restart=restart,
    )
    return write_resharding(resharding, Path(out), restart=restart, workers=workers, progress=progress)


def zigzag(src: str | Path, ep_size: int, out: str | Path, **options: Any) -> Outcome:
    """`place` with experts dealt round-robin to `ep_size` EP ranks."""
    return place(src, Zigzag(ep_size), out, **options)


def write_resharding(
    resharding: Resharding,
    out: Path,
    *,
    restart: bool = False,
    workers: int | None = None,
    progress: Progress = lambda written: None,
) -> Outcome:
    """Carry out `resharding` in `out`: weights and small files, then the manifest, then the index and config.json."""
    finished = finished_output(out)
    if finished is not None and not restart:
        refuse_other(out, finished, manifest_of(resharding, finished.files))
        _check_source(resharding, workers, progress)
        return already_complete(out, finished, workers)

    def finish(records: list[FileRecord]) -> list[OutputFile]:
        index, config = literal_file(INDEX, resharding.index), literal_file(CONFIG, resharding.config)
        records = [
            *records_of(resharding, records),
            record_bytes(INDEX, resharding.index),
            record_bytes(CONFIG, resharding.config),
        ]
        return [literal_file(MANIFEST, encode_manifest(manifest_of(resharding, records))), index, config]

    replaced = _replaced(resharding, out, finished)
    return run(resharding.plan, out, finish, restart=restart, replaced=replaced, workers=workers, progress=progress)


def _check_source(resharding: Resharding, workers: int | None, progress: Progress) -> None:
    """Read all source files that have checksums, and compare them."""
    checkpoint = resharding.checkpoint
    sources = sources_of(checkpoint.source, checkpoint.files)
    check_sources(sources, resharding.checksums, count_workers(workers), progress)


def room_for(resharding: Resharding, out: Path, *, restart: bool = False) -> Room:
    """The disk space that `write_resharding` would need and have. Raises what it would raise, but for want of space."""
    finished = finished_output(out)
    if finished is not None and not restart:
        refuse_other(out, finished, manifest_of(resharding, finished.files))
        already_complete(out, finished, None)
        return Room(0, free_space(out))
    return find_room(resharding.plan, out, restart=restart, replaced=_replaced(resharding, out, finished))


def _replaced(resharding: Resharding, out: Path, finished: Manifest | None) -> Sequence[str] | None:
    """The files of a finished output that a restart replaces; None if there is none.

    OutputError if it was made from another source: that may be gone, and `restore` the only way to it.
    """
    if finished is None:
        return None
    source, given = finished.source, resharding.checkpoint.source
    if source.path != source_text(given) and (source.repo_id or "") != given.identity.repo_id:
        raise OutputError(f"{out}: holds an output made from {source.path}; remove it, or choose another --out")
    return names_of(finished)
