"""Decides in which requests the ranges of an output file are fetched from a store on the network. Pure; no I/O.

A request takes some 0.1 s however little it asks for. The tensors of DeepSeek-R1's experts are 90,000 ranges, but the
three weights of an expert lie side by side, and so do the small scales of all experts.

1. Ranges that lie side by side are fetched together, if the output has them within `WINDOW` bytes: in whatever order.
2. Small ranges with small gaps between them are fetched together with these, the smallest gaps first, until the gaps
   make up `MAX_UNUSED` of the file.
3. What is larger than `MAX_FETCH` is fetched in pieces.

What is fetched stays in memory until all of it is used: `WINDOW` and a request of step 1, and `MAX_HELD` of step 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from .extents import extents
from .files import ExpertIds, Part

MAX_FETCH = 48 << 20  # bytes of a request: an expert of DeepSeek-R1 has 42
WINDOW = 64 << 20  # bytes of the output
SMALL = 1 << 20  # bytes; what takes longer to send than to ask for is large
MAX_UNUSED = 0.005  # of a file's bytes, fetched in vain
MAX_HELD = 64 << 20  # bytes of small ranges that are in memory at a time


@dataclass(frozen=True, slots=True, order=True)
class Fetch:
    """`size` bytes at `offset` of the source file `file`; the output uses `used` of them, from byte `at` on."""

    file: str
    offset: int
    size: int
    used: int
    at: int

    @property
    def end(self) -> int:
        """Where it ends in the source file."""
        return self.offset + self.size

    def with_next(self, other: Fetch) -> Fetch:
        """Both, and the gap between them."""
        size = other.end - self.offset
        return Fetch(self.file, self.offset, size, self.used + other.used, min(self.at, other.at))


def fetches(parts: Iterable[Part]) -> list[Fetch]:
    """The requests for an output file that consists of `parts`, by source file and offset. They do not overlap."""
    ranges = sorted(_ranges(tuple(parts)))
    budget = int(MAX_UNUSED * sum(fetch.size for fetch in ranges))
    joined = _joined(ranges, gap=0, window=WINDOW)
    large = [fetch for fetch in joined if fetch.size >= SMALL]
    small = [fetch for fetch in joined if fetch.size < SMALL]
    held = 0
    together: list[Fetch] = []
    alone: list[Fetch] = []
    for fetch in small:
        held += fetch.size
        (together if held <= MAX_HELD else alone).append(fetch)
    bridged = _joined(together, gap=_largest_gap(together, budget))
    return sorted([*(piece for fetch in large for piece in _pieces(fetch)), *bridged, *alone])


def _ranges(parts: tuple[Part, ...]) -> Iterator[Fetch]:
    """What the output takes from the source, without what it takes a second time."""
    seen = set()
    for extent in extents(parts):
        if (where := (extent.file, extent.offset)) not in seen:
            seen.add(where)
            yield Fetch(extent.file, extent.offset, extent.size, extent.size, extent.at)
    at = 0
    for part in parts:
        match part.content:
            case ExpertIds(file, offset, size):
                yield Fetch(file, offset, size, size, at)
        at += part.content.size


def _joined(ranges: Iterable[Fetch], gap: int, window: int | None = None) -> list[Fetch]:
    """Join neighbours with at most `gap` bytes between them, and `window` in the output."""
    joined: list[Fetch] = []
    for fetch in ranges:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.file == fetch.file
            and fetch.offset - last.end <= gap
            and fetch.end - last.offset <= MAX_FETCH
            and (window is None or abs(fetch.at - last.at) <= window)
        ):
            joined[-1] = last.with_next(fetch)
        else:
            joined.append(fetch)
    return joined


def _pieces(fetch: Fetch) -> Iterator[Fetch]:
    """A large range in pieces of about the same size."""
    count = -(-fetch.size // MAX_FETCH)
    cuts = [fetch.size * number // count for number in range(count + 1)]
    for start, end in pairwise(cuts):
        yield Fetch(fetch.file, fetch.offset + start, end - start, end - start, fetch.at + start)


def _largest_gap(small: list[Fetch], budget: int) -> int:
    """The size of the largest gap that is fetched too, so that all gaps up to it take at most `budget` bytes."""
    gaps = sorted(
        after.offset - before.end
        for before, after in pairwise(small)
        if before.file == after.file and before.end < after.offset < before.end + SMALL
    )
    largest = total = 0
    for gap in gaps:
        total += gap
        if total > budget:
            break
        largest = gap
    # gaps of one size are bridged together or not at all
    return largest if sum(gap for gap in gaps if gap <= largest) <= budget else largest - 1
