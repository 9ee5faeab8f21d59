"""Checks an output against its manifest, and against its source if given. Trusts neither the plan nor the copy.

Reads the output once: hashes every file and tensor, and parses headers, index and config. A tensor without a digest,
which shares its blocks with the source, is counted but not read. With the source, `compare` then checks the source
against the same manifest. All problems are reported, not only the first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

from ..arguments import as_path
from ..checkpoint.directory import CONFIG, Checkpoint, File, read_checkpoint
from ..checkpoint.files import LocalFiles
from ..checkpoint.header import read_header
from ..checkpoint.source import ANY, Hub
from ..errors import CheckpointError, OutputError
from ..execute.fill import Progress
from ..execute.run import count_workers
from ..execute.sources import BLOCK_SIZE, OpenSources, SourceFiles
from ..model.names import parse_expert_name
from ..model.routing import routing_section
from ..placement.contract import (
    CONTRACT_KEY,
    FLATTENED_SINCE,
    LOCKED_GROUPS,
    Contract,
    mixture,
    numbering_in,
    unlock_config,
)
from ..placement.permutations import Placement, rank_slots
from ..record.manifest import MANIFEST, FileRecord, FileSummary, Manifest, read_manifest
from .compare import RouterComparison, compare_files, compare_rewritten, compare_routers, compare_tensors
from .original import read_original, refuse_holes

MAX_SMALL_FILE = 64 << 20  # bytes; `quick` reads no larger file


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked in the output `path`, and every problem found, a sentence each.

    `files` are those that were checked, as the manifest has them. `unread` of the `tensors` were not read: they have no
    digest, or `quick` skipped them. `size` is the bytes read. `staged_ranks` is None for a whole output.
    """

    path: Path
    files: tuple[FileSummary, ...]
    tensors: int
    unread: int
    size: int
    seconds: float
    staged_ranks: tuple[int, ...] | None
    routers: RouterComparison | None
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems


def verify(
    resharded: str | Path,
    src: str | Path | None = None,
    *,
    hub: Hub = ANY,
    quick: bool = False,
    allow_holes: bool = False,
    workers: int | None = None,
    progress: Progress = lambda read: None,
) -> Verification:
    """Check the output `resharded` against its manifest, and with `src` against the checkpoint that it was made from.

    With `quick`, reads no tensors and no large files: only sizes, headers, the index and the configs. With
    `allow_holes`, parts of the tensors of `src` that were never written count as the model's zeros.

    A staged directory must hold the files of its ranks. Other ranks' files are checked if they are there. Calls
    `progress` with the bytes read: of the output, then of the source's tensors. Raises IntegrityError if the manifest
    itself is absent or damaged, and CheckpointError if `src` is not sound; the result lists what is wrong with the
    output.
    """
    started = time.monotonic()
    root = as_path(resharded, "the output to verify")
    manifest = read_manifest(root)
    records = _records(root, manifest)
    source = None if src is None else read_original(src, hub)
    if source is not None and not allow_holes:
        refuse_holes(source)
    if quick and source is not None:
        raise OutputError(f"{root}: a quick check reads no tensors: leave out `quick` to compare with {src}")
    lock = threading.Lock()
    bytes_read = 0

    def report(read: int, unread: int = 0) -> None:
        nonlocal bytes_read
        with lock:
            bytes_read += read
            progress(read + unread)

    routers = None
    with ThreadPoolExecutor(count_workers(workers), thread_name_prefix="reshard") as pool:
        placement = manifest.placement
        by_file = pool.map(lambda record: list(_check_file(root, record, placement, report, quick)), records)
        problems = [problem for of_file in by_file for problem in of_file]
        if not problems:  # after damage, an inconsistency would only be a second line for the same fault
            problems = list(_check_consistency(root, manifest))
        if source is not None and not problems:
            written = LocalFiles(root)
            problems = compare_tensors(source, written, manifest, pool, report) or compare_files(source, manifest)
            if not problems:
                routers = compare_routers(source, root, manifest)
                problems = [*compare_rewritten(root, manifest), *routers.problems]
    digests = [digest for record in records for digest in record.tensors.values()]
    return Verification(
        path=root,
        files=(*(record.summary for record in records), FileSummary(MANIFEST, (root / MANIFEST).stat().st_size)),
        tensors=len(digests),
        unread=len(digests) if quick else digests.count(None),
        size=bytes_read,
        seconds=time.monotonic() - started,
        staged_ranks=None if manifest.staged_ranks is None else tuple(manifest.staged_ranks),
        routers=routers,
        problems=tuple(problems),
    )


