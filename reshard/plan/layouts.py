"""Decides which tensors go into which output file, and in which order: by EP rank, or file by file as in the source.

A tensor can share disk blocks with the source if it begins as far into a block as it does there. Headers are padded
for that. In the layout by rank, if most of the source can be shared, the tensors of each source file are also
reordered: small ones shift the large ones after them into place. Gates of a model with expert groups get one dimension,
which is part of the lock (see `placement.contract`). Pure; no I/O. A new layout also needs its name in
`record.manifest.Layout` and a case in `commands.outline`.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint.directory import Checkpoint
from ..checkpoint.header import ALIGNMENT, DTYPE_BITS, MAX_HEADER_SIZE, Tensor, build_header
from ..model.layers import MoeModel
from ..model.names import renumber
from ..placement.contract import mark_of
from ..placement.permutations import Placement, invert, rank_slots
from .extents import MIN_SHARED, shareable
from .files import Content, Digests, ExpertIds, Literal, OutputFile, Part, Range, Rows

DEFAULT_BLOCK_SIZE = 4096  # bytes; if blocks cannot be shared now, a later copy of the output may share them
MAX_FILES = 8  # per source file and rank; if sharing needs more output files, it is not worth it
MAX_GROWTH = 64  # bytes of a tensor's entry in a header: its offsets, and its expert's id, may get more digits
MAX_ADDED = 1 << 17  # bytes of a header: padding up to a block, and what the metadata says of the numbering

_ELEMENT_SIZE = {dtype: max(1, bits // 8) for dtype, bits in DTYPE_BITS.items()}  # bytes


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file of the output, by the tensors of the source that go into it, in order.

    `rank` is the only EP rank that needs it; None if every rank does. Its data begins `start` bytes after a multiple of
    `block_size`.
    """

    name: str
    rank: int | None
    tensors: Sequence[Tensor]
    start: int = 0
    block_size: int = ALIGNMENT


def by_rank(
    checkpoint: Checkpoint,
    model: MoeModel,
    placement: Placement,
    ep_size: int,
    *,
    max_shard_size: int,
    block_size: int | None,
) -> list[Shard]:
    """The safetensors files of an output: those that every rank needs, then each rank's in the order it loads them.

    Parameters:
        placement: physical_to_logical [E] of each MoE layer
        ep_size: R
        max_shard_size: most bytes of tensors in a file; a larger tensor gets a file of its own
        block_size: bytes; cut and order the files so that blocks of this size can be shared. None: make few files
    """
    of_experts = {tensor.name for layer in model.layers for tensors in layer.experts for tensor in tensors}
    shared = [tensor for name, tensor in checkpoint.tensors.items() if name not in of_experts]
    ranks: list[list[Tensor]] = [[] for _ in range(ep_size)]
    for layer in model.layers:
        if not layer.experts:
            continue
        physical_to_logical = placement[layer.name]
        for of_rank, slots in zip(ranks, rank_slots(len(physical_to_logical), ep_size), strict=True):
            for physical in slots:
                of_rank += layer.experts[physical_to_logical[physical]]
    changed = contents(model, placement) if block_size else {}

    def shards(stem: str, rank: int | None, tensors: list[Tensor]) -> Iterator[Shard]:
        if block_size is None:
            cuts = [(cut, 0) for cut in _cut(tensors, max_shard_size)]
        else:
            cuts = list(_cut_to_share(tensors, changed, max_shard_size, block_size))
        for number, (cut, start) in enumerate(cuts, start=1):
            name = f"{stem}-{number:05}-of-{len(cuts):05}.safetensors"
            yield Shard(name, rank, cut, start, block_size or ALIGNMENT)

    width = max(2, len(str(ep_size)))
    of_ranks = (
        shard
        for rank, of_rank in enumerate(ranks)
        for shard in shards(f"model-ep{rank:0{width}}-of-{ep_size:0{width}}", rank, of_rank)
    )
    return [*shards("model-shared", None, shared), *of_ranks]


def as_source(checkpoint: Checkpoint, *, block_size: int | None) -> list[Shard]:
    """One safetensors file for each of the source's, with the same name and its tensors in the same order.

    `block_size` is in bytes: a file's data begins as far into a block of this size as in the source. None: 4096.
    """
    block_size = block_size or DEFAULT_BLOCK_SIZE
    return [
        Shard(name, None, header.tensors, len(header.raw) % block_size, block_size)
        for name, header in checkpoint.shards.items()
    ]


def output_files(
    shards: Iterable[Shard], checkpoint: Checkpoint, model: MoeModel, placement: Placement, digests: Digests
) -> list[OutputFile]:
    """The same files with their headers, and with every tensor under its name in the output."""
    tables = {layer: invert(physical_to_logical) for layer, physical_to_logical in placement.items()}
    flattened = {*model.gates} if model.routing.group_limited else set()
    changed = contents(model, placement)
    read_anyway = {tensor.name for layer in model.layers for tensor in (*layer.router, *layer.expert_ids)}
    mark = mark_of(placement)
    files = []
    for shard in shards:
        renamed, parts = [], []
        for tensor in shard.tensors:
            name = renumber(tensor.name, tables)
            shape = (math.prod(tensor.shape),) if tensor.name in flattened else tensor.shape
            renamed.append(Tensor(name, tensor.dtype, shape, tensor.file, tensor.offset, tensor.size))
            wanted = Digests.ALL if tensor.name in read_anyway else digests
            parts.append(Part(name, _content(tensor, changed), wanted))
        metadata = {**_metadata(checkpoint, {tensor.file for tensor in shard.tensors}), **mark}
        header = build_header(renamed, metadata, start=shard.start, alignment=shard.block_size)
        files.append(OutputFile(shard.name, (Part(None, Literal(header)), *parts), shard.rank))
    return files


