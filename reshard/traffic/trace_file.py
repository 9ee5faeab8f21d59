"""A trace on disk: which experts each token chose in each MoE layer, as a running engine recorded it.

    DIR/<model>-dp00-pp00-000001.trace    the tokens of DP rank 0 in the layers of PP stage 0: the first of its files

A file is one line of JSON, the `Header`, followed by a row for each token: the ids of the experts that it chose,
[L, K], as U8 (up to 256 experts) or U16, little endian. The writer only appends rows. If it is killed, the file ends in
at most one partial row, which readers skip. A limit holds for all files of a stream together; the writer deletes the
oldest first. An engine's plugin needs this module and no other of `traffic`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import msgspec
from blake3 import blake3

from ..arguments import refuse_url
from ..errors import TraceError
from ..placement.contract import placement_from_json
from ..placement.permutations import Placement

SUFFIX = ".trace"
TRACE_VERSION = 1
DEFAULT_LIMIT = 1 << 30  # bytes of a stream, enough for 2.3 million tokens of R1
MAX_EXPERTS = 1 << 16  # an id has at most 16 bits
MAX_LAYERS = 1000
SEGMENTS = 8  # files of a full stream; deleting the oldest loses only that part
_NAME = re.compile(r"(?P<stream>[0-9a-f]{8}-dp\d{2,}-pp\d{2,})-(?P<number>\d{6,})\.trace")
_MAX_HEADER = 64 << 20


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """Describes the rows of a stream.

    `layers` are the MoE layers in a row, each named like the engine's module that holds its experts.
    `physical_to_logical` is None if the ids in the rows are logical. If they are physical, it maps them to logical ids:
    one list [E] for all layers, or one for each layer by name.
    """

    reshard_trace: int
    engine: str
    model: str
    layers: tuple[str, ...]
    num_experts: int
    top_k: int
    physical_to_logical: list[int] | dict[str, list[int]] | None = None
    dp_rank: int = 0
    pp_rank: int = 0

    @property
    def id_size(self) -> int:
        """Bytes of an expert id."""
        return 1 if self.num_experts <= 256 else 2

    @property
    def row_size(self) -> int:
        """Bytes of a row, which is one token."""
        return len(self.layers) * self.top_k * self.id_size

    @property
    def stream(self) -> str:
        """The prefix of the names of the stream's files."""
        return f"{blake3(_encode(self)).hexdigest()[:8]}-dp{self.dp_rank:02}-pp{self.pp_rank:02}"

    def placement(self, where: str) -> Placement | None:
        """physical_to_logical by layer. Raises CheckpointError, which names the file `where`, if it is not valid."""
        if self.physical_to_logical is None:
            return None
        return placement_from_json(self.physical_to_logical, list(self.layers), where)


