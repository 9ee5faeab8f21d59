"""Carries out a plan.

    for each output file, several at a time:            (threads; reading, hashing and writing release the GIL)
        share blocks with the source where possible, whole extents of tensors at once
        write NAME.partial front to back, around the shared extents:
            for each part: read its ranges -> digest of the tensor -> buffer
            each full buffer -> digest of the file -> disk
        flush it to disk, rename it to NAME, record it in the journal

Each byte of an output file is read once and written once. Shared blocks are read only if their digests are wanted, and
holes stay holes. Each thread needs memory for one buffer, and for one table of expert ids if the model has any. Pages
that this run brought into the page cache leave it once they are used. An interruption leaves complete files that the
journal records, at most one NAME.partial per thread, and nothing that an engine would load. `fill` writes a single
file; this module decides which, and when.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..arguments import check_whole
from ..checkpoint.location import Location, Url
from ..checkpoint.remote import CONNECTIONS
from ..plan.files import OutputFile, Plan, checksums_of, fingerprint
from ..record.manifest import FileRecord, FileSummary
from .checksums import check_sources
from .destination import make_directory
from .fetching import sources_of
from .fill import Progress, write_file
from .journal import Journal, Opening, Written
from .ready import find_room
from .sources import Sources
from .syscalls import set_mode


@dataclass(frozen=True, slots=True)
class Work:
    """The `files` of a plan that are left to write, to `out`. Whoever writes them calls `record` when one is complete,
    by one thread at a time, and `progress` with the bytes that are done.
    """

    plan: Plan
    sources: Sources
    out: Path
    files: tuple[OutputFile, ...]
    record: Callable[[Written], None]
    progress: Progress


Copy = Callable[[Work], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did: the `files` that are in `out` now, or that it added there, of `size` bytes together. `resumed`
    counts those that an earlier, interrupted run had written. Of the `size` bytes, `shared` are in blocks shared with
    the source; `why_not_shared` says in words why none could be. `undigested` counts the tensors without a digest.
    `notes` say what the file system cannot do. If the output was `already_complete`, nothing was written, and how much
    is shared is not known.
    """

    out: Path
    files: tuple[FileSummary, ...]
    size: int
    shared: int
    why_not_shared: str
    undigested: int
    seconds: float
    resumed: int
    notes: tuple[str, ...] = ()
    already_complete: bool = False


def default_workers(root: Location | None = None) -> int:
    """Threads that keep a disk busy without flooding a small machine; for a store, which they wait for, as many as
    `hf download` has.
    """
    return CONNECTIONS if isinstance(root, Url) else min(8, os.cpu_count() or 1)


def count_workers(workers: int | None, root: Location | None = None) -> int:
    """`workers` or the default for a source at `root`; OutputError unless it is a number of threads."""
    if workers is None:
        return default_workers(root)
    check_whole(workers, "the number of workers")
    return workers


def run(
    plan: Plan,
    out: Path,
    finish: Callable[[list[FileRecord]], Iterable[OutputFile]],
    *,
    restart: bool,
    replaced: Collection[str] | None = None,
    workers: int | None,
    progress: Progress,
    copy: Copy | None = None,
) -> Outcome:
    """Carry out `plan` in the directory `out`, or resume an interrupted run of it.

    Parameters:
        finish: takes the records of the plan's files and returns the files to write last, in order; may raise to refuse
        restart: discard what an unfinished run left
        workers: threads; None for `default_workers`
        progress: called with the bytes that are done, of files that are checked first and then of the plan's, block by
            block, by one thread at a time
        copy: writes the plan's files; None for threads of this process

    Raises:
        CheckpointError: a source file cannot be read, or changed since the plan was made
        OutputError: `out` is refused, has too little space, or cannot be written

    """
    started = time.monotonic()
    threads = count_workers(workers, plan.source.root)
    find_room(plan, out, restart=restart, replaced=replaced).check(out)
    sources = sources_of(plan.source, plan.source_files, plan.headers)
    check_sources(sources, plan.checksums, threads, progress)
    make_directory(out, sources.mode([""]))
    names = [*plan.last, *(file.name for file in plan.files)]
    with Journal(out, Opening(fingerprint(plan), names, plan.placement), restart=restart, replaced=replaced) as journal:
        resumed = [file for file in plan.files if file.name in journal.done]
        progress(sum(file.size for file in resumed))
        for directory in plan.directories:
            make_directory(out / directory, sources.mode([directory]))
        check_sources(sources, checksums_of(resumed), threads, lambda count: None)
        todo = tuple(file for file in plan.files if file.name not in journal.done)
        (copy or partial(copy_by_threads, workers=threads))(Work(plan, sources, out, todo, journal.record, progress))
        written = [journal.done[file.name] for file in plan.files]
        last = list(finish([entry.record for entry in written]))
        written_last = [write_file(file, sources, plan.sharing, out, lambda count: None) for file in last]
        for directory in reversed(plan.directories):
            if (mode := sources.mode([directory])) is not None:
                set_mode(out / directory, mode)
        journal.remove()
    return Outcome(
        out=out,
        files=tuple(entry.record.summary for entry in (*written, *written_last)),
        size=plan.size + sum(file.size for file in last),
        shared=sum(entry.shared for entry in written),
        why_not_shared=plan.sharing.why_not,
        undigested=sum(list(entry.record.tensors.values()).count(None) for entry in written),
        seconds=time.monotonic() - started,
        resumed=len(resumed),
        notes=journal.notes,
    )


def copy_by_threads(work: Work, *, workers: int) -> None:
    """Do `work` by threads."""
    stop = threading.Event()
    lock = threading.Lock()

    def write(file: OutputFile) -> None:
        def report(count: int) -> None:
            _report(count, work.progress, lock, stop)

        written = write_file(file, work.sources, work.plan.sharing, work.out, report)
        with lock:
            work.record(written)

    with ThreadPoolExecutor(workers, thread_name_prefix="reshard") as pool:
        futures = [pool.submit(write, file) for file in work.files]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _report(count: int, progress: Progress, lock: threading.Lock, stop: threading.Event) -> None:
    if stop.is_set():
        raise _Stopped
    with lock:
        progress(count)


class _Stopped(Exception):  # noqa: N818  not an error: it ends a thread
    """Ends a thread, because another file failed or the user interrupted the run."""
