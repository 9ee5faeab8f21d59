"""What to write: output files as lists of byte ranges to copy, and the few tensors to rewrite. Pure; no I/O.

A plan is data. It can be printed (`--dry-run`), carried out (`copy`), or compared with what lies on disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ..checkpoint.directory import File
from .sharing import Sharing


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes that stand in the plan itself: headers, config.json."""

    data: bytes

    @property
    def size(self) -> int:
        """Bytes written."""
        return len(self.data)


@dataclass(frozen=True, slots=True)
class Range:
    """`size` bytes at `offset` of the source file `file`, copied as they are."""

    file: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Rows:
    """A range that is len(order) rows of equal size; row `i` of the output is row `order[i]` of the source."""

    file: str
    offset: int
    size: int
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExpertIds:
    """A range of integers of type `dtype` that are expert ids; `id` becomes `mapping[id]`."""

    file: str
    offset: int
    size: int
    dtype: str
    mapping: tuple[int, ...]


Content = Literal | Range | Rows | ExpertIds


class Digests(Enum):
    """Which tensors to checksum: all, or only those that are copied."""

    ALL = "all"
    COPIED = "copied"  # shared blocks get no digest, and are not even read


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an output file: a tensor, by its name there, or what is none (a header, a whole small file)."""

    tensor: str | None
    content: Content
    digests: Digests = Digests.ALL


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file to write, front to back. `rank` is the EP rank that alone needs it, None where every rank does."""

    name: str
    parts: tuple[Part, ...]
    rank: int | None = None

    @property
    def size(self) -> int:
        """Bytes the file will have."""
        return sum(part.content.size for part in self.parts)


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole output. `source_files` says what the files below `source` were when the plan was made.

    `files` may be written in any order. The files named in `last`, which make the output loadable, are made from the
    records of the others when those are complete. `headers` are the headers of source files, as they were.
    """

    source: Path
    source_files: Mapping[str, File]
    headers: Mapping[str, bytes]
    sharing: Sharing
    directories: tuple[str, ...]
    files: tuple[OutputFile, ...]
    last: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of `files`."""
        return sum(file.size for file in self.files)


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
    """The source file `name` of `size` bytes, copied under the same name."""
    return OutputFile(name, (Part(None, Range(name, 0, size)),))


def literal_file(name: str, data: bytes) -> OutputFile:
    """A file whose bytes are known beforehand."""
    return OutputFile(name, (Part(None, Literal(data)),))
