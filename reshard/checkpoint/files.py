"""Where the files of a checkpoint are: in a directory, or in a store on the network that sends ranges of them.

`Files` is all that the package asks of either: which files there are, and a range of one. `LocalFiles` is a directory,
`remote.RemoteFiles` a store.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import CheckpointError
from .header import Header, read_header
from .location import Location as Location

# Copies of what the checkpoint holds anyway: Git's own folder has the weights once more.
_LEFT_OUT = re.compile(r"(.*/)?\.git|\.cache/huggingface")
_RECORDS = Path(".cache", "huggingface", "download")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class File:
    """A file as it was when the checkpoint was read; `name` is its path relative to the checkpoint's directory.

    `mtime_ns` is 0 in a store, whose `version` tells of changes.
    """

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Listing:
    """The files, the folders, and what is no part of a checkpoint, each sorted by name."""

    files: dict[str, File]
    directories: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Identity:
    """The repository and revision that a checkpoint came from; None if its directory does not tell."""

    repo_id: str | None
    revision: str | None


class Files(Protocol):
    """Files by name. A method that fails raises OSError, or CheckpointError that names the file."""

    @property
    def root(self) -> Location:
        """What they are below."""

    @property
    def version(self) -> str:
        """Changes if a file in a store changes; empty for a directory, whose files have times."""

    @property
    def identity(self) -> Identity:
        """Where they came from."""

    def check_version(self) -> None:
        """CheckpointError if their `version` is another now."""

    def listing(self) -> Listing:
        """All of them."""

    def has(self, name: str) -> bool:
        """Whether there is a file `name`."""

    def find(self, name: str) -> File | None:
        """The file `name`; None if there is none."""

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """`size` bytes of the file `name` from `offset` on; the whole file if there is no size."""

    def headers(self, names: Iterable[str]) -> dict[str, Header]:
        """The headers of the safetensors files `names`; CheckpointError says what is wrong with one."""


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """The files below the directory `root`."""

    root: Path

    @property
    def version(self) -> str:
        """Empty: each file has a time."""
        return ""

    def check_version(self) -> None:
        """Nothing to do."""

    @property
    def identity(self) -> Identity:
        """The repository and revision, as far as a Hugging Face cache or download recorded them."""
        folder = self.root.absolute()
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return Identity(folder.parent.parent.name.removeprefix("models--").replace("--", "/"), folder.name)
        record = folder / _RECORDS / "config.json.metadata"
        if record.is_file():
            commit = record.read_text(errors="replace").partition("\n")[0]
            return Identity(None, commit if _COMMIT.fullmatch(commit) else None)
        return Identity(None, None)

    def listing(self) -> Listing:
        """All files; CheckpointError if one has a name that is not UTF-8, is no plain file, or dangles."""
        return _walk(self.root)

    def has(self, name: str) -> bool:
        """Whether something is called so."""
        return (self.root / name).exists()

    def find(self, name: str) -> File | None:
        """The file `name`; None if there is none."""
        path = self.root / name
        if not path.is_file():
            return None
        status = path.stat()
        return File(name, status.st_size, status.st_mtime_ns)

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """A range of a file; shorter if the file ends before."""
        with (self.root / name).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def headers(self, names: Iterable[str]) -> dict[str, Header]:
        """The headers of the safetensors files `names`; the error about one names all that are damaged."""
        headers, faults = {}, {}
        for name in names:
            try:
                headers[name] = read_header(self.root / name)
            except CheckpointError as error:
                faults[name] = error
        if faults:
            first, *others = faults
            raise CheckpointError(f"{faults[first]}{and_others('damaged', others)}")
        return headers


def and_others(fault: str, names: Sequence[str]) -> str:
    """What an error about one file adds when other files have a fault too; nothing if `names` is empty."""
    return f"; {len(names)} more {'is' if len(names) == 1 else 'are'} {fault}: {', '.join(names)}" if names else ""


def is_left_out(name: str) -> bool:
    """Whether the file or directory `name` is no part of a checkpoint, or lies in one that is none."""
    parts = name.split("/")
    return any(_LEFT_OUT.fullmatch("/".join(parts[:count])) for count in range(1, len(parts) + 1))


def _walk(root: Path) -> Listing:
    files: dict[str, File] = {}
    directories: list[str] = []
    left_out: list[str] = []
    for name, status in _entries(root):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(f"{root}: file name {name!a} is not valid UTF-8; rename it") from error
        if is_left_out(name):
            left_out.append(name)
        elif stat.S_ISDIR(status.st_mode):
            directories.append(name)
        elif stat.S_ISREG(status.st_mode):
            files[name] = File(name, status.st_size, status.st_mtime_ns)
        else:
            raise CheckpointError(f"{root / name}: neither a file nor a directory; move it out of the checkpoint")
    if ".cache/huggingface" in left_out and not any(name.startswith(".cache/") for name in (*files, *directories)):
        directories.remove(".cache")
    return Listing(dict(sorted(files.items())), tuple(sorted(directories)), tuple(sorted(left_out)))


def _entries(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    pending: list[tuple[str, tuple[os.stat_result, ...]]] = [("", (root.stat(),))]
    while pending:
        folder, parents = pending.pop()
        with os.scandir(root / folder) as listing:
            names = [f"{folder}{entry.name}" for entry in listing]
        for name in names:
            try:
                status = (root / name).stat()  # follows links: the files in a Hugging Face cache are links
            except OSError as error:
                raise CheckpointError(f"{root / name}: cannot be read ({error.strerror}); a dangling link?") from error
            yield name, status
            if stat.S_ISDIR(status.st_mode) and not is_left_out(name):
                if any(os.path.samestat(status, parent) for parent in parents):
                    raise CheckpointError(f"{root / name}: a link to one of its own parent directories; remove it")
                pending.append((f"{name}/", (*parents, status)))
