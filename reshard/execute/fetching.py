"""Reads ranges of source files from a store on the network, in the requests that `plan.fetches` decides.

The store's library repeats a request that fails. What a request brought stays in memory until all of it is used: of
large ranges one piece at a time, of small ones as much as `plan.fetches.MAX_HELD`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

from ..checkpoint.files import File, Files
from ..checkpoint.location import Location
from ..errors import CheckpointError
from ..plan.fetches import Fetch, fetches
from ..plan.files import Part
from .sources import OpenSources, SourceFiles, Sources


def sources_of(source: Files, planned: Mapping[str, File], headers: Mapping[str, bytes] | None = None) -> Sources:
    """The files of `source`, which must still be as `planned` says, and begin with their `headers`."""
    if isinstance(source.root, Path):
        return SourceFiles(source.root, planned, headers)
    return RemoteSources(source, planned)


class RemoteSources:
    """Files of a store. Its commit, or its ETags, were looked up when the checkpoint was read."""

    def __init__(self, source: Files, files: Mapping[str, File]) -> None:
        self.source = source
        self.files = files

    @property
    def root(self) -> Location:
        """What they are below."""
        return self.source.root

    def open(self) -> OpenSources:
        """Ready to be read by one thread."""
        return _OpenRemote(self)

    def mode(self, names: Iterable[str]) -> int | None:
        """None: a store has no permission bits."""
        return None


class _OpenRemote(OpenSources):
    """Ranges of a store's files, and those in memory that are not all used."""

    def __init__(self, sources: RemoteSources) -> None:
        super().__init__(sources)
        self._source = sources.source
        self._fetches: list[Fetch] = []
        self._held: dict[Fetch, bytes] = {}
        self._unused: dict[Fetch, int] = {}  # bytes of those that will still be read

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing is open between two requests."""
        self._held.clear()

    def expect(self, parts: Iterable[Part]) -> None:
        """Plan the requests for what will be read."""
        self._fetches = fetches(parts)
        self._held.clear()

    def check_unchanged(self) -> None:
        """CheckpointError if the files are no longer of the version that was planned for."""
        self._source.check_version()

    def _read(self, name: str, offset: int, into: memoryview, tensor: str | None) -> None:
        try:
            while into:
                data = self._next(name, offset, len(into))
                into[: len(data)] = data
                offset, into = offset + len(data), into[len(data) :]
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.root / name}: is no longer there") from error

    def _next(self, name: str, offset: int, size: int) -> bytes | memoryview:
        """The bytes of the file `name` from `offset` on, `size` or fewer."""
        fetch = self._fetch_at(name, offset)
        if fetch is None:
            return self._source.read(name, offset, size)
        if fetch not in self._held:
            self._held[fetch] = self._source.read(name, fetch.offset, fetch.size)
            self._unused[fetch] = fetch.used
        start = offset - fetch.offset
        data = memoryview(self._held[fetch])[start : start + size]
        self._unused[fetch] -= len(data)
        if self._unused[fetch] <= 0:
            del self._held[fetch]
        return data

    def _fetch_at(self, name: str, offset: int) -> Fetch | None:
        number = bisect_right(self._fetches, (name, offset), key=lambda fetch: (fetch.file, fetch.offset))
        found = self._fetches[number - 1] if number else None
        return found if found is not None and found.file == name and offset < found.end else None
