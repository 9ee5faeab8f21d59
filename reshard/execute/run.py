"""Carries out a plan.

    for each output file, several at a time:            (threads; reading, hashing and writing release the GIL)
        share blocks with the source where possible, whole extents of tensors at once
        write NAME.partial front to back, around the shared extents:
            for each part: read its ranges -> digest of the tensor -> buffer
            each full buffer -> digest of the file -> disk
        flush it to disk, rename it to NAME, record it in the journal

Each byte of an output file is read once and written once. Shared blocks are read only if their digests are wanted, and
holes stay holes. Each thread needs memory for one buffer, and for one table of expert ids if the model has any. Pages
leave the page cache once they are used. An interruption leaves complete files that the journal records, at most one
NAME.partial per thread, and nothing that an engine would load. `fill` writes a single file; this module decides which,
and when.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import msgspec
from blake3 import blake3

from .._version import __version__
from ..arguments import check_whole
from ..errors import OutputError
from ..plan.extents import MIN_SHARED, Holes, needed_size, shareable
from ..plan.files import OutputFile, Plan
from ..record.manifest import FileRecord
from .checksums import check_sources
from .destination import JOURNAL, PARTIAL, SPARE_SPACE, check_out, free_space, make_directory, refuse_inside
from .fill import Progress, write_file
from .journal import Journal, Written
from .sources import SourceFiles


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did. `resumed` counts the files that an earlier, interrupted run had written. Of the `size` bytes,
    `shared` are in blocks shared with the source; `why_not_shared` says in words why none could be. `undigested`
    counts the tensors without a digest.
    """

    out: Path
    files: int
    size: int
    shared: int
    why_not_shared: str
    undigested: int
    seconds: float
    resumed: int


def default_workers() -> int:
    """Threads that keep a disk busy without flooding a small machine."""
    return min(8, os.cpu_count() or 1)


def count_workers(workers: int | None) -> int:
    """`workers` or the default; OutputError unless it is a number of threads."""
    if workers is None:
        return default_workers()
    check_whole(workers, "the number of workers")
    return workers


def run(
    plan: Plan,
    out: Path,
    finish: Callable[[list[FileRecord]], Iterable[OutputFile]],
    *,
    restart: bool,
    workers: int | None,
    progress: Progress,
) -> Outcome:
    """Carry out `plan` in the directory `out`, or resume an interrupted run of it.

    Parameters:
        finish: takes the records of the plan's files and returns the files to write last, in order; may raise to refuse
        restart: discard what an unfinished run left
        workers: threads; None for `default_workers`
        progress: called with the bytes that are done, of files that are checked first and then of the plan's, block by
            block, by one thread at a time

    Raises:
        CheckpointError: a source file cannot be read, or changed since the plan was made
        OutputError: `out` is refused, has too little space, or cannot be written

    """
    started = time.monotonic()
    threads = count_workers(workers)
    refuse_out(plan, out)
    needs = _needed_sizes(plan)
    if not (out / JOURNAL).exists():
        _check_space(out, needs.values())
    names = [*(file.name for file in plan.files), *plan.last]
    if plan.checksums:
        check_sources(SourceFiles(plan.source, plan.source_files, plan.headers), plan.checksums, threads, progress)
    with Journal(out, _fingerprint(plan), names, restart=restart) as journal:
        resumed = [file for file in plan.files if file.name in journal.done]
        progress(sum(file.size for file in resumed))
        _check_space(out, [size for name, size in needs.items() if name not in journal.done])
        for directory in plan.directories:
            make_directory(out / directory)
        sources = SourceFiles(plan.source, plan.source_files, plan.headers)
        written = _copy_files(plan, sources, out, journal, threads, progress)
        last = list(finish([entry.record for entry in written]))
        for file in last:
            write_file(file, sources, plan.sharing, out, lambda count: None)
        journal.remove()
    return Outcome(
        out=out,
        files=len(plan.files) + len(last),
        size=plan.size + sum(file.size for file in last),
        shared=sum(entry.shared for entry in written),
        why_not_shared=plan.sharing.why_not,
        undigested=sum(list(entry.record.tensors.values()).count(None) for entry in written),
        seconds=time.monotonic() - started,
        resumed=len(resumed),
    )


def refuse_out(plan: Plan, out: Path) -> None:
    """OutputError unless `out` is new, empty, or holds an unfinished run, and is not in the source of `plan`."""
    refuse_inside(out, plan.source, plan.directories)
    names = [*(file.name for file in plan.files), *plan.last, *plan.directories]
    taken = {JOURNAL, *(f"{name}{PARTIAL}" for name in names)}
    for name, count in Counter(names).items():
        if count > 1 or name in taken:
            raise OutputError(f"{out}: two files would be named {name} during the run; rename the source's")
    check_out(out)


def needed_space(plan: Plan) -> int:
    """Bytes of disk that `plan` needs; what it shares with the source and the source's holes need none."""
    return sum(_needed_sizes(plan).values())


def shareable_size(plan: Plan) -> int:
    """Bytes of `plan` that can be in blocks shared with the source."""
    return sum(extent.size for file in plan.files for extent in shareable(file.parts, plan.sharing.block_size))


def _needed_sizes(plan: Plan) -> dict[str, int]:
    """Bytes of disk that each of the plan's files needs."""
    sparse = {}
    with SourceFiles(plan.source, plan.source_files).open() as opened:
        for name, file in plan.source_files.items():
            if file.size >= MIN_SHARED and opened.is_sparse(name):
                found = opened.segments(name, 0, file.size)
                sparse[name] = Holes.of([(offset, offset + size) for is_hole, offset, size in found if is_hole])
    return {file.name: needed_size(file, plan.sharing.block_size, sparse) for file in plan.files}


def _check_space(out: Path, needs: Iterable[int]) -> None:
    needed = sum(needs) + SPARE_SPACE
    free = free_space(out)
    if needed > free:
        raise OutputError(f"{out}: needs {needed} bytes, {free} are free; free some space or choose another --out")


def _fingerprint(plan: Plan) -> str:
    """A digest of everything that decides what is written where."""
    digest = blake3(msgspec.json.encode([__version__, sorted(plan.source_files.items()), plan.directories]))
    for name, header in plan.headers.items():
        digest.update(msgspec.json.encode([name, header]))
    for file in plan.files:
        digest.update(msgspec.json.encode(file))
    return digest.hexdigest()


def _copy_files(
    plan: Plan, sources: SourceFiles, out: Path, journal: Journal, workers: int, progress: Progress
) -> list[Written]:
    """Write the files of `plan` that `journal` does not have yet; returns what it has of all, in the plan's order."""
    stop = threading.Event()
    lock = threading.Lock()

    def work(file: OutputFile) -> None:
        written = write_file(file, sources, plan.sharing, out, lambda count: _report(count, progress, lock, stop))
        with lock:
            journal.record(written)

    todo = [file for file in plan.files if file.name not in journal.done]
    with ThreadPoolExecutor(workers, thread_name_prefix="reshard") as pool:
        futures = [pool.submit(work, file) for file in todo]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return [journal.done[file.name] for file in plan.files]


def _report(count: int, progress: Progress, lock: threading.Lock, stop: threading.Event) -> None:
    if stop.is_set():
        raise _Stopped
    with lock:
        progress(count)


class _Stopped(Exception):  # noqa: N818  not an error: it ends a thread
    """Ends a thread, because another file failed or the user interrupted the run."""
