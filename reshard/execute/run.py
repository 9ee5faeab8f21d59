"""Carries out a plan: shares or reads ranges, writes files, takes digests on the way.

    for each output file, several at a time:            (threads; reading, hashing and writing release the GIL)
        share what can be blocks of the source, whole runs of tensors at once
        write NAME.partial front to back, around what is shared:
            for each part: read its ranges -> digest of the tensor -> buffer
            each full buffer -> digest of the file -> disk
        flush it to disk, rename it to NAME, record it in the journal

Each byte of an output file is read once and written once; shared blocks are read where their digests are wanted, holes
stay holes. Memory is one buffer a thread, and a table of expert ids where there is one. The page cache is left as it
was: pages are let go of once they are used. An interruption leaves complete files that the journal records, at most one
NAME.partial a thread, and nothing that an engine would load.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import msgspec
from blake3 import blake3

from .._version import __version__
from ..errors import CheckpointError, OutputError
from ..plan.extents import LEAST_SHARED, Holes, Run, room, runs, shareable
from ..plan.files import Digests, ExpertIds, Literal, OutputFile, Part, Plan, Range, Rows
from ..record.manifest import FileRecord
from . import syscalls
from .id_tables import map_expert_ids
from .journal import JOURNAL, PARTIAL, Journal, Written, check_out, make_directory, sync_directory
from .reflink import Sharing, nearest_directory, refuse_inside
from .sources import BLOCK_SIZE, ZEROS, OpenSources, SourceFiles

SPARE_SPACE = 16 << 20
KERNEL_COPY = 64 << 20  # bytes between two looks at whether to go on
WRITE_BEHIND = 8 * BLOCK_SIZE  # how far what is still being written to disk may lag behind

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did. `resumed` counts the files that an earlier, interrupted run had already written; `shared` are the
    bytes of `size` whose blocks are the source's, `why_not_shared` says in words why none could be; `undigested` counts
    the tensors without a digest.
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


def run(
    plan: Plan,
    out: Path,
    finish: Callable[[list[FileRecord]], Iterable[OutputFile]],
    *,
    restart: bool,
    workers: int | None,
    progress: Progress,
) -> Outcome:
    """Carry out `plan` in the directory `out`, or go on with a run of it that was interrupted.

    Parameters:
        finish: given the records of the plan's files, the files to write last, in order; it may refuse by raising
        restart: discard what an unfinished run left
        workers: threads; None for `default_workers`
        progress: told the bytes of the plan's files that are done, a block at a time, by one thread at a time

    Raises:
        CheckpointError: a source file cannot be read, or changed since the plan was made
        OutputError: `out` is refused, has no room, or cannot be written

    """
    started = time.monotonic()
    refuse_out(plan, out)
    needs = _rooms(plan)
    if not (out / JOURNAL).exists():
        _check_space(out, needs.values())
    names = [*(file.name for file in plan.files), *plan.last]
    with Journal(out, _fingerprint(plan), names, restart=restart) as journal:
        resumed = [file for file in plan.files if file.name in journal.done]
        progress(sum(file.size for file in resumed))
        _check_space(out, [size for name, size in needs.items() if name not in journal.done])
        for directory in plan.directories:
            make_directory(out / directory)
        sources = SourceFiles(plan.source, plan.source_files, plan.headers)
        written = _copy_files(plan, sources, out, journal, workers or default_workers(), progress)
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
    """OutputError unless `plan` may be carried out in `out`: new, empty, or an unfinished run; never in the source."""
    refuse_inside(out, plan.source, plan.directories)
    names = [*(file.name for file in plan.files), *plan.last, *plan.directories]
    taken = {JOURNAL, *(f"{name}{PARTIAL}" for name in names)}
    for name, count in Counter(names).items():
        if count > 1 or name in taken:
            raise OutputError(
                f"{out}: two of its files would be called {name} while it is written; rename the source's"
            )
    check_out(out)


def free_space(out: Path) -> int:
    """Bytes free where `out` is or would be."""
    return shutil.disk_usage(nearest_directory(out)).free


def needed_space(plan: Plan) -> int:
    """Bytes of disk that carrying out `plan` takes: not what it shares with the source, nor the source's holes."""
    return sum(_rooms(plan).values())


def shareable_size(plan: Plan) -> int:
    """Bytes of `plan` that can be blocks of the source."""
    return sum(run.size for file in plan.files for run in shareable(file.parts, plan.sharing.block_size))


