"""Compares source files with the checksums that they were downloaded by, in one pass over bytes that are read anyway.

    a file is copied in its own order:   each block that is read is hashed; what was skipped is read and hashed
    files are copied out of order:       each is read by itself, before anything is written

The Hub names a large file by its SHA-256 and a small one by its Git blob id, which is a SHA-1 of its size and bytes.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed

from ..errors import CheckpointError
from .sources import BLOCK_SIZE, ZEROS, OpenSources, Sources


def _git_blob(size: int) -> hashlib._Hash:
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


class RunningChecksum:
    """The checksum of the source file `name`, computed from what `opened` reads of it; must become `expected`."""

    def __init__(
        self, opened: OpenSources, name: str, expected: str, progress: Callable[[int], None] = lambda count: None
    ) -> None:
        self._opened = opened
        self._name = name
        self._size = opened.size(name)
        self._expected = expected
        self._progress = progress
        self._digest = hashlib.sha256() if len(expected) == 64 else _git_blob(self._size)
        self._position = 0  # all bytes before it are in the digest
        opened.watch(self)

    def take(self, name: str, offset: int, block: memoryview) -> None:
        """Count `block`, which was read at `offset`. Reads what lies between; ignores what was counted already."""
        if name != self._name:
            return
        if offset > self._position:
            self._read_up_to(offset)
        self._add(block[max(0, self._position - offset) :])

    def finish(self) -> None:
        """Read the rest; CheckpointError if the file is not the one that was downloaded."""
        self._read_up_to(self._size)
        if (found := self._digest.hexdigest()) != self._expected:
            what = "SHA-256" if len(found) == 64 else "Git blob id"
            raise CheckpointError(
                f"{self._opened.root / self._name}: its {what} is {found}, but that of the file on the Hub is "
                f"{self._expected}: damaged or changed; remove it, and download it again"
            )

    def _read_up_to(self, end: int) -> None:
        buffer = memoryview(bytearray(min(end - self._position, BLOCK_SIZE)))
        for is_hole, start, size in list(self._opened.segments(self._name, self._position, end - self._position)):
            for position in range(start, start + size, BLOCK_SIZE):
                count = min(BLOCK_SIZE, start + size - position)
                if is_hole:
                    self._add(ZEROS[:count])
                else:
                    self._opened.read(self._name, position, buffer[:count])  # which calls `take`
                self._progress(count)

    def _add(self, block: memoryview) -> None:
        self._digest.update(block)
        self._position += len(block)


def check_sources(sources: Sources, expected: Mapping[str, str], workers: int, progress: Callable[[int], None]) -> None:
    """Read the source files that `expected` names; CheckpointError if one has another checksum.

    Reads nothing if `expected` is empty. Calls `progress` with the number of bytes read, by one thread at a time.
    """
    stop, lock = threading.Event(), threading.Lock()

    def report(count: int) -> None:
        if stop.is_set():
            raise CancelledError  # ends a thread, because another file failed or the user interrupted the run
        with lock:
            progress(count)

    def check(name: str) -> None:
        with sources.open() as opened:
            RunningChecksum(opened, name, expected[name], report).finish()
            opened.check_unchanged()

    with ThreadPoolExecutor(workers, thread_name_prefix="reshard") as pool:
        try:
            for future in as_completed([pool.submit(check, name) for name in expected]):
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
