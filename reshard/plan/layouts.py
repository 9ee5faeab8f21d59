"""Which tensors go into which file of an output, and in which order: by EP rank, or file by file as in the source.

Blocks can be shared with the source where a tensor's bytes lie on blocks as they do there. Headers are padded to that
end, and by rank, where most of the source can be shared so, the tensors of one source file are put into an order in
which the small ones shift the large ones into place. Pure; no I/O.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint.directory import Checkpoint
from ..checkpoint.header import DTYPE_BITS, Tensor, build_header
from ..model.layers import MoeModel
from ..model.names import renumber
from ..placement.permutations import Placement, invert, rank_slots
from .extents import MIN_SHARED, shareable
from .files import Content, Digests, ExpertIds, Literal, OutputFile, Part, Range, Rows

USUAL_BLOCK = 4096  # bytes; where blocks cannot be shared now, a copy of the output may
MAX_CUTS = 8  # files for each source file and rank, at the most, that sharing may take


@dataclass(frozen=True, slots=True)
class _Placed:
    """A tensor as it will be in the output, `tensor.name` included, and where its bytes come from."""

    tensor: Tensor
    part: Part

    @property
    def unit(self) -> int:
        """Bytes of the pieces that can share blocks, each for itself: the whole tensor, or its rows."""
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
    """The tensors of a file in order; its data begins `start` bytes after a multiple of `block_size`."""

    placed: Sequence[_Placed]
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
    """The safetensors files of an output: those every rank needs, then each rank's, in the order they are loaded.

    Parameters:
        placement: physical_to_logical [E] of each MoE layer
        ep_size: R
        max_shard_size: bytes of tensors in a file at the most; a single larger tensor still gets its file
        block_size: bytes; files are cut and ordered so that blocks of this size can be shared, None: so as to be few

    """
    everything = _arrange(checkpoint, model, placement, digests)
    of_experts = {tensor.name for layer in model.layers for tensors in layer.experts for tensor in tensors}
    shared = [placed for name, placed in everything.items() if name not in of_experts]
    ranks: list[list[_Placed]] = [[] for _ in range(ep_size)]
    for layer in model.layers:
        if not layer.experts:
            continue
        physical_to_logical = placement[layer.name]
        for placed, slots in zip(ranks, rank_slots(len(physical_to_logical), ep_size), strict=True):
            for physical in slots:
                placed += [everything[tensor.name] for tensor in layer.experts[physical_to_logical[physical]]]

    def files(stem: str, rank: int | None, placed: list[_Placed]) -> Iterator[OutputFile]:
        cut = _cut(placed, max_shard_size) if block_size is None else _cut_alike(placed, max_shard_size, block_size)
        shards = list(cut)
        for number, shard in enumerate(shards, start=1):
            yield _file(f"{stem}-{number:05}-of-{len(shards):05}.safetensors", rank, shard, checkpoint)

    width = max(2, len(str(ep_size)))
    of_ranks = (
        file
        for rank, placed in enumerate(ranks)
        for file in files(f"model-ep{rank:0{width}}-of-{ep_size:0{width}}", rank, placed)
    )
    return [*files("model-shared", None, shared), *of_ranks]


def as_source(
    checkpoint: Checkpoint, model: MoeModel, placement: Placement, *, block_size: int | None, digests: Digests
) -> list[OutputFile]:
    """One safetensors file for each of the source's, of the same name, its tensors in the same order.

    Parameters:
        placement: physical_to_logical [E] of each MoE layer
        block_size: bytes; the data begins as far into a block of this size as it does in the source

    """
    everything = _arrange(checkpoint, model, placement, digests)
    block_size = block_size or USUAL_BLOCK
    return [
        _file(
            name,
            None,
            _Shard([everything[tensor.name] for tensor in header.tensors], len(header.raw) % block_size, block_size),
            checkpoint,
        )
        for name, header in checkpoint.shards.items()
    ]


def why_not_shared(files: Sequence[OutputFile], checkpoint: Checkpoint, ep_size: int, block_size: int) -> str | None:
    """Why files cut to share blocks are not worth it, in words; None where they are."""
    size = sum(file.size for file in files)
    shared = sum(extent.size for file in files for extent in shareable(file.parts, block_size))
    if shared * 2 < size:
        return f"only {shared} of {size} bytes of tensors could lie on blocks as in the source"
    if len(files) > MAX_CUTS * (ep_size + 1) * len(checkpoint.shards):
        return f"its tensors would have to be cut into {len(files)} files to lie on blocks as in the source"
    return None


def _arrange(checkpoint: Checkpoint, model: MoeModel, placement: Placement, digests: Digests) -> Mapping[str, _Placed]:
    """Every tensor of the source, by its name there, in its order."""
    tables = {layer: invert(physical_to_logical) for layer, physical_to_logical in placement.items()}
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
    placed = {}
    for name, tensor in checkpoint.tensors.items():
        new_name = renumber(name, tables)
        as_it_is = Part(new_name, Range(tensor.file, tensor.offset, tensor.size), digests)
        renamed = Tensor(new_name, tensor.dtype, tensor.shape, tensor.file, tensor.offset, tensor.size)
        placed[name] = _Placed(renamed, rewritten.get(name, as_it_is))
    return placed


def _rows(tensor: Tensor, order: Sequence[int]) -> Content:
    return Rows(tensor.file, tensor.offset, tensor.size, tuple(order))


def _file(name: str, rank: int | None, shard: _Shard, checkpoint: Checkpoint) -> OutputFile:
    metadata = _metadata(checkpoint, {item.tensor.file for item in shard.placed})
    tensors = [item.tensor for item in shard.placed]
    header = build_header(tensors, metadata, start=shard.start, alignment=shard.block_size)
    return OutputFile(name, (Part(None, Literal(header)), *(item.part for item in shard.placed)), rank)


def _cut(placed: Sequence[_Placed], max_shard_size: int) -> Iterator[_Shard]:
    shard: list[_Placed] = []
    size = 0
    for item in placed:
        if shard and size + item.tensor.size > max_shard_size:
            yield _Shard(_aligned(shard))
            shard, size = [], 0
        shard.append(item)
        size += item.tensor.size
    if shard:
        yield _Shard(_aligned(shard))


def _aligned(shard: list[_Placed]) -> list[_Placed]:
    """The tensors in their own order where each then begins at a multiple of its element size, else largest first."""
    offset = 0
    for item in shard:
        if offset % item.element_size:
            return sorted(shard, key=lambda item: item.element_size, reverse=True)
        offset += item.tensor.size
    return shard


def _cut_alike(placed: Sequence[_Placed], max_shard_size: int, block_size: int) -> Iterator[_Shard]:
    """Files in each of which every large tensor lies as far into a block as in the source.

    1. A file holds tensors of one source file only: those of another lie a header apart, and nothing shifts them by it.
    2. Large tensors that lie alike follow each other.
    3. Where none is left that fits here, a small one goes next and shifts what comes after it.
    4. Where no small one is left either, a new file begins, whose header is padded for the next large one.
    """
    of_file: dict[str, list[_Placed]] = defaultdict(list)
    for item in placed:
        of_file[item.tensor.file].append(item)
    for items in of_file.values():
        large: dict[int, deque[_Placed]] = {}  # by offset into a block; those first that come first
        small: deque[_Placed] = deque()
        for item in items:
            if item.unit >= MIN_SHARED:
                large.setdefault(item.tensor.offset % block_size, deque()).append(item)
            else:
                small.append(item)
        while large or small:
            start = at = next(iter(large), 0)
            shard: list[_Placed] = []
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
    """The `__metadata__` of all `sources` together; where two disagree on a key, the first file's value."""
    merged: dict[str, str] = {}
    for name in sorted(sources, reverse=True):
        merged.update(checkpoint.shards[name].metadata)
    return merged
