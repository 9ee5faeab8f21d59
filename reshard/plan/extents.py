"""Finds which bytes of an output file can share the source's disk blocks, and how much disk the rest needs. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .files import Content, OutputFile, Part, Range, Rows

MIN_SHARED = 1 << 16  # bytes; for fewer, a copy costs less than the file system's record of the shared blocks


@dataclass(frozen=True, slots=True)
class Extent:
    """`size` bytes at `at` of an output file; the source file `file` has the same bytes at `offset`."""

    file: str
    offset: int
    at: int
    size: int

    @property
    def end(self) -> int:
        """Where it ends in the output."""
        return self.at + self.size


def extents(parts: Iterable[Part], at: int = 0) -> Iterator[Extent]:
    """The extents of an output file that has `parts` from byte `at` on, front to back, each as long as possible."""
    last: Extent | None = None
    for part in parts:
        for file, offset, size in _ranges(part.content):
            if last and (last.file, last.offset + last.size, last.end) == (file, offset, at):
                last = Extent(file, last.offset, last.at, last.size + size)
            else:
                if last:
                    yield last
                last = Extent(file, offset, at, size)
            at += size
        if not isinstance(part.content, (Range, Rows)):
            at += part.content.size
    if last:
        yield last


def _ranges(content: Content) -> Iterator[tuple[str, int, int]]:
    match content:
        case Range(file, offset, size):
            yield file, offset, size
        case Rows(file, offset, size, order):
            row_size = size // len(order)
            for row in order:
                yield file, offset + row * row_size, row_size


def shareable(parts: Iterable[Part], block_size: int | None, at: int = 0) -> list[Extent]:
    """The extents of whole blocks that an output file can share: at the same offset within a block in both files.

    The file has `parts` from byte `at` on.
    """
    if not block_size:
        return []
    return [blocks for extent in extents(parts, at) if (blocks := _whole_blocks(extent, block_size))]


def _whole_blocks(extent: Extent, block_size: int) -> Extent | None:
    if (extent.at - extent.offset) % block_size:
        return None
    skipped = -extent.at % block_size
    size = (extent.size - skipped) // block_size * block_size
    return Extent(extent.file, extent.offset + skipped, extent.at + skipped, size) if size >= MIN_SHARED else None


@dataclass(frozen=True, slots=True)
class Holes:
    """The holes of a file, ascending: `before[i]` is the total size of the holes before the i-th."""

    begins: tuple[int, ...]
    ends: tuple[int, ...]
    before: tuple[int, ...]

    @staticmethod
    def of(holes: Sequence[tuple[int, int]]) -> Holes:
        """Build from the (begin, end) of each hole, ascending."""
        before = [0]
        for begin, end in holes:
            before.append(before[-1] + end - begin)
        return Holes(tuple(begin for begin, _ in holes), tuple(end for _, end in holes), tuple(before))

    def below(self, offset: int) -> int:
        """Total size of the holes before `offset`, in bytes."""
        number = bisect_right(self.begins, offset)
        return self.before[number] - max(0, self.ends[number - 1] - offset) if number else 0


def needed_size(file: OutputFile, block_size: int | None, holes: Mapping[str, Holes]) -> int:
    """Bytes of disk that `file` needs; shared blocks and holes need none. `holes` has those of the source files."""
    size = file.size - sum(extent.size for extent in shareable(file.parts, block_size))
    if block_size is None and holes:
        for part in file.parts:
            if isinstance(part.content, (Range, Rows)) and part.content.file in holes:
                in_source, offset = holes[part.content.file], part.content.offset
                size -= in_source.below(offset + part.content.size) - in_source.below(offset)
    return size
