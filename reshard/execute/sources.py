"""Reads ranges of files that must not change meanwhile: large blocks, holes unread, the page cache left as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from blake3 import blake3

from ..checkpoint.directory import File
from ..checkpoint.header import Tensor
from ..errors import CheckpointError
from . import syscalls

BLOCK_SIZE = 4 << 20
ZEROS = memoryview(bytes(BLOCK_SIZE))


class SourceFiles:
    """The files below `root` that are read: they must be as `files` says, and begin with their `headers`."""

    def __init__(self, root: Path, files: Mapping[str, File], headers: Mapping[str, bytes] | None = None) -> None:
        self.root = root
        self.files = files
        self.headers = headers or {}

    def open(self) -> OpenSources:
        """File descriptors for one thread's use."""
        return OpenSources(self)


class OpenSources:
    """Source files opened as they are needed, closed together. Each method raises CheckpointError where it fails."""

    def __init__(self, sources: SourceFiles) -> None:
        self.root = sources.root
        self._files = sources.files
        self._headers = sources.headers
        self._fds: dict[str, int] = {}
        self._sparse: set[str] = set()

    def __enter__(self) -> OpenSources:
        """Nothing is open yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close what was opened."""
        for fd in self._fds.values():
            os.close(fd)

    def fd(self, name: str) -> int:
        """The descriptor of the file `name`, which is then still what it was."""
        if name not in self._fds:
            try:
                self._fds[name] = os.open(self.root / name, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(f"{self.root / name}: cannot be opened: {error.strerror}") from error
            status = os.fstat(self._fds[name])
            if status.st_blocks * 512 < status.st_size:
                self._sparse.add(name)
                os.fsync(self._fds[name])  # some file systems take for a hole what is not on disk yet
            self._check(name)
            header = self._headers.get(name, b"")
            found = bytearray(len(header))
            self.read(name, 0, memoryview(found))
            if found != header:
                raise self._changed(name)
        return self._fds[name]

    def is_sparse(self, name: str) -> bool:
        """Whether the file `name` takes less of the disk than its size, so may have holes."""
        self.fd(name)
        return name in self._sparse

    def segments(self, name: str, offset: int, size: int) -> Iterator[tuple[bool, int, int]]:
        """The range as (is a hole, offset, size), in order."""
        if not self.is_sparse(name):
            yield False, offset, size
            return
        try:
            yield from syscalls.segments(self.fd(name), offset, size)
        except OSError as error:
            raise self._unreadable(name, offset, None, error) from error

    def read(self, name: str, offset: int, into: memoryview, tensor: str | None = None) -> None:
        """Fill `into` with the bytes of the file `name` from `offset` on; `tensor` is whose they are, for messages."""
        fd = self.fd(name)
        filled = 0
        try:
            while filled < len(into):
                count = os.preadv(fd, [into[filled:]], offset + filled)
                if count == 0:
                    raise CheckpointError(
                        f"{self.root / name}: ends at byte {offset + filled}, expected more; did it change?"
                    )
                filled += count
            syscalls.forget(fd, offset, filled)
        except OSError as error:
            raise self._unreadable(name, offset + filled, tensor, error) from error

    def blocks(
        self, name: str, offset: int, size: int, buffer: memoryview, tensor: str | None = None
    ) -> Iterator[memoryview]:
        """The bytes of a range, at most len(`buffer`) at a time, read into it; one is gone when the next is asked for.

        Holes are not read: they come as zeros.
        """
        for is_hole, start, length in self.segments(name, offset, size):
            whole = ZEROS if is_hole else buffer
            for position in range(start, start + length, len(whole) or 1):
                block = whole[: start + length - position]
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

    def check_unchanged(self) -> None:
        """CheckpointError where a file that was read is not what it was when the plan was made."""
        for name in self._fds:
            self._check(name)

    def _check(self, name: str) -> None:
        status, planned = os.fstat(self._fds[name]), self._files[name]
        if (status.st_size, status.st_mtime_ns) != (planned.size, planned.mtime_ns):
            raise self._changed(name)

    def _changed(self, name: str) -> CheckpointError:
        return CheckpointError(f"{self.root / name}: changed while it was being read; start again when it rests")

    def _unreadable(self, name: str, offset: int, tensor: str | None, error: OSError) -> CheckpointError:
        of_tensor = f"tensor {tensor}: " if tensor else ""
        return CheckpointError(
            f"{self.root / name}: {of_tensor}cannot be read at byte {offset}: {error.strerror}; mend or download the "
            "file again, the same command then takes up from here"
        )
