"""What to write: output files as lists of byte ranges to copy, and the few tensors to rewrite. Pure; no I/O.

A plan is data. It can be printed (`--dry-run`), carried out (`execute`), or compared with what is on disk.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import msgspec
from blake3 import blake3

from .._version import __version__
from ..checkpoint.directory import File
from ..checkpoint.files import Files
from ..placement.permutations import Placement
from .sharing import Sharing


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes that the plan itself holds: headers, config.json."""

    data: bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.data)


@dataclass(frozen=True, slots=True)
class Range:
    """`size` bytes at `offset` of the source file `file`, copied as they are."""

    file: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Rows:
    """A range of len(order) rows of equal size; row `i` of the output is row `order[i]` of the source."""

    file: str
    offset: int
    size: int
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExpertIds:
    """A range of expert ids, integers of type `dtype`; each `id` becomes `mapping[id]`."""

    file: str
    offset: int
    size: int
    dtype: str
    mapping: tuple[int, ...]


Content = Literal | Range | Rows | ExpertIds


class Digests(Enum):
    """Which tensors to checksum: all, or only those that are copied."""

    ALL = "all"
    COPIED = "copied"  # shared blocks are not read, so they get no digest


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an output file: `tensor` is a tensor's name in the output, None for a header or a small file."""

    tensor: str | None
    content: Content
    digests: Digests = Digests.ALL


@dataclass(frozen=True, slots=True)
class Checksum:
    """The checksum that the source file `file` was downloaded by: a SHA-256 or a Git blob id, in hexadecimal."""

    file: str
    value: str


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file to write, front to back. `rank` is the only EP rank that needs it; None if every rank does.

    `checksum` is checked while its parts are copied.
    """

    name: str
    parts: tuple[Part, ...]
    rank: int | None = None
    checksum: Checksum | None = None

    @property
    def tensors(self) -> int:
        """Their number."""
        return sum(part.tensor is not None for part in self.parts)

    @property
    def size(self) -> int:
        """Size of the finished file, in bytes."""
        return sum(part.content.size for part in self.parts)


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole output. `source_files` and `headers` are the files below `source`, and their headers, at planning time.

    `files` may be written in any order. The files named in `last` make the output loadable: they are made from the
    records of `files` when those are complete. `checksums` are those of source files to read and check before that. If
    the same options may not give the same plan again, `request` has them, and `placement` is what they gave.
    """

    source: Files
    source_files: Mapping[str, File]
    headers: Mapping[str, bytes]
    sharing: Sharing
    directories: tuple[str, ...]
    files: tuple[OutputFile, ...]
    last: tuple[str, ...]
    checksums: Mapping[str, str] = field(default_factory=dict)
    request: str = ""
    placement: Placement | None = None

    @property
    def size(self) -> int:
        """Bytes of `files`."""
        return sum(file.size for file in self.files)


def assign_checksums(
    files: Iterable[OutputFile], checksums: Mapping[str, str]
) -> tuple[tuple[OutputFile, ...], dict[str, str]]:
    """Let source files be checked while they are copied, where one output file has all that is taken from one of them.

    Returns the output files, and the checksums that are left: those files have to be read by themselves.
    """
    files = tuple(files)
    if not checksums:
        return files, {}
    taken = [{part.content.file for part in file.parts if not isinstance(part.content, Literal)} for file in files]
    uses = Counter(name for names in taken for name in names)
    left = dict(checksums)
    assigned = []
    for file, names in zip(files, taken, strict=True):
        (name, *others) = names or ("",)
        alone = not others and uses[name] == 1 and name in left
        assigned.append(replace(file, checksum=Checksum(name, left.pop(name))) if alone else file)
    return tuple(assigned), left


def checksums_of(files: Iterable[OutputFile]) -> dict[str, str]:
    """The checksums that are checked while `files` are copied, by the source file's name."""
    return {file.checksum.file: file.checksum.value for file in files if file.checksum}


def fingerprint(plan: Plan) -> str:
    """A digest of everything that decides what is written where: two plans with the same one write the same bytes."""
    options = [__version__, plan.request, plan.source.version]
    while not options[-1]:
        options.pop()
    digest = blake3(msgspec.json.encode([*options, sorted(plan.source_files.items()), plan.directories]))
    for name, header in plan.headers.items():
        digest.update(msgspec.json.encode([name, header]))
    for file in plan.files:
        digest.update(msgspec.json.encode({"name": file.name, "parts": file.parts, "rank": file.rank}))
    return digest.hexdigest()


def plan_index(files: Iterable[OutputFile], metadata: Mapping[str, Any]) -> bytes:
    """model.safetensors.index.json for the weight files `files`; other `metadata` of the source's index is kept."""
    weight_map: dict[str, str] = {}
    total_size = 0
    for file in files:
        for part in file.parts:
            if part.tensor is not None:
                weight_map[part.tensor] = file.name
                total_size += part.content.size
    index = {"metadata": {**metadata, "total_size": total_size}, "weight_map": weight_map}
    return (json.dumps(index, indent=2) + "\n").encode()


def whole_file(name: str, size: int) -> OutputFile:
    """A copy of the source file `name` of `size` bytes, under the same name."""
    return OutputFile(name, (Part(None, Range(name, 0, size)),))


def literal_file(name: str, data: bytes) -> OutputFile:
    """A file whose content the plan holds."""
    return OutputFile(name, (Part(None, Literal(data)),))
