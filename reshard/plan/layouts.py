"""Decides which tensors go into which output file, and in which order: by EP rank, or file by file as in the source.

A tensor can share disk blocks with the source if it begins as far into a block as it does there. Headers are padded
for that. In the layout by rank, if most of the source can be shared, the tensors of each source file are also
reordered: small ones shift the large ones after them into place. Gates of a model with expert groups get one dimension,
which is part of the lock (see `placement.contract`). Pure; no I/O. A new layout also needs its name in
`record.manifest.Layout` and a case in `commands.resharding`.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint.directory import Checkpoint
from ..checkpoint.header import DTYPE_BITS, Tensor, build_header
from ..model.layers import MoeModel
from ..model.names import renumber
from ..placement.contract import mark_of
from ..placement.permutations import Placement, invert, rank_slots
from .extents import MIN_SHARED, shareable
from .files import Content, Digests, ExpertIds, Literal, OutputFile, Part, Range, Rows

DEFAULT_BLOCK_SIZE = 4096  # bytes; if blocks cannot be shared now, a later copy of the output may share them
MAX_FILES = 8  # per source file and rank; if sharing needs more output files, it is not worth it


@dataclass(frozen=True, slots=True)
class _Item:
    """A tensor of the output, and the part that writes it. `tensor` has its new name, but its offset in the source."""

    tensor: Tensor
    part: Part

    @property
    def piece_size(self) -> int:
        """Bytes of each piece that can share blocks: of the whole tensor, or of a row; 0 if it is rewritten."""
        match self.part.content:
            case Range(_, _, size):
                return size
            case Rows(_, _, size, order):
                return size // len(order)
        return 0

    @property
    def element_size(self) -> int:
        """Bytes."""
        return max(1, DTYPE_BITS[self.tensor.dtype] // 8)


@dataclass(frozen=True, slots=True)
class _Shard:
    """The tensors of a file, in order; its data begins `start` bytes after a multiple of `block_size`."""

    items: Sequence[_Item]
    start: int = 0
    block_size: int = 8


def by_rank(
    checkpoint: Checkpoint,
    model: MoeModel,
    placement: Placement,
    ep_size: int,
    *,
    max_shard_size: int,
    block_size: int | None,
    digests: Digests,
) -> list[OutputFile]:
    """The safetensors files of an output: those that every rank needs, then each rank's in the order it loads them.

    Parameters:
        placement: physical_to_logical [E] of each MoE layer
        ep_size: R
        max_shard_size: most bytes of tensors in a file; a larger tensor gets a file of its own
        block_size: bytes; cut and order the files so that blocks of this size can be shared. None: make few files

    """
    items = _arrange(checkpoint, model, placement, digests)
    mark = mark_of(placement)
    expert_tensors = {tensor.name for layer in model.layers for tensors in layer.experts for tensor in tensors}
    shared = [item for name, item in items.items() if name not in expert_tensors]
    ranks: list[list[_Item]] = [[] for _ in range(ep_size)]
    for layer in model.layers:
        if not layer.experts:
            continue
        physical_to_logical = placement[layer.name]
        for of_rank, slots in zip(ranks, rank_slots(len(physical_to_logical), ep_size), strict=True):
            for physical in slots:
                of_rank += [items[tensor.name] for tensor in layer.experts[physical_to_logical[physical]]]

    def files(stem: str, rank: int | None, tensors: list[_Item]) -> Iterator[OutputFile]:
        if block_size is None:
            shards = list(_cut(tensors, max_shard_size))
        else:
            shards = list(_cut_to_share(tensors, max_shard_size, block_size))
        for number, shard in enumerate(shards, start=1):
            yield _file(f"{stem}-{number:05}-of-{len(shards):05}.safetensors", rank, shard, checkpoint, mark)

    width = max(2, len(str(ep_size)))
    rank_files = (
        file
        for rank, of_rank in enumerate(ranks)
        for file in files(f"model-ep{rank:0{width}}-of-{ep_size:0{width}}", rank, of_rank)
    )
    return [*files("model-shared", None, shared), *rank_files]


def as_source(
    checkpoint: Checkpoint, model: MoeModel, placement: Placement, *, block_size: int | None, digests: Digests
) -> list[OutputFile]:
    """One safetensors file for each of the source's, with the same name and its tensors in the same order.

    Parameters:
        placement: physical_to_logical [E] of each MoE layer
        block_size: bytes; a file's data begins as far into a block of this size as in the source. None: 4096

    """
    items = _arrange(checkpoint, model, placement, digests)
    block_size = block_size or DEFAULT_BLOCK_SIZE
    mark = mark_of(placement)
    return [
        _file(
            name,
            None,
            _Shard([items[tensor.name] for tensor in header.tensors], len(header.raw) % block_size, block_size),
            checkpoint,
            mark,
        )
        for name, header in checkpoint.shards.items()
    ]


def why_not_shared(files: Sequence[OutputFile], checkpoint: Checkpoint, ep_size: int, block_size: int) -> str | None:
    """Why it is not worth cutting the files to share blocks, in words; None if it is."""
    size = sum(file.size for file in files)
    shared = sum(extent.size for file in files for extent in shareable(file.parts, block_size))
    if shared * 2 < size:
        return f"only {shared} of {size} bytes of tensors could share blocks with the source"
    if len(files) > MAX_FILES * (ep_size + 1) * len(checkpoint.shards):
        return f"to share blocks with the source, its tensors would need {len(files)} files"
    return None


def _arrange(checkpoint: Checkpoint, model: MoeModel, placement: Placement, digests: Digests) -> Mapping[str, _Item]:
    """Every tensor as it will be in the output, by its name in the source, in the source's order."""
    tables = {layer: invert(physical_to_logical) for layer, physical_to_logical in placement.items()}
    flattened = {*model.gates} if model.routing.group_limited else set()
    rewritten: dict[str, Part] = {}
    for layer in model.layers:
        order = placement[layer.name]
        for tensor in layer.router:
            rewritten[tensor.name] = Part(tensor.name, _rows(tensor, order))
        for tensor in layer.fused:
            rewritten[tensor.name] = Part(tensor.name, _rows(tensor, order), digests)
        for tensor in layer.expert_ids:
            ids = ExpertIds(tensor.file, tensor.offset, tensor.size, tensor.dtype, tables[layer.name])
            rewritten[tensor.name] = Part(tensor.name, ids)
    items = {}
    for name, tensor in checkpoint.tensors.items():
        new_name = renumber(name, tables)
        copied = Part(new_name, Range(tensor.file, tensor.offset, tensor.size), digests)
        shape = (math.prod(tensor.shape),) if name in flattened else tensor.shape
        renamed = Tensor(new_name, tensor.dtype, shape, tensor.file, tensor.offset, tensor.size)
        items[name] = _Item(renamed, rewritten.get(name, copied))
    return items