class TraceWriter:
    """Appends rows to a stream in `directory` and keeps all its files, earlier ones included, within `limit` bytes.

    The constructor and `write` pass on the disk's OSError. After one from `write` the file may end in a partial row:
    write no more.
    """

    def __init__(self, directory: Path, header: Header, limit: int = DEFAULT_LIMIT) -> None:
        self._directory = directory
        self._header = header
        self._limit = limit
        start = len(_encode(header))
        self._rows_per_file = max(1, (limit // SEGMENTS - start) // header.row_size)
        self._file_size = start + self._rows_per_file * header.row_size
        refuse_url(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._file = self._next_file()
        self._rows_left = self._rows_per_file  # that the current file has room for

    def write(self, rows: memoryview) -> None:
        """Append whole rows. When this returns, the file has them, even if the process is killed."""
        size = self._header.row_size
        while rows:
            if not self._rows_left:
                self.close()
                self._file, self._rows_left = self._next_file(), self._rows_per_file
            count = min(self._rows_left, len(rows) // size)
            _write(self._file, rows[: count * size])
            self._rows_left -= count
            rows = rows[count * size :]

    def close(self) -> None:
        """Close the file; write no more after this."""
        self._file.close()

    def _next_file(self) -> FileIO:
        files = _files(self._directory, self._header.stream)
        for number in sorted(files):
            if sum(size for _, size in files.values()) + self._file_size <= self._limit:
                break
            files.pop(number)[0].unlink(missing_ok=True)
        number = max(files, default=0) + 1
        while True:
            try:
                file = (self._directory / f"{self._header.stream}-{number:06}{SUFFIX}").open("xb", buffering=0)
            except FileExistsError:  # another process writes the same stream
                number += 1
                continue
            _write(file, memoryview(_encode(self._header)))
            return file


@dataclass(frozen=True, slots=True)
class Segment:
    """One file of a stream. Its `rows` whole rows begin at byte `start`."""

    path: Path
    start: int
    rows: int


@dataclass(frozen=True, slots=True)
class Stream:
    """All rows with the same header, in the order in which they were written."""

    header: Header
    segments: tuple[Segment, ...]

    @property
    def tokens(self) -> int:
        """The number of rows; each is one token."""
        return sum(segment.rows for segment in self.segments)

    @property
    def size(self) -> int:
        """Bytes of its headers and whole rows."""
        return sum(segment.start + segment.rows * self.header.row_size for segment in self.segments)

    def read(self, first: int, count: int) -> bytearray:
        """The rows `first` to `first + count`. Raises TraceError if a file has become shorter since it was found."""
        rows, size = bytearray(), self.header.row_size
        for segment in self.segments:
            begin, end = max(first, 0), min(first + count, segment.rows)
            if begin < end:
                with segment.path.open("rb") as file:
                    file.seek(segment.start + begin * size)
                    part = file.read((end - begin) * size)
                if len(part) != (end - begin) * size:
                    raise TraceError(f"{segment.path}: became shorter while it was read; record again")
                rows += part
            first -= segment.rows
        return rows


def read_streams(directory: Path) -> list[Stream]:
    """The streams in `directory`, sorted by name. Raises TraceError if this version cannot read a *.trace file."""
    streams: dict[str, Stream] = {}
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                line = file.readline(_MAX_HEADER)
        except OSError as error:
            raise TraceError(f"{path}: cannot be read: {error.strerror}") from error
        if not size:
            continue  # its writer was killed before it wrote the header
        header = _decode(line, path)
        segment = Segment(path, len(line), (size - len(line)) // header.row_size)
        before = streams[header.stream].segments if header.stream in streams else ()
        streams[header.stream] = Stream(header, (*before, segment))
    return list(streams.values())


def _decode(line: bytes, path: Path) -> Header:
    if not line.endswith(b"\n"):
        raise TraceError(f"{path}: not a trace: expected a line of JSON at its beginning; move the file away")
    try:
        header = msgspec.json.decode(line, type=Header)
    except msgspec.DecodeError as error:
        raise TraceError(f"{path}: not a trace of reshard: {error}; move the file away") from error
    if header.reshard_trace != TRACE_VERSION:
        raise TraceError(
            f"{path}: a trace of version {header.reshard_trace}, this reshard reads {TRACE_VERSION}; upgrade reshard"
        )
    if not header.layers or len(set(header.layers)) < len(header.layers):
        raise TraceError(f"{path}: expected distinct names of layers, found {header.layers!r:.80}; move it away")
    if not 0 < header.top_k <= header.num_experts <= MAX_EXPERTS:
        raise TraceError(f"{path}: top {header.top_k} of {header.num_experts} experts is impossible; move it away")
    if (placement := header.placement(str(path))) is not None and any(
        len(permutation) != header.num_experts for permutation in placement.values()
    ):
        raise TraceError(f"{path}: physical_to_logical does not have {header.num_experts} experts; move the file away")
    return header


def _encode(header: Header) -> bytes:
    return msgspec.json.encode(header) + b"\n"


def _files(directory: Path, stream: str) -> dict[int, tuple[Path, int]]:
    """The files of a stream and their sizes, by number."""
    found = {}
    for path in directory.glob(f"{stream}-*{SUFFIX}"):
        match = _NAME.fullmatch(path.name)
        if match and path.is_file():
            found[int(match["number"])] = path, path.stat().st_size
    return found


def _write(file: FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]
