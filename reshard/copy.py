"""Carries out a plan: reads ranges, writes files, takes digests on the way.

    for each output file, several at a time:            (threads; reading, hashing and writing release the GIL)
        write NAME.partial front to back:
            for each part: read its ranges -> digest of the tensor -> buffer
            each full buffer -> digest of the file -> disk
        flush it to disk, rename it to NAME, record it in the journal

Each byte of an output file is read once and written once. Memory is one buffer a thread, and a table of expert ids
where there is one. An interruption leaves complete files that the journal records, at most one NAME.partial a thread,
and nothing that an engine would load.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec
from blake3 import blake3

from ._version import __version__
from .checkpoint import File
from .errors import CheckpointError, OutputError
from .expert_ids import map_expert_ids
from .journal import JOURNAL, PARTIAL, Journal, check_out, sync_directory
from .manifest import FileRecord
from .plan import ExpertIds, Literal, OutputFile, Part, Plan, Range, Rows

BLOCK_SIZE = 4 << 20
SPARE_SPACE = 16 << 20

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did. `resumed` counts the files that an earlier, interrupted run had already written."""

    out: Path
    files: int
    size: int
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
        progress: told the bytes written of the plan's files, a block at a time, by one thread at a time

    Raises:
        CheckpointError: a source file cannot be read, or changed since the plan was made
        OutputError: `out` is refused, has no room, or cannot be written

    """
    started = time.monotonic()
    refuse_out(plan, out)
    if not (out / JOURNAL).exists():
        _check_space(out, plan.files)
    names = [*(file.name for file in plan.files), *plan.last]
    with Journal(out, _fingerprint(plan), names, restart=restart) as journal:
        resumed = [file for file in plan.files if file.name in journal.done]
        progress(sum(file.size for file in resumed))
        _check_space(out, [file for file in plan.files if file.name not in journal.done])
        for directory in plan.directories:
            (out / directory).mkdir(parents=True, exist_ok=True)
        sources = SourceFiles(plan.source, plan.source_files)
        records = _copy_files(plan.files, sources, out, journal, workers or default_workers(), progress)
        last = list(finish(records))
        for file in last:
            write_file(file, sources, out, lambda written: None)
        journal.remove()
    return Outcome(
        out=out,
        files=len(plan.files) + len(last),
        size=plan.size + sum(file.size for file in last),
        seconds=time.monotonic() - started,
        resumed=len(resumed),
    )


def refuse_out(plan: Plan, out: Path) -> None:
    """OutputError unless `plan` may be carried out in `out`: new, empty, or an unfinished run; never in the source."""
    resolved = out.resolve()
    for folder in ("", *plan.directories):  # a folder of the source may be a link to somewhere else
        if resolved.is_relative_to((plan.source / folder).resolve()):
            raise OutputError(
                f"{out}: is {plan.source / folder} or lies in it; choose another --out: the source is never written to"
            )
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
    directory = out.absolute()
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def _check_space(out: Path, files: Iterable[OutputFile]) -> None:
    needed = sum(file.size for file in files) + SPARE_SPACE
    free = free_space(out)
    if needed > free:
        raise OutputError(
            f"{out}: needs {needed} bytes, {free} are free there; free some space or choose another --out"
        )


def _fingerprint(plan: Plan) -> str:
    """A digest of all that decides what is written where."""
    digest = blake3(msgspec.json.encode([__version__, sorted(plan.source_files.items()), plan.directories]))
    for file in plan.files:
        digest.update(msgspec.json.encode(file))
    return digest.hexdigest()


def _copy_files(
    files: Sequence[OutputFile], sources: SourceFiles, out: Path, journal: Journal, workers: int, progress: Progress
) -> list[FileRecord]:
    """Write those of `files` that `journal` does not have yet; the records of all of them, in order."""
    stop = threading.Event()
    lock = threading.Lock()

    def work(file: OutputFile) -> None:
        record = write_file(file, sources, out, lambda written: _report(written, progress, lock, stop))
        with lock:
            journal.record(record)

    todo = [file for file in files if file.name not in journal.done]
    with ThreadPoolExecutor(workers, thread_name_prefix="reshard") as pool:
        futures = [pool.submit(work, file) for file in todo]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return [journal.done[file.name] for file in files]


def _report(written: int, progress: Progress, lock: threading.Lock, stop: threading.Event) -> None:
    if stop.is_set():
        raise _Stopped
    with lock:
        progress(written)


def write_file(file: OutputFile, sources: SourceFiles, out: Path, progress: Progress) -> FileRecord:
    """Write one file of a plan below `out`, complete and on disk when this returns."""
    path, partial = out / file.name, out / f"{file.name}{PARTIAL}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with sources.open() as opened, partial.open("wb", buffering=0) as target:
            block = _Block(target.fileno(), progress)
            tensors = {}
            for part in file.parts:
                digest = blake3()
                for size, read in _extents(part, opened):
                    block.append(size, read, digest)
                if part.tensor is not None:
                    tensors[part.tensor] = digest.hexdigest()
            block.flush()
            opened.check_unchanged()
            os.fsync(target.fileno())
        partial.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror}; the same command takes up from here"
        ) from error
    return FileRecord(file.name, file.size, file.rank, block.digest.hexdigest(), tensors)


class SourceFiles:
    """The files that a plan's ranges are in: below `root`, as `files` says they were when the plan was made."""

    def __init__(self, root: Path, files: Mapping[str, File]) -> None:
        self.root = root
        self.files = files

    def open(self) -> OpenSources:
        """File descriptors for one thread's use."""
        return OpenSources(self)