def _rows(tensor: Tensor, order: Sequence[int]) -> Content:
    return Rows(tensor.file, tensor.offset, tensor.size, tuple(order))


def _file(name: str, rank: int | None, shard: _Shard, checkpoint: Checkpoint, mark: Mapping[str, str]) -> OutputFile:
    metadata = {**_metadata(checkpoint, {item.tensor.file for item in shard.items}), **mark}
    tensors = [item.tensor for item in shard.items]
    header = build_header(tensors, metadata, start=shard.start, alignment=shard.block_size)
    return OutputFile(name, (Part(None, Literal(header)), *(item.part for item in shard.items)), rank)


def _cut(items: Sequence[_Item], max_shard_size: int) -> Iterator[_Shard]:
    shard: list[_Item] = []
    size = 0
    for item in items:
        if shard and size + item.tensor.size > max_shard_size:
            yield _Shard(_aligned(shard))
            shard, size = [], 0
        shard.append(item)
        size += item.tensor.size
    if shard:
        yield _Shard(_aligned(shard))


def _aligned(shard: list[_Item]) -> list[_Item]:
    """Order the tensors so that each begins at a multiple of its element size: as given, or largest elements first."""
    offset = 0
    for item in shard:
        if offset % item.element_size:
            return sorted(shard, key=lambda item: item.element_size, reverse=True)
        offset += item.tensor.size
    return shard


def _cut_to_share(items: Sequence[_Item], max_shard_size: int, block_size: int) -> Iterator[_Shard]:
    """Cut into files in which every large tensor begins as far into a block as in the source.

    1. A file holds tensors of one source file only. Another source file has a header of another size, and so its
       tensors begin elsewhere in their blocks.
    2. The next tensor is a large one that fits: in the source it begins as far into a block as the file has got.
    3. If no large one fits, the next is a small one, which shifts those after it.
    4. If no small one is left either, a new file begins. Its header is padded to fit the next large tensor.
    """
    by_file: dict[str, list[_Item]] = defaultdict(list)
    for item in items:
        by_file[item.tensor.file].append(item)
    for of_file in by_file.values():
        large: dict[int, deque[_Item]] = {}  # by offset into a block, in the source's order
        small: deque[_Item] = deque()
        for item in of_file:
            if item.piece_size >= MIN_SHARED:
                large.setdefault(item.tensor.offset % block_size, deque()).append(item)
            else:
                small.append(item)
        while large or small:
            start = at = next(iter(large), 0)
            shard: list[_Item] = []
            size = 0
            while queue := large.get(at) or (small if small and at % small[0].element_size == 0 else None):
                if shard and size + queue[0].tensor.size > max_shard_size:
                    break
                item = queue.popleft()
                shard.append(item)
                size += item.tensor.size
                if at in large and not large[at]:
                    del large[at]
                at = (at + item.tensor.size) % block_size
            yield _Shard(shard, start, block_size)


def _metadata(checkpoint: Checkpoint, sources: set[str]) -> dict[str, str]:
    """The `__metadata__` of all `sources` together; if two disagree on a key, the first file's value."""
    merged = {"format": "pt"}  # Transformers 4 refuses metadata without it
    for name in sorted(sources, reverse=True):
        merged.update(checkpoint.shards[name].metadata)
    return merged