def _rooms(plan: Plan) -> dict[str, int]:
    """Bytes of disk that each of the plan's files needs."""
    sparse = {}
    with SourceFiles(plan.source, plan.source_files).open() as opened:
        for name, file in plan.source_files.items():
            if file.size >= LEAST_SHARED and opened.is_sparse(name):
                found = opened.segments(name, 0, file.size)
                sparse[name] = Holes.of([(offset, offset + size) for is_hole, offset, size in found if is_hole])
    return {file.name: room(file, plan.sharing.block_size, sparse) for file in plan.files}


def _check_space(out: Path, needs: Iterable[int]) -> None:
    needed = sum(needs) + SPARE_SPACE
    free = free_space(out)
    if needed > free:
        raise OutputError(
            f"{out}: needs {needed} bytes, {free} are free there; free some space or choose another --out"
        )


def _fingerprint(plan: Plan) -> str:
    """A digest of all that decides what is written where."""
    digest = blake3(msgspec.json.encode([__version__, sorted(plan.source_files.items()), plan.directories]))
    for name, header in plan.headers.items():
        digest.update(msgspec.json.encode([name, header]))
    for file in plan.files:
        digest.update(msgspec.json.encode(file))
    return digest.hexdigest()


def _copy_files(
    plan: Plan, sources: SourceFiles, out: Path, journal: Journal, workers: int, progress: Progress
) -> list[Written]:
    """Write those files of `plan` that `journal` does not have yet; what became of each, in order."""
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


def write_file(file: OutputFile, sources: SourceFiles, sharing: Sharing, out: Path, progress: Progress) -> Written:
    """Write one file of a plan below `out`, complete and on disk when this returns."""
    path, partial = out / file.name, out / f"{file.name}{PARTIAL}"
    try:
        with sources.open() as opened, partial.open("wb", buffering=0) as target:
            shared = _share(file, opened, target.fileno(), sharing)
            if not shared and not any(opened.is_sparse(name) for name in {run.file for run in runs(file.parts)}):
                syscalls.reserve(target.fileno(), file.size)
            filler = _Filler(target.fileno(), opened, shared, sharing, progress)
            digests = [filler.fill(part) for part in file.parts]
            filler.finish()
            opened.check_unchanged()
        partial.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror}; the same command takes up from here"
        ) from error
    tensors = {part.tensor: digest for part, digest in zip(file.parts, digests, strict=True) if part.tensor is not None}
    header = digests[0] if tensors else None
    record = FileRecord(file.name, file.size, file.rank, filler.digest(), header=header, tensors=tensors)
    return Written(record, sum(run.size for run in shared))


def _share(file: OutputFile, opened: OpenSources, target: int, sharing: Sharing) -> list[Run]:
    """Make what can be shared blocks of the source; what was."""
    shared = []
    for run in shareable(file.parts, sharing.block_size):
        try:
            syscalls.share(opened.fd(run.file), run.offset, target, run.at, run.size)
        except OSError as error:
            if sharing.required or not syscalls.is_unsupported(error):
                raise
            break  # this file is copied instead, and the summary says so
        shared.append(run)
    return shared


class _Stopped(Exception):  # noqa: N818  not an error: it unwinds a thread
    """Another file of the run failed, or the user interrupted it: this one need not go on."""


