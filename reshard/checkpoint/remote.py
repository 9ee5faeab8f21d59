"""Files in a store on the network: a repository on the Hugging Face Hub, or a bucket. Read through fsspec.

The store's own library speaks its protocol, finds the user's keys, follows redirects and retries: `huggingface_hub`,
`s3fs` or `gcsfs`. Here are the requests: one listing, then ranges. No answer is trusted to be as long as it should be,
because a server or proxy that ignores ranges sends the whole file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from ..errors import CheckpointError
from .files import File, Identity, Listing, is_left_out
from .header import Header, ask_library, parse_beginning
from .location import Url

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

STORES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}  # scheme of a URL, and the library that reads it
CONNECTIONS = 8  # as many as `hf download` has at a time
_GUESSED_HEADER = 1 / 1024  # of a file: more than most headers, and too little to matter where it is too much
_VERSIONS = ("ETag", "etag", "generation", "LastModified", "mtime", "created")  # what stores tell of a file


class RemoteFiles:
    """The files below `path` of the file system `store`, called `root` in messages.

    `commit` is that of a repository whose files can never change; without it, changes are found by the store's ETags.
    """

    def __init__(
        self, root: Url, store: AbstractFileSystem, path: str, repo_id: str | None = None, commit: str | None = None
    ) -> None:
        self.root = root
        self.identity = Identity(repo_id, commit)
        self._store = store
        self._path = path.rstrip("/")
        self._small: dict[str, bytes] = {}  # files that were read as a whole, which are few and small

    @cached_property
    def _found(self) -> dict[str, dict[str, Any]]:
        """What the store tells of each file, by name."""
        found = self._ask(self.root, lambda: self._store.find(self._path, detail=True))
        prefix = f"{self._store._strip_protocol(self._path)}/"
        names = {path.removeprefix(prefix): info for path, info in found.items() if info["type"] == "file"}
        if not names:
            raise CheckpointError(f"{self.root}: nothing there; expected the files of a Hugging Face checkpoint")
        return dict(sorted(names.items()))

    @property
    def version(self) -> str:
        """The commit, or a digest of the ETags."""
        if self.identity.revision is not None:
            return self.identity.revision
        told = {name: [str(info.get(key)) for key in _VERSIONS] for name, info in self._found.items()}
        return blake3(repr(sorted(told.items())).encode()).hexdigest()

    def check_version(self) -> None:
        """CheckpointError if a file has another ETag than before. A commit cannot change."""
        if self.identity.revision is not None:
            return
        self._store.invalidate_cache()
        if RemoteFiles(self.root, self._store, self._path).version != self.version:
            raise CheckpointError(
                f"{self.root}: changed while it was read; rerun the command when nothing writes there"
            )

    def listing(self) -> Listing:
        """All files, and the folders that they are in."""
        kept = [name for name in self._found if not is_left_out(name)]
        folders = {str(folder) for name in kept for folder in Path(name).parents} - {"."}
        left_out = {top for name in self._found if (top := _left_out_top(name))}
        files = {name: file for name in kept if (file := self.find(name)) is not None}
        return Listing(files, tuple(sorted(folders)), tuple(sorted(left_out)))

    def has(self, name: str) -> bool:
        """Whether there is a file `name`."""
        return name in self._found

    def find(self, name: str) -> File | None:
        """The file `name`; None if there is none."""
        return File(name, int(self._found[name]["size"]), 0) if name in self._found else None

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Exactly `size` bytes of the file `name` from `offset` on, or the whole file.

        Raises FileNotFoundError if there was no such file when these were listed, and CheckpointError if it cannot be
        read, or the server does not send the range.
        """
        if name not in self._found:
            raise FileNotFoundError(f"{self.root / name}: no such file")
        if size is not None:
            return self._range(name, offset, size)
        if name not in self._small:
            self._small[name] = self._range(name, 0, int(self._found[name]["size"]))
        return self._small[name]

    def headers(self, names: Iterable[str]) -> dict[str, Header]:
        """The headers of the safetensors files `names`.

        The smallest file comes first and alone, because a server that ignores ranges sends all of it.
        """
        by_size = sorted(names, key=lambda name: int(self._found[name]["size"]))
        found = {name: self._header(name) for name in by_size[:1]}
        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="reshard") as pool:
            found.update(zip(by_size[1:], pool.map(self._header, by_size[1:]), strict=True))
        return {name: found[name] for name in sorted(found)}

    def _header(self, name: str) -> Header:
        size = int(self._found[name]["size"])
        beginning = _Beginning(lambda offset, count: self._range(name, offset, count), size)
        header = parse_beginning(beginning.read, size, self.root / name)
        fd = os.memfd_create("reshard-header")
        try:
            os.write(fd, header.raw)
            os.ftruncate(fd, size)
            ask_library(Path(f"/proc/self/fd/{fd}"), self.root / name)
        finally:
            os.close(fd)
        return header

    def _range(self, name: str, offset: int, size: int) -> bytes:
        if size == 0:
            return b""

        def fetch() -> bytes:
            # without a cache of fsspec's, each `read` is one request for just these bytes
            with self._store.open(f"{self._path}/{name}", "rb", cache_type="none") as file:
                file.seek(offset)
                return bytes(file.read(size))

        data: bytes = self._ask(self.root / name, fetch)
        if len(data) != size:
            raise CheckpointError(
                f"{self.root / name}: {len(data)} bytes came, expected the {size} from byte {offset} on: the server or "
                "a proxy ignores ranges, or the file has changed; download the checkpoint, and give its directory"
            )
        return data

    def _ask(self, what: Url, request: Callable[[], Any]) -> Any:
        """What `request` returns; CheckpointError if it fails, after all the retries of the store's library."""
        try:
            return request()
        except Exception as error:  # each store's library raises its own
            said = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{what}: cannot be read: {said:.400}; rerun the command to try again") from error


class _Beginning:
    """Reads a file front to back. The first request asks for as much as a header mostly has."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        self._fetch = fetch
        self._size = size
        self._known = b""
        self._position = 0

    def read(self, count: int) -> bytes:
        """The next `count` bytes; fewer at the end of the file."""
        start, end = self._position, min(self._position + count, self._size)
        if end > len(self._known):
            until = min(max(end, int(self._size * _GUESSED_HEADER)), self._size)
            self._known += self._fetch(len(self._known), until - len(self._known))
        self._position = end
        return self._known[start:end]


def _left_out_top(name: str) -> str | None:
    """The first folder above `name`, or `name` itself, that is no part of a checkpoint."""
    parts = name.split("/")
    tops = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
    return next((top for top in tops if is_left_out(top)), None)


def in_store(url: str, scheme: str) -> RemoteFiles:
    """The files below `url` in an object store, whose library the user has installed."""
    from fsspec.core import url_to_fs

    try:
        store, path = url_to_fs(url)
    except ImportError as error:
        library = STORES[scheme]
        raise CheckpointError(f"{url}: reading {scheme}:// needs {library}: pip install {library}") from error
    store.invalidate_cache()  # fsspec keeps file systems, with listings from earlier
    return RemoteFiles(Url(url.rstrip("/")), store, path)
