"""What to write: output files as lists of byte ranges to copy, and the few tensors to rewrite. Pure; no I/O.

A plan is data. It can be printed (`--dry-run`), carried out (`copy`), or compared with what lies on disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, File
from .contract import Placement
from .header import DTYPE_BITS, Tensor, build_header
from .moe import MoeModel, renumber
from .placement import invert, rank_slots


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


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an output file: a tensor, by its name there, or what is none (a header, a whole small file)."""

    tensor: str | None
    content: Content


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
    records of the others when those are complete.
    """

    source: Path
    source_files: Mapping[str, File]
    directories: tuple[str, ...]
    files: tuple[OutputFile, ...]
    last: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of `files`."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class _Placed:
    """A tensor as it will be in the output, `tensor.name` included, and where its bytes come from."""

    tensor: Tensor
    content: Content


def plan_weights(
    checkpoint: Checkpoint, model: MoeModel, placement: Placement, ep_size: int, max_shard_size: int
) -> list[OutputFile]:
    """The safetensors files of the output: those every rank needs, then each rank's, in the order they are loaded.

    Parameters:
        placement: physical_to_logical [E] of each MoE layer
        ep_size: R
        max_shard_size: bytes of tensors in a file at the most; a single larger tensor still gets its file

    """
    shared, ranks = _place(checkpoint, model, placement, ep_size)
    files = _shards("model-shared", None, shared, checkpoint, max_shard_size)
    width = max(2, len(str(ep_size)))
    for rank, placed in enumerate(ranks):
        stem = f"model-ep{rank:0{width}}-of-{ep_size:0{width}}"
        files += _shards(stem, rank, placed, checkpoint, max_shard_size)
    return files


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


def _place(
    checkpoint: Checkpoint, model: MoeModel, placement: Placement, ep_size: int
) -> tuple[list[_Placed], list[list[_Placed]]]:
    """Every tensor of the source in its place: those that all ranks need, and those of each rank."""
    tables = {layer: invert(physical_to_logical) for layer, physical_to_logical in placement.items()}
    rewritten: dict[str, Content] = {}
    ranks: list[list[_Placed]] = [[] for _ in range(ep_size)]
    for layer in model.layers:
        physical_to_logical = placement[layer.name]
        for tensor in (*layer.router, *layer.fused):
            rewritten[tensor.name] = Rows(tensor.file, tensor.offset, tensor.size, physical_to_logical)
        for tensor in layer.expert_ids:
            rewritten[tensor.name] = ExpertIds(
                tensor.file, tensor.offset, tensor.size, tensor.dtype, tables[layer.name]
            )
        if not layer.experts:
            continue
        for rank, slots in enumerate(rank_slots(len(physical_to_logical), ep_size)):
            for physical in slots:
                for tensor in layer.experts[physical_to_logical[physical]]:
                    renamed = replace(tensor, name=renumber(tensor.name, tables))
                    ranks[rank].append(_Placed(renamed, _as_it_is(tensor)))
    of_experts = {tensor.name for layer in model.layers for tensors in layer.experts for tensor in tensors}
    shared = [
        _Placed(tensor, rewritten.get(name) or _as_it_is(tensor))
        for name, tensor in checkpoint.tensors.items()
        if name not in of_experts
    ]
    return shared, ranks


def _as_it_is(tensor: Tensor) -> Range:
    return Range(tensor.file, tensor.offset, tensor.size)


def _shards(
    stem: str, rank: int | None, placed: list[_Placed], checkpoint: Checkpoint, max_shard_size: int
) -> list[OutputFile]:
    shards = list(_split(placed, max_shard_size))
    files = []
    for number, shard in enumerate(shards, start=1):
        ordered = _aligned(shard)
        metadata = _metadata(checkpoint, {item.tensor.file for item in ordered})
        header = build_header((item.tensor for item in ordered), metadata)
        parts = (Part(None, Literal(header)), *(Part(item.tensor.name, item.content) for item in ordered))
        files.append(OutputFile(f"{stem}-{number:05}-of-{len(shards):05}.safetensors", parts, rank))
    return files


def _split(placed: list[_Placed], max_shard_size: int) -> Iterator[list[_Placed]]:
    shard: list[_Placed] = []
    size = 0
    for item in placed:
        if shard and size + item.tensor.size > max_shard_size:
            yield shard
            shard, size = [], 0
        shard.append(item)
        size += item.tensor.size
    if shard:
        yield shard


def _aligned(shard: list[_Placed]) -> list[_Placed]:
    """The tensors in their own order where each then begins at a multiple of its element size, else largest first."""
    offset = 0
    for item in shard:
        if offset % _element_size(item):
            return sorted(shard, key=_element_size, reverse=True)
        offset += item.tensor.size
    return shard


def _element_size(item: _Placed) -> int:
    return max(1, DTYPE_BITS[item.tensor.dtype] // 8)


def _metadata(checkpoint: Checkpoint, sources: set[str]) -> dict[str, str]:
    """The `__metadata__` of all `sources` together; where two disagree on a key, the first file's value."""
    merged: dict[str, str] = {}
    for name in sorted(sources, reverse=True):
        merged.update(checkpoint.shards[name].metadata)
    return merged