def headers_fit(checkpoint: Checkpoint) -> bool:
    """Whether every output of `checkpoint` surely has headers that are short enough for safetensors.

    No header of an output is longer than all headers of the source together, with room for what is added. If this says
    no, `build_header` decides.
    """
    most = sum(len(header.raw) + MAX_GROWTH * len(header.tensors) for header in checkpoint.shards.values())
    return most + MAX_ADDED <= MAX_HEADER_SIZE


def why_not_shared(
    shards: Sequence[Shard],
    checkpoint: Checkpoint,
    model: MoeModel,
    placement: Placement,
    ep_size: int,
    block_size: int,
) -> str | None:
    """Why it is not worth cutting the files by rank to share blocks, in words; None if it is."""
    size = sum(tensor.size for tensor in checkpoint.tensors.values())
    shared = shared_size(shards, model, placement, block_size)
    if shared * 2 < size:
        return f"only {shared} of {size} bytes of tensors could share blocks with the source"
    if len(shards) > MAX_FILES * (ep_size + 1) * len(checkpoint.shards):
        return f"to share blocks with the source, its tensors would need {len(shards)} files"
    return None


def shared_size(shards: Iterable[Shard], model: MoeModel, placement: Placement, block_size: int | None) -> int:
    """Bytes of the files that can share the source's blocks. Their headers decide where tensors begin in a block."""
    changed = contents(model, placement)
    return sum(
        extent.size
        for shard in shards
        for extent in shareable(
            [Part(None, _content(tensor, changed)) for tensor in shard.tensors], block_size, shard.start
        )
    )


def contents(model: MoeModel, placement: Placement) -> dict[str, Rows | ExpertIds]:
    """What the output has of the tensors that are indexed by expert or hold expert ids, by their names."""
    changed: dict[str, Rows | ExpertIds] = {}
    for layer in model.layers:
        order = tuple(placement[layer.name])
        for tensor in (*layer.router, *layer.fused):
            changed[tensor.name] = Rows(tensor.file, tensor.offset, tensor.size, order)
        for tensor in layer.expert_ids:
            changed[tensor.name] = ExpertIds(tensor.file, tensor.offset, tensor.size, tensor.dtype, invert(order))
    return changed


def _content(tensor: Tensor, changed: Mapping[str, Rows | ExpertIds]) -> Content:
    return changed.get(tensor.name) or Range(tensor.file, tensor.offset, tensor.size)


def _piece_size(content: Content) -> int:
    """Bytes of each piece that can share blocks: of the whole tensor, or of a row; 0 if it is rewritten."""
    match content:
        case Range(_, _, size):
            return size
        case Rows(_, _, size, order):
            return size // len(order)
    return 0


def _cut(tensors: Sequence[Tensor], max_shard_size: int) -> Iterator[list[Tensor]]:
    shard: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.size > max_shard_size:
            yield _aligned(shard)
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.size
    if shard:
        yield _aligned(shard)


def _aligned(shard: list[Tensor]) -> list[Tensor]:
    """Order the tensors so that each begins at a multiple of its element size: as given, or largest elements first."""
    offset = 0
    for tensor in shard:
        if offset % _ELEMENT_SIZE[tensor.dtype]:
            return sorted(shard, key=lambda tensor: _ELEMENT_SIZE[tensor.dtype], reverse=True)
        offset += tensor.size
    return shard


def _cut_to_share(
    tensors: Sequence[Tensor], changed: Mapping[str, Rows | ExpertIds], max_shard_size: int, block_size: int
) -> Iterator[tuple[list[Tensor], int]]:
    """Cut into files in which every large tensor begins as far into a block as in the source.

    1. A file holds tensors of one source file only. Another source file has a header of another size, and so its
       tensors begin elsewhere in their blocks.
    2. The next tensor is a large one that fits: in the source it begins as far into a block as the file has got.
    3. If no large one fits, the next is a small one, which shifts those after it.
    4. If no small one is left either, a new file begins. Its header is padded to fit the next large tensor.

    Each file comes with how far into a block its data begins.
    """
    by_file: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_file[tensor.file].append(tensor)
    for of_file in by_file.values():
        large: dict[int, deque[Tensor]] = {}  # by offset into a block, in the source's order
        small: deque[Tensor] = deque()
        for tensor in of_file:
            if _piece_size(_content(tensor, changed)) >= MIN_SHARED:
                large.setdefault(tensor.offset % block_size, deque()).append(tensor)
            else:
                small.append(tensor)
        while large or small:
            start = at = next(iter(large), 0)
            shard: list[Tensor] = []
            size = 0
            while queue := large.get(at) or (small if small and at % _ELEMENT_SIZE[small[0].dtype] == 0 else None):
                if shard and size + queue[0].size > max_shard_size:
                    break
                tensor = queue.popleft()
                shard.append(tensor)
                size += tensor.size
                if at in large and not large[at]:
                    del large[at]
                at = (at + tensor.size) % block_size
            yield shard, start


def _metadata(checkpoint: Checkpoint, sources: set[str]) -> dict[str, str]:
    """The `__metadata__` of all `sources` together; if two disagree on a key, the first file's value."""
    merged = {"format": "pt"}  # Transformers 4 refuses metadata without it
    for name in sorted(sources, reverse=True):
        merged.update(checkpoint.shards[name].metadata)
    return merged
