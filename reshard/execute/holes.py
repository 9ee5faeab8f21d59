"""Finds what was never written of a source's weights: holes, and space that a downloader reserved. Both read as zeros.

Reads no tensor data: it asks the file system, once for each file.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.header import Header, Tensor
from ..checkpoint.location import Location
from ..errors import CheckpointError
from . import syscalls


@dataclass(frozen=True, slots=True)
class Hole:
    """`size` bytes at `offset` of the tensor's file that were never written."""

    tensor: Tensor
    offset: int
    size: int


def find_hole(root: Location, shards: Mapping[str, Header], names: Collection[str] | None = None) -> Hole | None:
    """The first hole in a tensor of the files `shards` below `root`; with `names`, only in these tensors.

    None too if the file system does not tell. Raises CheckpointError if a file cannot be read.
    """
    if not isinstance(root, Path):
        return None
    for name, header in shards.items():
        tensors = [tensor for tensor in header.tensors if tensor.size and (names is None or tensor.name in names)]
        try:
            with (root / name).open("rb", buffering=0) as file:
                if _first_in(file.fileno(), tensors) is None:
                    continue
                with suppress(OSError):
                    os.fsync(file.fileno())  # what is not on disk yet may be reported as a hole
                if found := _first_in(file.fileno(), tensors):
                    return found
        except OSError as error:
            raise CheckpointError(f"{root / name}: cannot be searched for holes: {error.strerror}") from error
    return None


def _first_in(fd: int, tensors: list[Tensor]) -> Hole | None:
    """The first hole in one of `tensors`, which are in the order of their offsets, without gaps between neighbours."""
    starts = [tensor.offset for tensor in tensors]
    for start, end in _never_written(fd):
        number = max(0, bisect_right(starts, start) - 1)
        for tensor in tensors[number : number + 2]:
            offset, until = max(start, tensor.offset), min(end, tensor.offset + tensor.size)
            if offset < until:
                return Hole(tensor, offset, until - offset)
    return None


def _never_written(fd: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each hole of a file, and of each part that is reserved only."""
    status = os.fstat(fd)
    for is_hole, start, size in syscalls.segments(fd, 0, status.st_size):
        if is_hole:
            yield start, start + size
    if status.st_blocks * 512 >= status.st_size:  # otherwise it has no space in reserve: it has holes, or is compressed
        yield from syscalls.reserved(fd, status.st_size)