class _Filler:
    """Fills an output file front to back around what it already shares, and takes digests of what it sees.

    What is read is collected into large writes; `_position` is where the next byte belongs, `_filled` bytes before it
    are not yet written.
    """

    def __init__(
        self, target: int, opened: OpenSources, shared: list[Run], sharing: Sharing, progress: Progress
    ) -> None:
        self._target = target
        self._opened = opened
        self._shared = shared
        self._kernel_may_copy = not sharing.forbidden  # the kernel shares blocks where it can
        self._progress = progress
        self._buffer = memoryview(bytearray(BLOCK_SIZE))
        self._filled = 0
        self._position = 0
        self._whole: blake3 | None = blake3()
        self._tensor: blake3 | None = None

    def fill(self, part: Part) -> str | None:
        """Write the next part; its digest, None where some of its bytes were not looked at."""
        self._tensor = blake3()
        match part.content:
            case Literal(data):
                self._put(data)
            case ExpertIds():
                self._put(self._mapped_ids(part.tensor, part.content))
            case Range(file, offset, size):
                self._extent(part, file, offset, size)
            case Rows(file, offset, size, order):
                row_size = size // len(order)
                for row in order:
                    self._extent(part, file, offset + row * row_size, row_size)
        return self._tensor.hexdigest() if self._tensor else None

    def finish(self) -> None:
        """Everything is on disk when this returns, and out of the page cache."""
        self._flush()
        os.ftruncate(self._target, self._position)
        os.fsync(self._target)
        syscalls.forget(self._target, 0, 0)

    def digest(self) -> str | None:
        """Of the whole file, None where some of its bytes were not looked at."""
        return self._whole.hexdigest() if self._whole else None

    def _extent(self, part: Part, file: str, offset: int, size: int) -> None:
        while size:
            shared, count = self._is_shared(size)
            if shared and part.digests is Digests.ALL:
                self._look_at(part.tensor, file, offset, count)
            elif shared:
                self._pass_over(count)
            elif part.digests is Digests.NONE and self._kernel_may_copy and count >= LEAST_SHARED:
                self._let_kernel_copy(part.tensor, file, offset, count)
            else:
                self._copy(part.tensor, file, offset, count)
            offset, size = offset + count, size - count

    def _is_shared(self, size: int) -> tuple[bool, int]:
        """Whether the next bytes are shared, and for how many of the next `size` the answer holds."""
        number = bisect_right(self._shared, self._position, key=lambda run: run.at)
        if number and self._position < self._shared[number - 1].end:
            return True, min(size, self._shared[number - 1].end - self._position)
        if number < len(self._shared):
            return False, min(size, self._shared[number].at - self._position)
        return False, size

    def _copy(self, tensor: str | None, file: str, offset: int, size: int) -> None:
        for is_hole, start, length in self._opened.segments(file, offset, size):
            if is_hole:
                self._leave_hole(length)
                continue
            position = start
            while position < start + length:
                count = min(start + length - position, BLOCK_SIZE - self._filled)
                block = self._buffer[self._filled : self._filled + count]
                self._opened.read(file, position, block, tensor)
                self._took(block)
                position += count

    def _put(self, data: bytes | bytearray) -> None:
        for position in range(0, len(data), BLOCK_SIZE):
            self._flush()
            piece = data[position : position + BLOCK_SIZE]
            self._buffer[: len(piece)] = piece
            self._took(self._buffer[: len(piece)])

    def _took(self, block: memoryview) -> None:
        """`block` has been added to the buffer."""
        if self._tensor:
            self._tensor.update(block)
        self._filled += len(block)
        self._position += len(block)
        if self._filled == BLOCK_SIZE:
            self._flush()

    def _leave_hole(self, size: int) -> None:
        self._flush()
        for position in range(0, size, BLOCK_SIZE):
            self._saw(ZEROS[: min(BLOCK_SIZE, size - position)])

    def _look_at(self, tensor: str | None, file: str, offset: int, size: int) -> None:
        self._flush()
        for block in self._opened.blocks(file, offset, size, self._buffer, tensor):
            self._saw(block)

    def _saw(self, block: memoryview) -> None:
        """`block` is what the output holds next, without a write."""
        for digest in (self._tensor, self._whole):
            if digest:
                digest.update(block)
        self._position += len(block)
        self._progress(len(block))

    def _pass_over(self, size: int) -> None:
        self._flush()
        self._tensor = self._whole = None
        self._position += size
        self._progress(size)

    def _let_kernel_copy(self, tensor: str | None, file: str, offset: int, size: int) -> None:
        self._flush()
        for is_hole, start, length in self._opened.segments(file, offset, size):
            end = start + length
            while start < end:
                count = end - start if is_hole else self._kernel_copied(file, start, min(end - start, KERNEL_COPY))
                if not count:
                    self._copy(tensor, file, start, end - start)
                    break
                self._pass_over(count)
                start += count

    def _kernel_copied(self, file: str, offset: int, size: int) -> int:
        """How many bytes the kernel copied; 0 where it cannot."""
        fd = self._opened.fd(file)
        try:
            count = os.copy_file_range(fd, self._target, size, offset, self._position)
        except OSError as error:
            if not syscalls.is_unsupported(error):
                raise
            return 0
        syscalls.forget(fd, offset, count)
        syscalls.forget(self._target, self._position, count)
        return count

    def _mapped_ids(self, tensor: str | None, content: ExpertIds) -> bytearray:
        ids = bytearray(content.size)
        self._opened.read(content.file, content.offset, memoryview(ids), tensor)
        try:
            map_expert_ids(ids, content.dtype, content.mapping)
        except ValueError as error:
            raise CheckpointError(f"{self._opened.root / content.file}: tensor {tensor}: {error}") from error
        return ids

    def _flush(self) -> None:
        if not self._filled:
            return
        start = self._position - self._filled
        data = self._buffer[: self._filled]
        if self._whole:
            self._whole.update(data)
        written = 0
        while written < len(data):
            written += os.pwrite(self._target, data[written:], start + written)
        syscalls.forget(self._target, start, len(data))  # begins to write it to disk
        syscalls.forget(self._target, max(0, start - WRITE_BEHIND), len(data))  # by now that is on disk
        self._filled = 0
        self._progress(len(data))