class OpenSources:
    """Source files opened as they are needed, closed together."""

    def __init__(self, sources: SourceFiles) -> None:
        self.root = sources.root
        self._files = sources.files
        self._fds: dict[str, int] = {}

    def __enter__(self) -> OpenSources:
        """Nothing is open yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close what was opened."""
        for fd in self._fds.values():
            os.close(fd)

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes of the file `name` from `offset` on."""
        path = self.root / name
        try:
            if name not in self._fds:
                self._fds[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._check(name)
            filled = 0
            while filled < len(into):
                count = os.preadv(self._fds[name], [into[filled:]], offset + filled)
                if count == 0:
                    raise CheckpointError(f"{path}: ends at byte {offset + filled}, expected more; did it change?")
                filled += count
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read at byte {offset}: {error.strerror}") from error

    def check_unchanged(self) -> None:
        """CheckpointError where a file that was read is not what it was when the plan was made."""
        for name in self._fds:
            self._check(name)

    def _check(self, name: str) -> None:
        status, planned = os.fstat(self._fds[name]), self._files[name]
        if (status.st_size, status.st_mtime_ns) != (planned.size, planned.mtime_ns):
            raise CheckpointError(f"{self.root / name}: changed while it was being read; start again when it rests")


_Read = Callable[[int, memoryview], None]
"""Fills a buffer with the bytes from a position on."""


def _extents(part: Part, opened: OpenSources) -> Iterator[tuple[int, _Read]]:
    """What `part` consists of, front to back: sizes, and how to read them."""
    match part.content:
        case Literal(data):
            yield len(data), _from_bytes(data)
        case Range(file, offset, size):
            yield size, _from_file(opened, file, offset)
        case Rows(file, offset, size, order):
            row_size = size // len(order)
            for row in order:
                yield row_size, _from_file(opened, file, offset + row * row_size)
        case ExpertIds(file, offset, size, dtype, mapping):
            ids = bytearray(size)
            opened.read(file, offset, memoryview(ids))
            try:
                map_expert_ids(ids, dtype, mapping)
            except ValueError as error:
                raise CheckpointError(f"{opened.root / file}: tensor {part.tensor}: {error}") from error
            yield size, _from_bytes(ids)


def _from_bytes(data: bytes | bytearray) -> _Read:
    def read(position: int, into: memoryview) -> None:
        into[:] = data[position : position + len(into)]

    return read


def _from_file(opened: OpenSources, name: str, offset: int) -> _Read:
    def read(position: int, into: memoryview) -> None:
        opened.read(name, offset + position, into)

    return read


class _Stopped(Exception):  # noqa: N818  not an error: it unwinds a thread
    """Another file of the run failed, or the user interrupted it: this one need not go on."""


class _Block:
    """Collects what is read into large writes, and takes the digest of all of it."""

    def __init__(self, fd: int, progress: Progress) -> None:
        self.digest = blake3()
        self._fd = fd
        self._progress = progress
        self._view = memoryview(bytearray(BLOCK_SIZE))
        self._filled = 0

    def append(self, size: int, read: _Read, digest: blake3) -> None:
        """Take `size` bytes from `read`; `digest` is updated with them."""
        position = 0
        while position < size:
            count = min(size - position, BLOCK_SIZE - self._filled)
            target = self._view[self._filled : self._filled + count]
            read(position, target)
            digest.update(target)
            self._filled += count
            position += count
            if self._filled == BLOCK_SIZE:
                self.flush()

    def flush(self) -> None:
        """Write what was collected."""
        data = self._view[: self._filled]
        self.digest.update(data)
        while data:
            data = data[os.write(self._fd, data) :]
        self._progress(self._filled)
        self._filled = 0
