"""Reads ranges of source files in large blocks. Skips holes, and notices changed files.

The page cache is left as it was: pages that were there before the first read stay, what reading brought in is dropped.
If the kernel does not tell which were there, which it does not if the file is another user's and read-only, all that
was read is dropped.
"""

from __future__ import annotations

import errno
import os
import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

from blake3 import blake3

from ..checkpoint.directory import File
from ..checkpoint.header import Tensor
from ..checkpoint.location import Location
from ..errors import CheckpointError
from ..plan.extents import Extent
from ..plan.files import Part
from . import syscalls
from .page_cache import resident

BLOCK_SIZE = 4 << 20  # bytes read or written at once
ZEROS = memoryview(bytes(BLOCK_SIZE))


class Watcher(Protocol):
    """Sees every block that is read, with its file's name and its offset there."""

    def take(self, name: str, offset: int, block: memoryview) -> None:
        """See a block; the next one may overwrite it."""


class Sources(Protocol):
    """The files of a source, each of which must still be as it was when the plan was made."""

    @property
    def root(self) -> Location:
        """What they are below."""

    @property
    def files(self) -> Mapping[str, File]:
        """Each as it was."""

    def open(self) -> OpenSources:
        """Open files for the use of one thread."""

    def mode(self, names: Iterable[str]) -> int | None:
        """The permission bits that all the files `names` have; None if they have none."""


class OpenSources(ABC):
    """Source files, opened when first needed and closed together. A method that fails raises CheckpointError."""

    def __init__(self, sources: Sources) -> None:
        self.root = sources.root
        self._files = sources.files
        self._watcher: Watcher | None = None

    def __enter__(self) -> OpenSources:
        """Opens nothing yet."""
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close all files."""

    def watch(self, watcher: Watcher) -> None:
        """Show `watcher` every block that is read from now on."""
        self._watcher = watcher

    def size(self, name: str) -> int:
        """The size of the file `name`, in bytes."""
        return self._files[name].size

    @abstractmethod
    def expect(self, parts: Iterable[Part]) -> None:
        """Say what will be read, by `parts` of output files; a store is then asked for more at a time."""

    def share(self, extent: Extent, target: int) -> None:
        """Let `extent` of the file `target` share the source's disk blocks; OSError if it cannot."""
        raise OSError(errno.EOPNOTSUPP, "not on a disk")

    def is_sparse(self, name: str) -> bool:
        """Whether the file `name` takes less disk than its size, and so may have holes."""
        return False

    def segments(self, name: str, offset: int, size: int) -> Iterator[tuple[bool, int, int]]:
        """Cut the range into holes and data: (is a hole, offset, size), in order."""
        yield False, offset, size

    def read(self, name: str, offset: int, into: memoryview, tensor: str | None = None) -> None:
        """Fill `into` with the bytes of the file `name` from `offset` on; `tensor` names their tensor in errors."""
        self._read(name, offset, into, tensor)
        if self._watcher is not None:
            self._watcher.take(name, offset, into)

    @abstractmethod
    def _read(self, name: str, offset: int, into: memoryview, tensor: str | None) -> None:
        """Do what `read` says."""

    def blocks(
        self, name: str, offset: int, size: int, buffer: memoryview, tensor: str | None = None
    ) -> Iterator[memoryview]:
        """Yield the bytes of a range, block by block. Each is read into `buffer` and overwrites the one before.

        Holes are not read: they come as blocks of zeros.
        """
        for is_hole, start, length in self.segments(name, offset, size):
            memory = ZEROS if is_hole else buffer
            for position in range(start, start + length, len(memory) or 1):
                block = memory[: start + length - position]
                if not is_hole:
                    self.read(name, position, block, tensor)
                yield block

    def digest(self, tensor: Tensor) -> str:
        """BLAKE3 of the tensor's bytes."""
        return self._digest(tensor.file, tensor.offset, tensor.size, tensor.name)

    def digest_file(self, name: str) -> str:
        """BLAKE3 of a whole file."""
        return self._digest(name, 0, self._files[name].size, None)

    def _digest(self, name: str, offset: int, size: int, tensor: str | None) -> str:
        digest = blake3()
        for block in self.blocks(name, offset, size, memoryview(bytearray(min(size, BLOCK_SIZE))), tensor):
            digest.update(block)
        return digest.hexdigest()

    @abstractmethod
    def check_unchanged(self) -> None:
        """CheckpointError if a file that was read has changed since the plan was made."""


