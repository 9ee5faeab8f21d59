"""Writes one file of a plan: shares what it can, copies the rest, and computes digests of the bytes it reads."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable
from io import FileIO
from pathlib import Path

from blake3 import blake3

from ..errors import CheckpointError, OutputError
from ..plan.extents import Extent, extents, shareable
from ..plan.files import Digests, ExpertIds, Literal, OutputFile, Part, Range, Rows
from ..plan.sharing import Sharing
from ..record.manifest import FileRecord
from . import syscalls
from .checksums import RunningChecksum
from .destination import PARTIAL, sync_directory
from .id_tables import map_expert_ids
from .journal import Written
from .sources import BLOCK_SIZE, ZEROS, OpenSources, Sources

WRITE_BEHIND = 8 * BLOCK_SIZE  # bytes by which the disk may lag behind before we wait for it

Progress = Callable[[int], None]
"""Called with the number of bytes done since the last call."""


def write_file(file: OutputFile, sources: Sources, sharing: Sharing, out: Path, progress: Progress) -> Written:
    """Write one file of a plan below `out`. It is complete and on disk when this returns."""
    path, partial = out / file.name, out / f"{file.name}{PARTIAL}"
    try:
        with sources.open() as opened, _create(partial, file, sources) as target:
            opened.expect(file.parts)
            shared = _share(file, opened, target.fileno(), sharing)
            if not shared and not any(
                opened.is_sparse(name) for name in {extent.file for extent in extents(file.parts)}
            ):
                syscalls.reserve(target.fileno(), file.size)
            check = RunningChecksum(opened, file.checksum.file, file.checksum.value) if file.checksum else None
            filler = _Filler(target.fileno(), opened, shared, progress)
            digests = [filler.fill(part) for part in file.parts]
            filler.finish()
            if check is not None:
                check.finish()
            opened.check_unchanged()
        partial.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}; rerun the command to resume") from error
    tensors = {part.tensor: digest for part, digest in zip(file.parts, digests, strict=True) if part.tensor is not None}
    header = digests[0] if tensors else None
    record = FileRecord(file.name, file.size, file.rank, filler.digest(), header=header, tensors=tensors)
    return Written(record, sum(extent.size for extent in shared))


def _create(path: Path, file: OutputFile, sources: Sources) -> FileIO:
    """Create `path` anew for `file`. It has the permissions of the source's files that it is made from.

    These are the files that its bytes come from, and the file that it replaces. A file made from none of them gets what
    umask allows and every file of the source has. In a store, files have no permissions: umask decides.
    """
    made_from = {part.content.file for part in file.parts if not isinstance(part.content, Literal)}
    made_from |= {file.name} & sources.files.keys()
    mode = sources.mode(made_from or sources.files)
    most = 0o666 if mode is None else mode & 0o666
    path.unlink(missing_ok=True)  # what an interrupted run left may be read-only
    target = FileIO(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, most), "wb")
    if made_from and mode is not None:
        syscalls.set_mode(target.fileno(), mode)
    return target


def _share(file: OutputFile, opened: OpenSources, target: int, sharing: Sharing) -> list[Extent]:
    """Share what can be shared with the source; returns the extents that are shared now."""
    shared = []
    for extent in shareable(file.parts, sharing.block_size):
        try:
            opened.share(extent, target)
        except OSError as error:
            if sharing.required or not syscalls.is_unsupported(error):
                raise
            break  # the rest of this file is copied, and the summary says so
        shared.append(extent)
    return shared


class _Filler:
    """Fills an output file front to back around its shared extents, and computes digests of the bytes it reads.

    Bytes are buffered for large writes: `_position` is the offset of the next byte; the last `_filled` bytes before it
    are in the buffer, not yet written. A digest becomes None once bytes are skipped.
    """

    def __init__(self, target: int, opened: OpenSources, shared: list[Extent], progress: Progress) -> None:
        self._target = target
        self._opened = opened
        self._shared = shared
        self._progress = progress
        self._buffer = memoryview(bytearray(BLOCK_SIZE))
        self._filled = 0
        self._position = 0
        self._file_digest: blake3 | None = blake3()
        self._tensor_digest: blake3 | None = None

    def fill(self, part: Part) -> str | None:
        """Write the next part; returns its digest, None if some of its bytes were not read."""
        self._tensor_digest = blake3()
        match part.content:
            case Literal(data):
                self._put(data)
            case ExpertIds():
                self._put(self._mapped_ids(part.tensor, part.content))
            case Range(file, offset, size):
                self._fill_range(part, file, offset, size)
            case Rows(file, offset, size, order):
                row_size = size // len(order)
                for row in order:
                    self._fill_range(part, file, offset + row * row_size, row_size)
        return self._tensor_digest.hexdigest() if self._tensor_digest else None

    def finish(self) -> None:
        """Write the rest to disk, and drop the file from the page cache."""
        self._flush()
        os.ftruncate(self._target, self._position)
        os.fsync(self._target)
        syscalls.forget(self._target, 0, 0)

    def digest(self) -> str | None:
        """The digest of the whole file, None if some of its bytes were not read."""
        return self._file_digest.hexdigest() if self._file_digest else None

    def _fill_range(self, part: Part, file: str, offset: int, size: int) -> None:
        while size:
            shared, count = self._is_shared(size)
            if shared and part.digests is Digests.ALL:
                self._digest_shared(part.tensor, file, offset, count)
            elif shared:
                self._skip_shared(count)
            else:
                self._copy(part.tensor, file, offset, count)
            offset, size = offset + count, size - count

    def _is_shared(self, size: int) -> tuple[bool, int]:
        """Whether the next bytes are shared, and for how many of the next `size` bytes this holds."""
        number = bisect_right(self._shared, self._position, key=lambda extent: extent.at)
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
                self._add(block)
                position += count

    def _put(self, data: bytes | bytearray) -> None:
        for position in range(0, len(data), BLOCK_SIZE):
            self._flush()
            piece = data[position : position + BLOCK_SIZE]
            self._buffer[: len(piece)] = piece
            self._add(self._buffer[: len(piece)])

    def _add(self, block: memoryview) -> None:
        """Count `block`, the next bytes, which are in the buffer already; write the buffer if it is full."""
        if self._tensor_digest:
            self._tensor_digest.update(block)
        self._filled += len(block)
        self._position += len(block)
        if self._filled == BLOCK_SIZE:
            self._flush()

    def _leave_hole(self, size: int) -> None:
        self._flush()
        for position in range(0, size, BLOCK_SIZE):
            self._digest_unwritten(ZEROS[: min(BLOCK_SIZE, size - position)])

    def _digest_shared(self, tensor: str | None, file: str, offset: int, size: int) -> None:
        self._flush()
        for block in self._opened.blocks(file, offset, size, self._buffer, tensor):
            self._digest_unwritten(block)

    def _digest_unwritten(self, block: memoryview) -> None:
        """Count and digest `block`, the next bytes, which need no write: a hole, or shared already."""
        for digest in (self._tensor_digest, self._file_digest):
            if digest:
                digest.update(block)
        self._position += len(block)
        self._progress(len(block))

    def _skip_shared(self, size: int) -> None:
        self._flush()
        self._tensor_digest = self._file_digest = None
        self._position += size
        self._progress(size)

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
        if self._file_digest:
            self._file_digest.update(data)
        written = 0
        while written < len(data):
            written += os.pwrite(self._target, data[written:], start + written)
        syscalls.forget(self._target, start, len(data))  # the disk begins to write it
        syscalls.forget(
            self._target, max(0, start - WRITE_BEHIND), len(data)
        )  # this is on disk by now, and leaves the page cache
        self._filled = 0
        self._progress(len(data))
