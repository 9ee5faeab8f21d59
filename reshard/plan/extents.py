"""Where each byte of an output file comes from, as runs: what can share the source's blocks, what takes room. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .files import Content, OutputFile, Part, Range, Rows

LEAST_SHARED = 1 << 16  # bytes: for fewer, a copy is less work than the file system's record of a shared block


@dataclass(frozen=True, slots=True)
class Run:
    """`size` bytes at `at` of an output file that are those at `offset` of the source file `file`."""

    file: str
    offset: int
    at: int
    size: int

    @property
    def end(self) -> int:
        """Where it ends in the output."""
        return self.at + self.size


def runs(parts: Iterable[Part]) -> Iterator[Run]:
    """The longest runs of an output file that is `parts`, front to back."""
    last: Run | None = None
    at = 0
    for part in parts:
        for file, offset, size in _ranges(part.content):
            if last and (last.file, last.offset + last.size, last.end) == (file, offset, at):
                last = Run(file, last.offset, last.at, last.size + size)
            else:
                if last:
                    yield last
                last = Run(file, offset, at, size)
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


def shareable(parts: Iterable[Part], block_size: int | None) -> list[Run]:
    """The whole blocks of an output file that can be those of the source: its runs lie alike on blocks there."""
    return [blocks for run in runs(parts) if (blocks := _whole_blocks(run, block_size))] if block_size else []


def _whole_blocks(run: Run, block_size: int) -> Run | None:
    if (run.at - run.offset) % block_size:
        return None
    skipped = -run.at % block_size
    size = (run.size - skipped) // block_size * block_size
    return Run(run.file, run.offset + skipped, run.at + skipped, size) if size >= LEAST_SHARED else None


@dataclass(frozen=True, slots=True)
class Holes:
    """The holes of a file: those before the i-th begin have `before[i]` bytes together; ascending."""

    begins: tuple[int, ...]
    ends: tuple[int, ...]
    before: tuple[int, ...]

    @staticmethod
    def of(holes: Sequence[tuple[int, int]]) -> Holes:
        """From (begin, end) of each, ascending."""
        before = [0]
        for begin, end in holes:
            before.append(before[-1] + end - begin)
        return Holes(tuple(begin for begin, _ in holes), tuple(end for _, end in holes), tuple(before))

    def below(self, offset: int) -> int:
        """Bytes of holes before `offset`."""
        number = bisect_right(self.begins, offset)
        return self.before[number] - max(0, self.ends[number - 1] - offset) if number else 0


def room(file: OutputFile, block_size: int | None, holes: Mapping[str, Holes]) -> int:
    """Bytes of disk that `file` needs: not those that it shares, nor the holes of its source files."""
    size = file.size - sum(run.size for run in shareable(file.parts, block_size))
    if block_size is None and holes:
        for part in file.parts:
            if isinstance(part.content, (Range, Rows)) and part.content.file in holes:
                of_file, offset = holes[part.content.file], part.content.offset
                size -= of_file.below(offset + part.content.size) - of_file.below(offset)
    return size