def _records(root: Path, manifest: Manifest) -> list[FileRecord]:
    """The files that must be there, and those of ranks that were not staged if they are there."""
    expected = {record.name for record in manifest.expected_files}
    return [record for record in manifest.files if record.name in expected or (root / record.name).exists()]


class _Report(Protocol):
    """Called with the number of bytes read, and of bytes skipped."""

    def __call__(self, read: int, unread: int = 0) -> None: ...


def _check_file(root: Path, record: FileRecord, placement: Placement, report: _Report, quick: bool) -> Iterator[str]:
    """The problems of one file of the output."""
    path = root / record.name
    if not path.is_file():
        yield f"{path}: absent; expected {record.size} bytes"
        return
    status = path.stat()
    if status.st_size != record.size:
        yield f"{path}: {status.st_size} bytes, expected {record.size}"
        return
    files = {record.name: File(record.name, status.st_size, status.st_mtime_ns)}
    try:
        with SourceFiles(root, files).open() as opened:
            if record.tensors:
                yield from _check_weights(root, opened, record, placement, report, quick)
            else:
                yield from _check_bytes(opened, record, report, quick)
    except CheckpointError as error:
        yield str(error)


def _check_bytes(opened: OpenSources, record: FileRecord, report: _Report, quick: bool) -> Iterator[str]:
    if quick and record.size > MAX_SMALL_FILE:
        report(0, record.size)
        return
    whole = blake3()
    for block in opened.blocks(record.name, 0, record.size, _buffer(record.size)):
        whole.update(block)
        report(len(block))
    if whole.hexdigest() != record.digest:
        yield f"{opened.root / record.name}: its bytes are not those that were written"


def _check_weights(
    root: Path, opened: OpenSources, record: FileRecord, placement: Placement, report: _Report, quick: bool
) -> Iterator[str]:
    path = root / record.name
    header = read_header(path)
    report(len(header.raw))
    for name in sorted(record.tensors.keys() ^ {tensor.name for tensor in header.tensors}):
        fault = "missing from this file" if name in record.tensors else "not expected in this file"
        yield f"{path}: tensor {name}: {fault}, according to {MANIFEST}"
    if blake3(header.raw).hexdigest() != record.header:
        other = mixture({record.name: numbering_in(header.metadata)}, placement)
        yield f"{path}: its header is not the one that was written" + (f": {other}" if other else "")
    whole = blake3(header.raw)
    buffer = _buffer(record.size)
    sound = True
    for tensor in header.tensors:
        if quick or record.tensors.get(tensor.name) is None:
            report(0, tensor.size)
            continue
        digest = blake3()
        for block in opened.blocks(record.name, tensor.offset, tensor.size, buffer, tensor.name):
            whole.update(block)
            digest.update(block)
            report(len(block))
        if digest.hexdigest() != record.tensors[tensor.name]:
            sound = False
            yield f"{path}: tensor {tensor.name}: its bytes are not those that were written"
    if sound and not quick and record.digest not in (None, whole.hexdigest()):
        yield f"{path}: its bytes do not match its digest in {MANIFEST}"


def _buffer(size: int) -> memoryview:
    return memoryview(bytearray(min(size, BLOCK_SIZE)))


def _may_be_absent(manifest: Manifest) -> set[str]:
    return {record.name for record in manifest.files} - {record.name for record in manifest.expected_files}


