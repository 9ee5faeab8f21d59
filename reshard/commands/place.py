"""From an original to its output: `plan_placement` decides everything, `write_resharding` carries it out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..arguments import as_path, parse_size
from ..checkpoint.directory import CONFIG, INDEX
from ..checkpoint.source import identify
from ..errors import OutputError
from ..execute.checksums import check_sources
from ..execute.destination import free_space
from ..execute.fill import Progress
from ..execute.ready import Room, find_room
from ..execute.reflink import find_sharing
from ..execute.run import Outcome, count_workers, run
from ..execute.sources import SourceFiles
from ..placement.strategies import Balanced, Strategy, Zigzag
from ..plan.files import Digests, OutputFile, fingerprint, literal_file
from ..plan.sharing import Reflink
from ..record.manifest import MANIFEST, FileRecord, Layout, Manifest, encode_manifest, record_bytes
from .earlier import already_complete, earlier_placement, finished_output, names_of, refuse_other
from .original import check_strategy, place_experts, read_original, refuse_holes
from .resharding import DEFAULT_MAX_SHARD_SIZE, Resharding, Writing, manifest_of, path_text, plan_resharding


def plan_placement(
    src: str | Path,
    out: str | Path,
    strategy: Strategy,
    *,
    layout: Layout = "ranks",
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
    reflink: Reflink = "auto",
    digests: Digests | None = None,
    allow_holes: bool = False,
    check_source: bool = False,
    restart: bool = False,
) -> Resharding:
    """Decide how the checkpoint `src` is rewritten into `out`. Reads no weights, writes nothing.

    Parameters:
        src: a checkpoint directory, or the id of a repository in the Hugging Face cache
        out: absent, empty, an unfinished run or a finished one. This function checks whether it can share blocks with
            `src`, and takes from such a run a placement that the same options may not make again
        strategy: decides where experts go; its ep_size R is 2 to E and need not divide E
        layout: "ranks" writes files by EP rank; "source" writes a file for each file of the source
        max_shard_size: the most bytes of tensors in a file, or a text such as 5GB, 0.5GB or 4GiB; at least 1KB. With
            layout "source" files are as large as the source's
        reflink: "auto" shares disk blocks with the source if the file system can; "always" refuses if it cannot
        digests: which tensors to checksum; None for all, or with layout "source" for those that are copied
        allow_holes: take parts of tensors that were never written for the model's zeros
        check_source: compare each file of `src` with the checksum that it was downloaded by, if one is known
        restart: as `write_resharding` will be told; the placement is then made anew

    Raises:
        CheckpointError: the checkpoint is not sound, or has no checksums to check
        UnsupportedError: renumbering its experts is not known to be exact
        OutputError: `strategy`, `max_shard_size` or `reflink` does not fit

    """
    out_path = as_path(out, "out, the second argument,")
    shard_size = parse_size(max_shard_size, "--max-shard-size")
    original = read_original(src)
    check_strategy(strategy, original)
    if not allow_holes:
        refuse_holes(original)
    checkpoint = original.checkpoint
    writing = Writing(
        layout,
        shard_size,
        find_sharing(original.root, checkpoint.shards, checkpoint.directories, out_path, reflink),
        (Digests.COPIED if layout == "source" else Digests.ALL) if digests is None else digests,
        check_source,
    )
    request = strategy.request if isinstance(strategy, Balanced) else ""
    if request and not restart and (earlier := earlier_placement(out_path, strategy.name, original.shape)):
        resharding = plan_resharding(original, strategy.name, strategy.ep_size, earlier.placed, writing, request)
        if fingerprint(resharding.plan) == earlier.fingerprint:
            return resharding
    placed = place_experts(original, strategy)
    return plan_resharding(original, strategy.name, strategy.ep_size, placed, writing, request)


def place(
    src: str | Path,
    out: str | Path,
    strategy: Strategy,
    *,
    layout: Layout = "ranks",
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
    reflink: Reflink = "auto",
    digests: Digests | None = None,
    allow_holes: bool = False,
    check_source: bool = False,
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
        out,
        strategy,
        layout=layout,
        max_shard_size=max_shard_size,
        reflink=reflink,
        digests=digests,
        allow_holes=allow_holes,
        check_source=check_source,
        restart=restart,
    )
    return write_resharding(resharding, out, restart=restart, workers=workers, progress=progress)


def zigzag(
    src: str | Path,
    out: str | Path,
    ep_size: int,
    *,
    layout: Layout = "ranks",
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
    reflink: Reflink = "auto",
    digests: Digests | None = None,
    allow_holes: bool = False,
    check_source: bool = False,
    restart: bool = False,
    workers: int | None = None,
    progress: Progress = lambda written: None,
) -> Outcome:
    """`place` with experts dealt round-robin to `ep_size` EP ranks."""
    return place(
        src,
        out,
        Zigzag(ep_size),
        layout=layout,
        max_shard_size=max_shard_size,
        reflink=reflink,
        digests=digests,
        allow_holes=allow_holes,
        check_source=check_source,
        restart=restart,
        workers=workers,
        progress=progress,
    )


def write_resharding(
    resharding: Resharding,
    out: str | Path,
    *,
    restart: bool = False,
    workers: int | None = None,
    progress: Progress = lambda written: None,
) -> Outcome:
    """Carry out `resharding` in `out`: weights and small files, then the manifest, then the index and config.json."""
    out = Path(out)
    finished = finished_output(out)
    if finished is not None and not restart:
        refuse_other(out, finished, manifest_of(resharding, finished.files))
        _check_source(resharding, workers, progress)
        return already_complete(out, finished, workers)

    def finish(records: list[FileRecord]) -> list[OutputFile]:
        index, config = literal_file(INDEX, resharding.index), literal_file(CONFIG, resharding.config)
        records = [*records, record_bytes(INDEX, resharding.index), record_bytes(CONFIG, resharding.config)]
        return [literal_file(MANIFEST, encode_manifest(manifest_of(resharding, records))), index, config]

    replaced = _replaced(resharding, out, finished)
    return run(resharding.plan, out, finish, restart=restart, replaced=replaced, workers=workers, progress=progress)


def _check_source(resharding: Resharding, workers: int | None, progress: Progress) -> None:
    """Read all source files that have checksums, and compare them."""
    checkpoint = resharding.checkpoint
    sources = SourceFiles(checkpoint.root, checkpoint.files)
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
    source = finished.source
    identity = identify(resharding.checkpoint.root)
    if source.path != path_text(resharding.checkpoint.root) and (source.repo_id or "") != identity.repo_id:
        raise OutputError(f"{out}: holds an output made from {source.path}; remove it, or choose another --out")
    return names_of(finished)
