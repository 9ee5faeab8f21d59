"""Compares an output with the checkpoint that it was made from: every tensor's bytes, and what the routers choose.

It works backwards from the output's names with the manifest's placement. The only code that it shares with the plan
parses an expert's name. It trusts the manifest's digests, because `verify` has just checked the output against them.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from ..checkpoint.directory import CONFIG, INDEX, is_left_out, read_json_object, refuse_nesting
from ..checkpoint.files import Files
from ..checkpoint.header import Tensor
from ..execute.fetching import sources_of
from ..execute.fill import Progress
from ..execute.sources import BLOCK_SIZE, OpenSources
from ..model.names import renumber
from ..model.routing import read_routing
from ..placement.contract import CONTRACT_KEY, contract_from_json, unlock_config
from ..placement.permutations import invert
from ..plan.files import Part, Range
from ..record.manifest import MANIFEST, Manifest, find_files, unpack
from .original import Original

TOKENS = 16  # random hidden states for each router
_NAMES_EXPERTS = re.compile(r"experts\W")
_ID_FORMATS = {"I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B"}


@dataclass(frozen=True, slots=True)
class RouterComparison:
    """The routers of source and output, run on the same random hidden states.

    `tokens` hidden states went through each of `routers` routers. `ties` of the choices were between equal scores in a
    model without expert groups, and are not compared: the lower id wins there, and renumbering can change it.
    """

    routers: int
    tokens: int
    ties: int
    problems: tuple[str, ...]


def compare_files(source: Original, manifest: Manifest) -> list[str]:
    """Compare every safetensors header and every other file of `source` with its record in `manifest`.

    Returns the problems found, a sentence each.
    """
    checkpoint = source.checkpoint
    recorded = {file.name: file for file in manifest.source.files if not is_left_out(file.name)}
    digests = {record.name: record.digest for record in manifest.files}
    problems = [
        f"{checkpoint.root / name}: in the source or in {MANIFEST}, but not in both"
        for name in sorted(recorded.keys() ^ checkpoint.files.keys())
    ]
    with sources_of(checkpoint.source, checkpoint.files).open() as opened:
        for name in sorted(recorded.keys() & checkpoint.files.keys()):
            file = recorded[name]
            if file.header is not None:
                same = name in checkpoint.shards and unpack(file.header) == checkpoint.shards[name].raw
            elif file.content is not None:
                same = unpack(file.content) == checkpoint.source.read(name)
            else:
                same = opened.digest_file(name) == digests.get(name)
            if not same:
                problems.append(f"{checkpoint.root / name}: differs from the file that the output was made from")
    return problems


def compare_rewritten(out: Path, manifest: Manifest) -> list[str]:
    """Compare the files in `out` that were rewritten with the source's, as `manifest` has them; find files of nobody.

    Configs may differ in the lock of a contract, and in texts that name experts: which ids they have is not checked.
    Indices are left out. Returns the problems found, a sentence each.
    """
    listed = {record.name for record in manifest.files}
    of_source = {file.name for file in manifest.source.files} | {INDEX}
    strangers = (record.name for record in manifest.files if not record.tensors and record.name not in of_source)
    problems = [f"{out / name}: the source has no such file" for name in strangers]
    for file in manifest.source.files:
        if file.content is None or file.name not in listed or file.name.endswith(".index.json"):
            continue
        before, after = unpack(file.content), (out / file.name).read_bytes()
        if before != after and not _same_config(before, after, out / file.name):
            problems.append(f"{out / file.name}: differs from the source's in more than experts' ids and the contract")
    return problems


def _same_config(before: bytes, after: bytes, path: Path) -> bool:
    values = []
    for text in (before, after):
        refuse_nesting(text, path)
        try:
            values.append(json.loads(text))
        except ValueError:
            return False
    old, new = values
    if isinstance(new, dict) and CONTRACT_KEY in new and CONTRACT_KEY not in old:
        contract_from_json(new[CONTRACT_KEY], str(path))
        new = unlock_config(new)
    return bool(_without_experts(old) == _without_experts(new))


def _without_experts(value: Any) -> Any:
    """A JSON value in a form that is the same for two that differ only in texts that name experts."""
    if isinstance(value, dict):
        entries = ((_without_experts(key), _without_experts(item)) for key, item in value.items())
        return sorted(entries, key=repr)
    if isinstance(value, list):
        return [_without_experts(item) for item in value]
    return "experts" if isinstance(value, str) and _NAMES_EXPERTS.search(value) else repr(value)


def compare_tensors(source: Original, out: Files, manifest: Manifest, pool: Executor, progress: Progress) -> list[str]:
    """Compare every tensor of `source` with the output; if that is staged, every tensor that must be in it.

    Puts the tensor's bytes into the output's order, hashes them, and compares with the digest in `manifest`, or with
    the bytes in `out` if there is no digest. Compares dtype and shape with those in the headers of `out`. Calls
    `progress` with the bytes read. Returns the problems found, a sentence each.
    """
    checkpoint, placement = source.checkpoint, manifest.placement
    if {layer.name for layer in source.model.layers} != placement.keys():
        return [f"{checkpoint.root}: its MoE layers are not those of {MANIFEST}; is this the source of the output?"]
    digests = manifest.digests
    contract = manifest.parsed_contract(MANIFEST)
    flattened = set() if contract is None else {*contract.flattened}
    output_names = {renumber(name, placement): name for name in digests}
    if unmatched := sorted(output_names.keys() ^ checkpoint.tensors.keys()):
        return [f"{checkpoint.root}: tensor {name}: in source or output, but not in both" for name in unmatched]
    written: dict[str, Tensor] = {}
    headers = out.headers([record.name for record in manifest.expected_files if record.tensors])
    for name, header in headers.items():
        for tensor in header.tensors:
            written[tensor.name] = tensor
            origin = checkpoint.tensors[renumber(tensor.name, placement)]
            shape = (math.prod(origin.shape),) if tensor.name in flattened else origin.shape
            if (tensor.dtype, tensor.shape) != (origin.dtype, shape):
                where = f"{out.root / name}: tensor {tensor.name}"
                expected = f"{origin.dtype} {list(shape)}, as {origin.name} of the source is {list(origin.shape)}"
                return [f"{where}: {tensor.dtype} {list(tensor.shape)}, expected {expected}"]
    in_shards: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in checkpoint.tensors.values():
        if output_names[tensor.name] in written:
            in_shards[tensor.file].append(tensor)
    reader = _ReaderInOutputOrder(source, placement)
    files = find_files(out, manifest.expected_files)

    def compare_shard(tensors: list[Tensor]) -> list[str]:
        problems = []
        with (
            sources_of(checkpoint.source, checkpoint.files).open() as opened,
            sources_of(out, files).open() as opened_out,
        ):
            opened.expect(Part(None, Range(tensor.file, tensor.offset, tensor.size)) for tensor in tensors)
            for tensor in tensors:
                name = output_names[tensor.name]
                found = _digest(reader.blocks(opened, tensor))
                if found != (digests[name] or opened_out.digest(written[name])):
                    where = f"{checkpoint.root / tensor.file}: tensor {tensor.name}"
                    problems.append(f"{where}: its bytes differ from those of tensor {name} in the output")
                progress(tensor.size)
            opened.check_unchanged()
        return problems

    return [problem for problems in pool.map(compare_shard, in_shards.values()) for problem in problems]


def _digest(blocks: Iterable[bytes | memoryview]) -> str:
    digest = blake3()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


class _ReaderInOutputOrder:
    """Reads tensors of the source, with rows and expert ids as the output must have them."""

    def __init__(self, source: Original, placement: Mapping[str, Sequence[int]]) -> None:
        layers = source.model.layers
        self._rows = {
            tensor.name: placement[layer.name] for layer in layers for tensor in (*layer.router, *layer.fused)
        }
        self._ids = {tensor.name: invert(placement[layer.name]) for layer in layers for tensor in layer.expert_ids}

    def blocks(self, opened: OpenSources, tensor: Tensor) -> Iterator[bytes | memoryview]:
        """Yield the tensor's bytes. The next block overwrites the one before."""
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
    """Check that each MoE layer's router chooses the same logical experts and weights in source and output.

    Runs both on random hidden states. Routes the output as its own config.json says: by its contract if it has one,
    otherwise as any engine would.
    """
    import torch
    from safetensors import safe_open

    from ..model.router import load_tensor, read_routers, route

    path = out / CONFIG
    config = read_json_object(path)
    contract = contract_from_json(config[CONTRACT_KEY], str(path)) if CONTRACT_KEY in config else None
    original_config = unlock_config(config) if contract else config
    model = source.model
    routing_after = read_routing(original_config, model.family, str(path))
    if routing_after.num_experts != model.routing.num_experts:
        fault = f"{path}: has {routing_after.num_experts} experts, but the source has {model.routing.num_experts}"
        return RouterComparison(0, 0, 0, (fault,))
    files_after = {name: out / record.name for record in manifest.files for name in record.tensors}
    problems = []
    ties = 0

    def before_it(name: str) -> torch.Tensor:
        return load_tensor(source.checkpoint.source, source.checkpoint.tensors[name])

    def after_it(name: str) -> torch.Tensor:
        with safe_open(files_after[name], framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
            return found

    placement = manifest.placement
    for number, layer in enumerate(model.layers):
        to_logical = torch.tensor(placement[layer.name])
        generator = torch.Generator().manual_seed(number)
        routers = (read_routers(layer, load, torch.float64) for load in (before_it, after_it))
        for before, after in zip(*routers, strict=True):
            hidden = torch.randn(TOKENS, before.weight_EH.shape[1], generator=generator, dtype=torch.float64)
            expected = route(hidden, before, model.routing)
            groups = contract.physical_to_logical[layer.name] if contract else None
            found = route(hidden, after, routing_after, groups)
            compared_T = torch.ones(TOKENS, dtype=torch.bool) if contract else ~expected.tied_T
            ties += int((~compared_T).sum())
            different = None
            found_TK, expected_TK = found.weights_TK[compared_T], expected.weights_TK[compared_T]
            if not torch.equal(to_logical[found.experts_TK][compared_T], expected.experts_TK[compared_T]):
                different = "experts"
            elif not found_TK.allclose(expected_TK, rtol=0, atol=0, equal_nan=True):
                different = "weights"
            if different:
                problems.append(f"{out}: the router of {layer.name} chooses other {different} than the source's")
                break
    return RouterComparison(len(model.layers), TOKENS, ties, tuple(problems))
