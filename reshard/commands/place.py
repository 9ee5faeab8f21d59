"""From an original to its output: `plan_placement` decides everything, `write_resharding` carries it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.directory import CONFIG, INDEX
from ..execute.fill import Progress
from ..execute.reflink import find_sharing
from ..execute.run import Outcome, run
from ..placement.strategies import Strategy, Zigzag
from ..plan.files import Digests, OutputFile, literal_file
from ..plan.sharing import Reflink
from ..record.manifest import MANIFEST, FileRecord, Layout, encode_manifest, record_bytes
from .original import place_experts, read_original, refuse_holes
from .resharding import DEFAULT_MAX_SHARD_SIZE, Resharding, Writing, manifest_of, plan_resharding


def plan_placement(
    src: str | Path,
    strategy: Strategy,
    out: str | Path,
    *,
    layout: Layout = "ranks",
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    reflink: Reflink = "auto",
    digests: Digests | None = None,
    allow_holes: bool = False,
    check_source: bool = False,
) -> Resharding:
    """Decide how the checkpoint `src` is rewritten into `out`. Reads no weights, writes nothing.

    Parameters:
        src: a checkpoint directory, or the id of a repository in the Hugging Face cache
        strategy: decides where experts go; its ep_size R is 2 to E and need not divide E
        out: absent, empty, or an unfinished run; this function only checks whether it can share blocks with `src`
        layout: "ranks" writes files by EP rank; "source" writes a file for each file of the source
        max_shard_size: the most bytes of tensors in a file; with layout "source" files are as large as the source's
        reflink: "auto" shares disk blocks with the source if the file system can; "always" refuses if it cannot
        digests: which tensors to checksum; None for all, or with layout "source" for those that are copied
        allow_holes: take parts of tensors that were never written for the model's zeros
        check_source: compare each file of `src` with the checksum that it was downloaded by, if one is known

    Raises:
        CheckpointError: the checkpoint is not sound, or has no checksums to check
        UnsupportedError: renumbering its experts is not known to be exact
        OutputError: `strategy`, `max_shard_size` or `reflink` does not fit

    """
    original = read_original(src)
    if not allow_holes:
        refuse_holes(original)
    checkpoint = original.checkpoint
    writing = Writing(
        layout,
        max_shard_size,
        find_sharing(original.root, checkpoint.shards, checkpoint.directories, Path(out), reflink),
        (Digests.COPIED if layout == "source" else Digests.ALL) if digests is None else digests,
        check_source,
    )
    placed = place_experts(original, strategy)
    return plan_resharding(original, strategy.name, strategy.ep_size, placed, writing)


def place(
    src: str | Path,
    strategy: Strategy,
    out: str | Path,
    *,
    layout: Layout = "ranks",
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    reflink: Reflink = "auto",
    digests: Digests | None = None,
    allow_holes: bool = False,
    check_source: bool = False,
    restart: bool = False,
    workers: int | None = None,
    progress: Progress = lambda written: None,
) -> Outcome:
    """Rewrite the checkpoint `src` into `out` so that linear placement becomes the placement of `strategy`.

    Call it again to resume after an interruption; `restart` starts over. Calls `progress` with the number of bytes just
    done. The other parameters and errors are those of `plan_placement`; also raises OutputError if `out` is refused or
    cannot be written.
    """
    resharding = plan_placement(
        src,
        strategy,
        out,
        layout=layout,
        max_shard_size=max_shard_size,
        reflink=reflink,
        digests=digests,
        allow_holes=allow_holes,
        check_source=check_source,
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

    def finish(records: list[FileRecord]) -> list[OutputFile]:
        index, config = literal_file(INDEX, resharding.index), literal_file(CONFIG, resharding.config)
        records = [*records, record_bytes(INDEX, resharding.index), record_bytes(CONFIG, resharding.config)]
        return [literal_file(MANIFEST, encode_manifest(manifest_of(resharding, records))), index, config]

    return run(resharding.plan, out, finish, restart=restart, workers=workers, progress=progress)
