"""Carries out a `Resharding`, or says what that would need. `merge` does the same for several runs in one directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..checkpoint.directory import CONFIG, INDEX
from ..errors import OutputError
from ..execute.checksums import check_sources
from ..execute.destination import free_space
from ..execute.fetching import sources_of
from ..execute.fill import Progress
from ..execute.ready import Room, find_room
from ..execute.run import Copy, Outcome, count_workers, run
from ..plan.files import OutputFile, literal_file
from ..record.manifest import MANIFEST, FileRecord, Manifest, encode_manifest, record_bytes
from .earlier import already_complete, finished_output, names_of, refuse_other
from .resharding import Resharding, manifest_of, records_of, source_text


def write_resharding(
    resharding: Resharding,
    out: str | Path,
    *,
    restart: bool = False,
    workers: int | None = None,
    progress: Progress = lambda written: None,
    copy: Copy | None = None,
) -> Outcome:
    """Carry out `resharding` in `out`: weights and small files, then the manifest, then the index and config.json.

    `copy` writes the files; None for threads of this process.
    """
    out = Path(out)
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
    return run(
        resharding.plan,
        out,
        finish,
        restart=restart,
        replaced=replaced,
        workers=workers,
        progress=progress,
        copy=copy,
    )


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