def _check_consistency(root: Path, manifest: Manifest) -> Iterator[str]:
    """Check what digests cannot show: whether the parts of an undamaged output agree."""
    try:
        checkpoint = read_checkpoint(root, absent=_may_be_absent(manifest))
        contract = manifest.parsed_contract(str(root / MANIFEST))
    except CheckpointError as error:
        yield str(error)
        return
    config = checkpoint.config
    if config.get(CONTRACT_KEY) != manifest.contract:
        yield f"{root / CONFIG}: its {CONTRACT_KEY} differs from the routing contract in {MANIFEST}"
    locked = str(config.get("model_type")).startswith("reshard_")
    if manifest.plugin_required != (contract is not None) or locked != manifest.plugin_required:
        yield (
            f"{root / CONFIG}: model type {config.get('model_type')!r:.80}, but according to {MANIFEST} the "
            f"plugin is {'' if manifest.plugin_required else 'not '}required"
        )
    if contract is not None:
        if contract.physical_to_logical != manifest.placement:
            yield f"{root / CONFIG}: the placement in {CONTRACT_KEY} differs from that in {MANIFEST}"
        yield from _check_groups({**config, CONTRACT_KEY: manifest.contract}, contract, str(root / CONFIG))
        yield from _check_gates(root, checkpoint, manifest, contract)
    marked = contract is not None and bool(contract.flattened)
    numberings = {name: numbering_in(header.metadata) for name, header in checkpoint.shards.items()}
    if fault := mixture(numberings, manifest.placement, marked=marked):
        yield f"{root}: {fault}"
    if manifest.routing.group_limited != manifest.plugin_required:
        yield f"{root / MANIFEST}: plugin_required is {manifest.plugin_required}, but its routing says otherwise"
    for name in sorted(checkpoint.files.keys() - {record.name for record in manifest.files} - {MANIFEST}):
        if not is_beside(name):
            yield f"{root / name}: not in {MANIFEST}; an engine might read it: move it away"
    slots = {layer.name: rank_slots(layer.num_experts, manifest.ep_size) for layer in manifest.moe_layers}
    for record in manifest.files:
        for name in record.tensors:
            expert = parse_expert_name(name, slots)
            if expert is None or manifest.layout == "source":
                continue
            if record.rank is None or expert.expert not in slots[expert.layer][record.rank]:
                yield f"{root / record.name}: tensor {name}: not an expert of rank {record.rank}"


def is_beside(name: str) -> bool:
    """Whether a file that no manifest lists may lie in an output: a model card, or what no engine looks at."""
    return name == "README.md" or any(part.startswith(".") for part in name.split("/"))


def _check_gates(root: Path, checkpoint: Checkpoint, manifest: Manifest, contract: Contract) -> Iterator[str]:
    """Check that the contract's flattened tensors are router tensors and flat; version 3 has one in each layer."""
    flattened = {*contract.flattened}
    locked = manifest.contract is not None and manifest.contract["version"] >= FLATTENED_SINCE
    rows = {layer.name: {*layer.rows} for layer in manifest.moe_layers}
    for name in sorted(flattened - {row for of_layer in rows.values() for row in of_layer}):
        yield f"{root / CONFIG}: {CONTRACT_KEY}.flattened names {name}, which is no router tensor in {MANIFEST}"
    for layer, of_layer in rows.items() if locked else ():
        if not of_layer & flattened:
            yield f"{root / CONFIG}: {CONTRACT_KEY}.flattened names no gate of {layer}, so its routing is not locked"
    for name in sorted(flattened & checkpoint.tensors.keys()):
        if len(shape := checkpoint.tensors[name].shape) != 1:
            yield f"{checkpoint.where(checkpoint.tensors[name])}: has shape {list(shape)}, expected one dimension"


def _check_groups(config: Mapping[str, Any], contract: Contract, where: str) -> Iterator[str]:
    """Check the group counts in a locked `config`, and those that the contract puts back in their place."""
    locked = config[CONTRACT_KEY]["version"] > 1
    original = {"n_group": contract.n_group, "topk_group": contract.topk_group}
    found, restored = (routing_section(one, where) for one in (config, unlock_config(config)))
    for key, value in original.items():
        if found.get(key) != (expected := LOCKED_GROUPS if locked else value):
            yield f"{where}: {key} is {found.get(key)!r:.80}, expected {expected!r}"
        if restored.get(key) != value:
            put_back = f"{CONTRACT_KEY}.original makes {key} {restored.get(key)!r:.80}"
            yield f"{where}: {put_back}, but the contract has {value}"