class SourceFiles:
    """The files below `root`. Each must still be as `files` says, and begin with its header in `headers`."""

    def __init__(self, root: Path, files: Mapping[str, File], headers: Mapping[str, bytes] | None = None) -> None:
        self.root = root
        self.files = files
        self.headers = headers or {}
        self._lock = threading.Lock()
        self._cached: dict[str, Sequence[tuple[int, int]]] = {}
        self._readers: Counter[str] = Counter()

    def open(self) -> OpenSources:
        """Open files for the use of one thread."""
        return _OpenLocal(self)

    def mode(self, names: Iterable[str]) -> int:
        """The permission bits that all the files `names` have."""
        mode = 0o777
        for path in (self.root / name for name in names):
            try:
                mode &= path.stat().st_mode
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror}; did it change?") from error
        return mode

    def begin(self, name: str, segments: Iterable[tuple[bool, int, int]], fd: int) -> Sequence[tuple[int, int]]:
        """Note that a thread reads the file `name`, as `fd`; what of it was in the page cache before any thread did."""
        with self._lock:
            self._readers[name] += 1
            if name not in self._cached:
                data = ((offset, size) for is_hole, offset, size in segments if not is_hole)
                self._cached[name] = [found for offset, size in data for found in resident(fd, offset, size)]
            return self._cached[name]

    def end(self, name: str) -> bool:
        """Note that a thread has read the file `name`; whether no other reads it now."""
        with self._lock:
            self._readers[name] -= 1
            return not self._readers[name]


class _OpenLocal(OpenSources):
    """Open files of a directory."""

    def __init__(self, sources: SourceFiles) -> None:
        super().__init__(sources)
        self._directory = sources.root
        self._sources = sources
        self._headers = sources.headers
        self._fds: dict[str, int] = {}
        self._sparse: set[str] = set()
        self._cached: dict[str, Sequence[tuple[int, int]]] = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close all files, and drop what the kernel read ahead, if no other thread may want it."""
        for name in self._cached:
            if self._sources.end(name):
                with suppress(OSError):
                    self._forget(name, 0, self._files[name].size)
        for fd in self._fds.values():
            os.close(fd)

    def _fd(self, name: str) -> int:
        """The descriptor of the file `name`; opening it checks that the file has not changed."""
        if name not in self._fds:
            try:
                self._fds[name] = os.open(self._directory / name, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(f"{self.root / name}: cannot be opened: {error.strerror}") from error
            status = os.fstat(self._fds[name])
            if status.st_blocks * 512 < status.st_size:
                self._sparse.add(name)
                try:
                    syscalls.sync(self._fds[name])  # some file systems report data that is not on disk yet as a hole
                except OSError as error:
                    raise CheckpointError(f"{self.root / name}: cannot be synced: {error.strerror}") from error
            self._check(name)
            header = self._headers.get(name, b"")
            found = bytearray(len(header))
            self.read(name, 0, memoryview(found))
            if found != header:
                raise self._changed(name)
        return self._fds[name]

    def expect(self, parts: Iterable[Part]) -> None:
        """Nothing to do: the kernel reads ahead."""

    def share(self, extent: Extent, target: int) -> None:
        """Let `extent` of the file `target` share the source's disk blocks; OSError if it cannot."""
        syscalls.share(self._fd(extent.file), extent.offset, target, extent.at, extent.size)

    def is_sparse(self, name: str) -> bool:
        """Whether the file `name` takes less disk than its size, and so may have holes."""
        self._fd(name)
        return name in self._sparse

    def segments(self, name: str, offset: int, size: int) -> Iterator[tuple[bool, int, int]]:
        """Cut the range into holes and data: (is a hole, offset, size), in order."""
        if not self.is_sparse(name):
            yield False, offset, size
            return
        try:
            yield from syscalls.segments(self._fd(name), offset, size)
        except OSError as error:
            raise self._unreadable(name, offset, None, error) from error

    def _read(self, name: str, offset: int, into: memoryview, tensor: str | None) -> None:
        fd = self._fd(name)
        if name not in self._cached:
            self._cached[name] = self._sources.begin(name, self.segments(name, 0, self._files[name].size), fd)
        filled = 0
        try:
            while filled < len(into):
                count = os.preadv(fd, [into[filled:]], offset + filled)
                if count == 0:
                    raise CheckpointError(
                        f"{self.root / name}: ends at byte {offset + filled}, expected more; did it change?"
                    )
                filled += count
            self._forget(name, offset, filled)
        except OSError as error:
            raise self._unreadable(name, offset + filled, tensor, error) from error

    def _forget(self, name: str, offset: int, size: int) -> None:
        """Drop a range from the page cache, but for what was there before."""
        cached, end = self._cached[name], offset + size
        for number in range(bisect_right(cached, offset, key=lambda pages: pages[1]), len(cached)):
            start, until = cached[number]
            if start >= end:
                break
            if start > offset:
                syscalls.forget(self._fds[name], offset, start - offset)
            offset = max(offset, until)
        if offset < end:
            syscalls.forget(self._fds[name], offset, end - offset)

    def check_unchanged(self) -> None:
        """CheckpointError if a file that was read has changed since the plan was made."""
        for name in self._fds:
            self._check(name)

    def _check(self, name: str) -> None:
        status, planned = os.fstat(self._fds[name]), self._files[name]
        if (status.st_size, status.st_mtime_ns) != (planned.size, planned.mtime_ns):
            raise self._changed(name)

    def _changed(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.root / name}: changed while it was being read; rerun the command when nothing writes to it"
        )

    def _unreadable(self, name: str, offset: int, tensor: str | None, error: OSError) -> CheckpointError:
        of_tensor = f"tensor {tensor}: " if tensor else ""
        return CheckpointError(
            f"{self.root / name}: {of_tensor}cannot be read at byte {offset}: {error.strerror}; repair the file or "
            "download it again, then rerun the command to resume"
        )
