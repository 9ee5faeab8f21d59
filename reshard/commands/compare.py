"""An output held against the checkpoint that it was made from: every tensor's bytes, and what the routers choose.

Works backwards from the output's names with the manifest's placement, and shares no code with the plan but how an
expert's name is taken apart. The manifest's digests are taken as true of the output, which `verify` has just shown.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from ..checkpoint.directory import CONFIG, read_json_object
from ..checkpoint.header import Tensor, read_header
from ..execute.fill import Progress
from ..execute.sources import BLOCK_SIZE, OpenSources, SourceFiles
from ..model.names import renumber
from ..model.routing import read_routing
from ..placement.contract import CONTRACT_KEY, contract_from_json, unlock_config
from ..placement.permutations import invert
from ..record.manifest import MANIFEST, Manifest, find_files, unpack
from .original import Original

TOKENS = 16
_ID_FORMATS = {"I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B"}


@dataclass(frozen=True, slots=True)
class RouterComparison:
    """`routers` were run on `tokens` random hidden states each, before and after. `ties` of those choices were between
    equal scores in a model without expert groups, where the lower id wins and renumbering may change which that is.
    """

    routers: int
    tokens: int
    ties: int
    problems: tuple[str, ...]


def compare_files(source: Original, manifest: Manifest) -> list[str]:
    """Every file of `source` that is no safetensors file, and every header, against what `manifest` has of it."""
    checkpoint = source.checkpoint
    recorded = {file.name: file for file in manifest.source.files}
    digests = {record.name: record.digest for record in manifest.files}
    problems = [
        f"{checkpoint.root / name}: only in the source, or only in {MANIFEST}"
        for name in sorted(recorded.keys() ^ checkpoint.files.keys())
    ]
    for name in sorted(recorded.keys() & checkpoint.files.keys()):
        file = recorded[name]
        if file.header is not None:
            same = name in checkpoint.shards and unpack(file.header) == checkpoint.shards[name].raw
        elif file.content is not None:
            same = unpack(file.content) == (checkpoint.root / name).read_bytes()
        else:
            same = blake3().update_mmap(checkpoint.root / name).hexdigest() == digests.get(name)
        if not same:
            problems.append(f"{checkpoint.root / name}: not what it was when the output was made")
    return problems


def compare_tensors(source: Original, out: Path, manifest: Manifest, pool: Executor, progress: Progress) -> list[str]:
    """Every tensor of `source`, brought into the output's order and hashed, against the digests in `manifest`, or
    where it has none against the bytes in `out`; its shape and dtype against those in the headers of `out`. For a
    staged directory, every tensor that must be in it.

    `progress` is told the bytes read. Returns the problems found, a sentence each.
    """
    checkpoint, placement = source.checkpoint, manifest.placement
    if {layer.name for layer in source.model.layers} != placement.keys():
        return [f"{checkpoint.root}: its MoE layers are not those of {MANIFEST}; is this the source of the output?"]
    digests = manifest.digests
    origins = {renumber(name, placement): name for name in digests}
    if strangers := sorted(origins.keys() ^ checkpoint.tensors.keys()):
        return [f"{checkpoint.root}: tensor {name}: only in the source or only in the output" for name in strangers]
    written: dict[str, Tensor] = {}
    for record in manifest.expected_files:
        for tensor in read_header(out / record.name).tensors if record.tensors else ():
            written[tensor.name] = tensor
            origin = checkpoint.tensors[renumber(tensor.name, placement)]
            if (tensor.dtype, tensor.shape) != (origin.dtype, origin.shape):
                where = f"{out / record.name}: tensor {tensor.name}"
                was = f"{origin.dtype} {list(origin.shape)}"
                return [f"{where}: {tensor.dtype} {list(tensor.shape)}, {origin.name} of the source is {was}"]
    in_shards: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in checkpoint.tensors.values():
        if origins[tensor.name] in written:
            in_shards[tensor.file].append(tensor)
    read = _OutputOrder(source, placement)
    files = find_files(out, manifest.expected_files)

    def compare_shard(tensors: list[Tensor]) -> list[str]:
        problems = []
        with (
            SourceFiles(checkpoint.root, checkpoint.files).open() as opened,
            SourceFiles(out, files).open() as reopened,
        ):
            for tensor in tensors:
                name = origins[tensor.name]
                found = _digest(read.blocks(opened, tensor))
                if found != (digests[name] or reopened.digest(written[name])):
                    where = f"{checkpoint.root / tensor.file}: tensor {tensor.name}"
                    problems.append(f"{where}: tensor {name} of the output does not hold its bytes")
                progress(tensor.size)
            opened.check_unchanged()
        return problems

    return [problem for problems in pool.map(compare_shard, in_shards.values()) for problem in problems]


def _digest(blocks: Iterable[bytes | memoryview]) -> str:
    digest = blake3()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


class _OutputOrder:
    """Reads tensors of the source in the order that the output must have them in."""

    def __init__(self, source: Original, placement: Mapping[str, Sequence[int]]) -> None:
        layers = source.model.layers
        self._rows = {
            tensor.name: placement[layer.name] for layer in layers for tensor in (*layer.router, *layer.fused)
        }
        self._ids = {tensor.name: invert(placement[layer.name]) for layer in layers for tensor in layer.expert_ids}

    def blocks(self, opened: OpenSources, tensor: Tensor) -> Iterator[bytes | memoryview]:
        """The tensor's bytes; a block is gone when the next is asked for."""
        if tensor.name in self._ids:
            data = bytearray(tensor.size)
            opened.read(tensor.file, tensor.offset, memoryview(data), tensor.name)
            yield _renumber_ids(data, _ID_FORMATS[tensor.dtype], self._ids[tensor.name])
            return
        order = self._rows.get(tensor.name, (0,))
        size = tensor.size // len(order)
        buffer = memoryview(bytearray(min(size, BLOCK_SIZE)))
        for row in order:
            yield from opened.blocks(tensor.file, tensor.offset + row * size, size, buffer, tensor.name)


