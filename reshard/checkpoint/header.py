"""Reads, checks and writes the headers of safetensors files. Never tensor data.

A file is 8 bytes (the header's length, u64 little endian), the header (JSON), then the tensors' bytes. It is valid if
the tensors, sorted by offset, cover those bytes without hole or overlap, and each has the size that its shape and dtype
give. The rule is ``validate`` in safetensors/src/tensor.rs; stricter here in one point: a name that appears twice is
refused. After that, the safetensors library is asked about every file, and what it refuses is refused.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .lfs import MAX_POINTER_SIZE, refuse_pointer
from .location import Location

MAX_HEADER_SIZE = 100_000_000
ALIGNMENT = 8
U64_MAX = 2**64 - 1

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor's bytes are: ``size`` bytes at ``offset`` (from the start) of the file named ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Header:
    """A valid header: its bytes as in the file (length prefix included), and what they say."""

    raw: bytes
    metadata: dict[str, str]
    tensors: tuple[Tensor, ...]  # in the order of their offsets


def read_header(path: Path) -> Header:
    """The header of the safetensors file at `path`; CheckpointError says what is wrong with it."""
    try:
        return _read_header(path)
    except OSError as error:
        raise CheckpointError(f"{path}: its header cannot be read: {error.strerror}") from error


def _read_header(path: Path) -> Header:
    header = _parse_file(path)
    ask_library(path, path)
    return header


def ask_library(file: Path, path: Location) -> None:
    """CheckpointError if the safetensors library refuses `file`. It maps the file and reads its header only."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path}: the safetensors library refuses it: {error}; download it again") from error


def _parse_file(path: Path) -> Header:
    with path.open("rb") as file:
        return parse_beginning(file.read, os.fstat(file.fileno()).st_size, path)


def parse_beginning(read: Callable[[int], bytes], file_size: int, path: Location) -> Header:
    """The header of a file of `file_size` bytes; `read(n)` gives its next `n` bytes, or fewer at its end."""
    prefix = read(8)
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: not a safetensors file: {file_size} bytes, too short for a header")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_SIZE:
        refuse_pointer(prefix + read(MAX_POINTER_SIZE), path)
        raise CheckpointError(
            f"{path}: not a safetensors file: its first 8 bytes give a header of {length} bytes, the format allows "
            f"{MAX_HEADER_SIZE}"
        )
    if 8 + length > file_size:
        raise CheckpointError(
            f"{path}: truncated: the header alone takes {8 + length} bytes, the file has {file_size}; download it again"
        )
    return parse_header(prefix + read(length), file_size, path)


def parse_header(raw: bytes, file_size: int, path: Location) -> Header:
    """The header `raw` (length prefix included) of a file of `file_size` bytes; errors and tensors name `path`."""
    entries = _decode(raw[8:], path)
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    texts = [*metadata, *metadata.values()] if isinstance(metadata, dict) else [None]
    if not all(isinstance(text, str) and _is_utf8(text) for text in texts):
        raise CheckpointError(f"{path}: __metadata__ in the header must map strings to strings, found {metadata!r:.80}")
    tensors = sorted(
        (_tensor(name, info, len(raw), path) for name, info in entries.items()),
        key=lambda t: (t.offset, t.size),
    )
    end = len(raw)
    for tensor in tensors:
        if tensor.offset != end:
            fault = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor {tensor.name}: {fault}: it begins at byte {tensor.offset - len(raw)} of the data, "
                f"expected {end - len(raw)}"
            )
        end += tensor.size
    if end != file_size:
        fault = "truncated, download it again" if end > file_size else "bytes that no tensor claims"
        raise CheckpointError(f"{path}: the header describes {end} bytes, the file has {file_size}: {fault}")
    return Header(raw, metadata, tuple(tensors))


def build_header(
    tensors: Iterable[Tensor], metadata: Mapping[str, str], *, start: int = 0, alignment: int = ALIGNMENT
) -> bytes:
    """The header bytes (length prefix included) of a file that holds `tensors` one after the other, in this order.

    Their `file` and `offset` are ignored. Spaces pad the header so that the data begins `start` bytes after a multiple
    of `alignment`.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (end, end + tensor.size),
        }
        end += tensor.size
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * ((start - 8 - len(text)) % alignment)
    if len(text) > MAX_HEADER_SIZE:
        raise CheckpointError(
            f"a header of {len(text)} bytes for {len(entries)} tensors exceeds what safetensors allows "
            f"({MAX_HEADER_SIZE}); choose a smaller --max-shard-size"
        )
    return struct.pack("<Q", len(text)) + text


def _decode(text: bytes, path: Location) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: not a safetensors file: the header is not a JSON object")
    try:
        entries = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} appears twice")
    return entries


def _tensor(name: str, info: Any, data_start: int, path: Location) -> Tensor:
    if not name.isascii() and not _is_utf8(name):
        raise CheckpointError(f"{path}: tensor {name!a}: the name is not valid Unicode")
    where = f"{path}: tensor {name}"
    if not isinstance(info, dict):
        raise CheckpointError(f"{where}: expected an object with dtype, shape and data_offsets, found {info!r:.80}")
    dtype: Any = info.get("dtype")
    shape: Any = info.get("shape")
    offsets: Any = info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r:.80}; known are {', '.join(DTYPE_BITS)}")
    if not _is_sizes(shape):
        raise CheckpointError(f"{where}: shape must be a list of whole numbers from 0 to 2^64-1, found {shape!r:.80}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise CheckpointError(
            f"{where}: data_offsets must be [begin, end], two whole numbers with begin <= end, found {offsets!r:.80}"
        )
    bits = _bits(shape, DTYPE_BITS[dtype])
    if bits is None:
        raise CheckpointError(f"{where}: shape {shape!r:.80} overflows 64 bits")
    if bits % 8:
        raise CheckpointError(f"{where}: shape {shape!r:.80} of {dtype} does not fill whole bytes")
    begin, end = offsets
    if end - begin != bits // 8:
        raise CheckpointError(
            f"{where}: shape {shape!r:.80} of {dtype} takes {bits // 8} bytes, data_offsets {offsets} span "
            f"{end - begin}"
        )
    return Tensor(name, dtype, tuple(shape), path.name, data_start + begin, end - begin)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_sizes(value: Any) -> bool:
    # `type(x) is int`: JSON's true and 1.0 are not sizes
    if not isinstance(value, list):
        return False
    for x in value:  # noqa: SIM110 - a generator takes three times as long, and there are 200,000 of these
        if type(x) is not int or not 0 <= x <= U64_MAX:
            return False
    return True


def _bits(shape: list[int], bits_per_element: int) -> int | None:
    # multiplied from the left, as safetensors does: an overflow is an error even if a later dimension is 0
    product = 1
    for factor in (*shape, bits_per_element):
        product *= factor
        if product > U64_MAX:
            return None
    return product
