"""Is an output what its manifest says, and what its source says? Trusts neither the plan nor the copy that made it.

The output is read once: the digest of every file and tensor, its headers, index and config. With the source, `compare`
then holds the source against the same manifest. Every problem found is reported, not only the first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from .checkpoint import CONFIG, read_checkpoint
from .compare import Original, RouterComparison, compare_files, compare_routers, compare_tensors
from .contract import CONTRACT_KEY
from .copy import BLOCK_SIZE, Progress, default_workers
from .errors import CheckpointError
from .header import read_header
from .manifest import MANIFEST, FileRecord, Manifest, read_manifest
from .moe import parse_expert_name, routing_section
from .placement import rank_slots
from .source import find_source


@dataclass(frozen=True, slots=True)
class Verification:
    """What was looked at, and every problem found, a sentence each. `staged_ranks` is None for a whole output."""

    out: Path
    files: int
    tensors: int
    size: int
    seconds: float
    staged_ranks: tuple[int, ...] | None
    routers: RouterComparison | None
    problems: tuple[str, ...]


def verify(
    out: str | Path,
    src: str | Path | None = None,
    *,
    workers: int | None = None,
    progress: Progress = lambda read: None,
) -> Verification:
    """Check the output directory `out` against its manifest, and with `src` against the checkpoint it was made from.

    A staged directory must hold the files of its ranks; of other ranks' files, those that are there are checked too.
    `progress` is told the bytes read: the output's, then the source's tensors. Raises IntegrityError where the manifest
    itself is absent or damaged, and CheckpointError where `src` is not sound; what is wrong with the output is in the
    result.
    """
    started = time.monotonic()
    root = Path(out)
    manifest = read_manifest(root)
    records = _records(root, manifest)
    source = None if src is None else Original.read(find_source(src))
    lock = threading.Lock()

    def report(read: int) -> None:
        with lock:
            progress(read)

    routers = None
    with ThreadPoolExecutor(workers or default_workers(), thread_name_prefix="reshard") as pool:
        by_file = pool.map(lambda record: list(_check_file(root, record, report)), records)
        problems = [problem for of_file in by_file for problem in of_file]
        if not problems:  # the consequences of damage are not worth a second line
            problems = list(_check_consistency(root, manifest))
        if source is not None and not problems:
            problems = compare_tensors(source, root, manifest, pool, report) or compare_files(source, manifest)
            if not problems:
                routers = compare_routers(source, root, manifest)
                problems += routers.problems
    return Verification(
        out=root,
        files=len(records) + 1,
        tensors=sum(len(record.tensors) for record in records),
        size=sum(record.size for record in records),
        seconds=time.monotonic() - started,
        staged_ranks=None if manifest.staged_ranks is None else tuple(manifest.staged_ranks),
        routers=routers,
        problems=tuple(problems),
    )


def _records(root: Path, manifest: Manifest) -> list[FileRecord]:
    """The files that must be there, and what is there all the same of ranks that were not staged."""
    expected = {record.name for record in manifest.expected_files}
    return [record for record in manifest.files if record.name in expected or (root / record.name).exists()]


def _check_file(root: Path, record: FileRecord, progress: Progress) -> Iterator[str]:
    """The problems of one file of the output."""
    path = root / record.name
    if not path.is_file():
        yield f"{path}: absent; expected {record.size} bytes"
        return
    if path.stat().st_size != record.size:
        yield f"{path}: {path.stat().st_size} bytes, expected {record.size}"
        return
    try:
        yield from _check_weights(path, record, progress) if record.tensors else _check_bytes(path, record, progress)
    except CheckpointError as error:
        yield str(error)
    except OSError as error:
        yield f"{path}: cannot be read: {error.strerror}"


def _check_bytes(path: Path, record: FileRecord, progress: Progress) -> Iterator[str]:
    whole = blake3()
    with path.open("rb", buffering=0) as file:
        for block in _blocks(file, record.size, progress):
            whole.update(block)
    if whole.hexdigest() != record.digest:
        yield f"{path}: its bytes are not those that were written"


def _check_weights(path: Path, record: FileRecord, progress: Progress) -> Iterator[str]:
    header = read_header(path)
    for name in sorted(record.tensors.keys() ^ {tensor.name for tensor in header.tensors}):
        expected = "expected" if name in record.tensors else "not expected"
        yield f"{path}: tensor {name}: {expected} in this file by the manifest"
    whole = blake3()
    differs = False
    with path.open("rb", buffering=0) as file:
        for block in _blocks(file, len(header.raw), progress):
            whole.update(block)
        for tensor in header.tensors:
            digest = blake3()
            for block in _blocks(file, tensor.size, progress):
                whole.update(block)
                digest.update(block)
            if digest.hexdigest() != record.tensors.get(tensor.name):
                differs = True
                yield f"{path}: tensor {tensor.name}: its bytes are not those that were written"
    if whole.hexdigest() != record.digest and not differs:
        yield f"{path}: its header is not what was written"


def _blocks(file: BinaryIO, size: int, progress: Progress) -> Iterator[memoryview]:
    """The next `size` bytes of `file`, a block at a time; a block is gone when the next is asked for."""
    buffer = memoryview(bytearray(min(size, BLOCK_SIZE)))
    while size:
        count = file.readinto(buffer[: min(size, BLOCK_SIZE)])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{file.name}: ends {size} bytes too early; did it change?")
        yield buffer[:count]
        progress(count)
        size -= count


def _may_be_absent(manifest: Manifest) -> set[str]:
    return {record.name for record in manifest.files} - {record.name for record in manifest.expected_files}


def _check_consistency(root: Path, manifest: Manifest) -> Iterator[str]:
    """What digests do not say: whether the parts of a sound output fit each other."""
    try:
        checkpoint = read_checkpoint(root, absent=_may_be_absent(manifest))
        contract = manifest.parsed_contract(str(root / MANIFEST))
    except CheckpointError as error:
        yield str(error)
        return
    config = checkpoint.config
    if config.get(CONTRACT_KEY) != manifest.contract:
        yield f"{root / CONFIG}: its {CONTRACT_KEY} is not the routing contract of {MANIFEST}"
    locked = str(config["model_type"]).startswith("reshard_")
    if manifest.plugin_required != (contract is not None) or locked != manifest.plugin_required:
        yield (
            f"{root / CONFIG}: model type {config['model_type']!r:.80}, but by {MANIFEST} the plugin is "
            f"{'' if manifest.plugin_required else 'not '}required"
        )
    if contract is not None:
        if contract.physical_to_logical != manifest.placement:
            yield f"{root / CONFIG}: the placement in {CONTRACT_KEY} is not that of {MANIFEST}"
        asked = routing_section(config, str(root / CONFIG))
        groups = (asked.get("n_group"), asked.get("topk_group"))
        if groups != (contract.n_group, contract.topk_group):
            yield f"{root / CONFIG}: n_group and topk_group are {groups}, in {CONTRACT_KEY} they are others"
    if manifest.routing.group_limited != manifest.plugin_required:
        yield f"{root / MANIFEST}: plugin_required is {manifest.plugin_required}, its routing says otherwise"
    for name in sorted(checkpoint.files.keys() - {record.name for record in manifest.files} - {MANIFEST}):
        if not any(part.startswith(".") for part in name.split("/")):
            yield f"{root / name}: not in {MANIFEST}; an engine might read it: move it away"
    slots = {layer.name: rank_slots(layer.num_experts, manifest.ep_size) for layer in manifest.moe_layers}
    for record in manifest.files:
        for name in record.tensors:
            expert = parse_expert_name(name, slots)
            owned = expert is None or (record.rank is not None and expert.expert in slots[expert.layer][record.rank])
            if not owned:
                yield f"{root / record.name}: tensor {name}: not one of rank {record.rank}'s experts"