def _renumber_ids(data: bytes | bytearray, format_: str, table: Sequence[int]) -> bytes:
    layout = f"<{len(data) // struct.calcsize(format_)}{format_}"
    return struct.pack(layout, *(table[expert] for expert in struct.unpack(layout, data)))


def compare_routers(source: Original, out: Path, manifest: Manifest) -> RouterComparison:
    """Run the router of each MoE layer on random hidden states, before and after: the same logical experts and weights.

    The output is routed as its own config.json asks: by its contract where it has one, else as any engine would.
    """
    import torch

    from ..model.router import read_routers, route

    path = out / CONFIG
    config = read_json_object(path)
    contract = contract_from_json(config[CONTRACT_KEY], str(path)) if CONTRACT_KEY in config else None
    original_config = unlock_config(config) if contract else config
    model = source.model
    routing_after = read_routing(original_config, model.family, str(path))
    if routing_after.num_experts != model.routing.num_experts:
        fault = f"{path}: has {routing_after.num_experts} experts, the source {model.routing.num_experts}"
        return RouterComparison(0, 0, 0, (fault,))
    files_after = {name: out / record.name for record in manifest.files for name in record.tensors}
    problems = []
    ties = 0
    for number, layer in enumerate(model.layers):
        to_logical = torch.tensor(manifest.placement[layer.name])
        files_before = {tensor.name: source.checkpoint.root / tensor.file for tensor in layer.router}
        generator = torch.Generator().manual_seed(number)
        routers = (read_routers(layer, files, torch.float64) for files in (files_before, files_after))
        for before, after in zip(*routers, strict=True):
            hidden = torch.randn(TOKENS, before.weight_EH.shape[1], generator=generator, dtype=torch.float64)
            expected = route(hidden, before, model.routing)
            groups = contract.physical_to_logical[layer.name] if contract else None
            found = route(hidden, after, routing_after, groups)
            decided = torch.ones(TOKENS, dtype=torch.bool) if contract else ~expected.tied_T
            ties += int((~decided).sum())
            what = None
            if not torch.equal(to_logical[found.experts_TK][decided], expected.experts_TK[decided]):
                what = "experts"
            elif not found.weights_TK[decided].allclose(expected.weights_TK[decided], rtol=0, atol=0, equal_nan=True):
                what = "weights"
            if what:
                problems.append(f"{out}: the router of {layer.name} chooses other {what} than the source's")
                break
    return RouterComparison(len(model.layers), TOKENS, ties, tuple(problems))
