"""How an original becomes an output: everything is decided here, before the first byte is written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from blake3 import blake3

from .._version import __version__
from ..arguments import check_one_of, check_whole
from ..checkpoint.directory import CONFIG, INDEX, Checkpoint
from ..checkpoint.files import Files
from ..errors import CheckpointError, OutputError
from ..model.config_ids import map_config_files
from ..model.layers import MoeModel
from ..placement.contract import Contract, contract_to_json, lock_config, locked_values, placement_to_json
from ..placement.permutations import Placement
from ..placement.strategies import Placed, check_placement
from ..plan.extents import shareable
from ..plan.files import (
    Digests,
    Literal,
    OutputFile,
    Plan,
    assign_checksums,
    fingerprint,
    literal_file,
    plan_index,
    whole_file,
)
from ..plan.layouts import as_source, by_rank, why_not_shared
from ..plan.sharing import NOTHING_SHARED, Sharing
from ..record.manifest import (
    LAYOUTS,
    MANIFEST,
    MANIFEST_VERSION,
    FileRecord,
    LayerRecord,
    Layout,
    Manifest,
    Source,
    SourceFile,
    pack,
)
from .notes import PARAMS, known_checksums, notes, refuse_adapters
from .original import Original, check_ep_size

DEFAULT_MAX_SHARD_SIZE = 5_000_000_000
_RANK_FILE_NAME = re.compile(r"model-ep\d+-of-\d+-")


@dataclass(frozen=True, slots=True)
class Writing:
    """How an output is written: which files, how large, what is shared with the source, what gets a digest.

    OutputError for a value that is none of these.
    """

    layout: Layout = "ranks"
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE  # bytes of tensors in a file; unused with layout "source"
    sharing: Sharing = NOTHING_SHARED
    digests: Digests = Digests.ALL
    check_source: bool = False  # compare the source with the checksums that it was downloaded by
    ranks: tuple[int, ...] | None = None  # write only what these EP ranks need

    def __post_init__(self) -> None:
        check_one_of(self.layout, LAYOUTS, "--layout")
        check_whole(self.max_shard_size, "--max-shard-size, in bytes,")
        check_one_of(self.digests, Digests, "--digests")
        for rank in self.ranks or ():
            check_whole(rank, "each of --ranks", 0)


@dataclass(frozen=True, slots=True)
class Resharding:
    """All that is decided before the first byte is written.

    `index` and `config` are the bytes of the two files that are written last. `originals` has the source's bytes of
    each small file that is rewritten, of its indices, in whose place the output has `index`, and of `PARAMS`, if that
    would open the lock. `checksums` are those that source files are compared with, {} if the user did not ask for that.
    `plan` is what this run writes: `whole`, or what `ranks` need of it.
    """

    checkpoint: Checkpoint
    model: MoeModel
    strategy: str
    layout: Layout
    ep_size: int
    placement: Placement
    contract: Contract | None
    plan: Plan
    index: bytes
    config: bytes
    originals: Mapping[str, bytes]
    notes: tuple[str, ...]
    checksums: Mapping[str, str]
    whole: Plan
    ranks: tuple[int, ...] | None

    @property
    def fingerprint(self) -> str:
        """Of the whole output, whichever of its ranks are written."""
        return fingerprint(self.whole)

    @property
    def read_first(self) -> int:
        """Bytes of the source files that are compared with their checksums before anything is written."""
        return sum(self.checkpoint.files[name].size for name in self.plan.checksums)

    @property
    def work(self) -> int:
        """Bytes that a run reports as progress."""
        return self.read_first + self.plan.size


def plan_resharding(
    original: Original, strategy: str, ep_size: int, placed: Placed, writing: Writing | None = None, request: str = ""
) -> Resharding:
    """Decide how `original` is rewritten for the placement `placed` on `ep_size` ranks; `strategy` names its maker.

    `request` has the strategy's options if these may give another placement later.

    Raises:
        CheckpointError: the original has files that only an output has, or an adapter for its experts
        UnsupportedError: a config file names experts in a way that cannot be mapped
        OutputError: `placed` or `writing` does not fit

    """
    checkpoint, model, placement = original.checkpoint, original.model, placed.placement
    writing = writing or Writing()
    check_ep_size(ep_size, original)
    check_placement(placement, original.shape)
    contract = None
    if model.routing.group_limited:
        groups = model.routing.n_group, model.routing.topk_group
        contract = Contract(strategy, ep_size, *groups, placement, locked_values(checkpoint.config), model.gates)
    weights, sharing = _weights(original, placement, ep_size, writing)
    ranks = _ranks(original, weights, ep_size, writing)
    _refuse_collisions(checkpoint, weights)
    refuse_adapters(checkpoint)
    rewritten = _rewritten_configs(checkpoint, model, placement, contract)
    rewritten[INDEX] = plan_index(weights, checkpoint.index_metadata)
    withheld = () if contract is None else (PARAMS,)
    replaced = {*rewritten, *checkpoint.indices, *withheld}
    copied = [
        literal_file(file.name, rewritten[file.name]) if file.name in rewritten else whole_file(file.name, file.size)
        for file in checkpoint.other_files
        if file.name not in (*checkpoint.indices, CONFIG, *withheld)
    ]
    checksums = known_checksums(checkpoint) if writing.check_source else {}
    files, read_first = assign_checksums((*weights, *copied), checksums)
    whole = Plan(
        source=checkpoint.source,
        source_files=checkpoint.files,
        headers={name: header.raw for name, header in checkpoint.shards.items()},
        sharing=sharing,
        directories=checkpoint.directories,
        files=files,
        last=(MANIFEST, INDEX, CONFIG),
        checksums=read_first,
        request=request,
        placement=placement if request else None,
    )
    return Resharding(
        checkpoint=checkpoint,
        model=model,
        strategy=strategy,
        layout=writing.layout,
        ep_size=ep_size,
        placement=placement,
        contract=contract,
        plan=_part(whole, ranks),
        index=rewritten[INDEX],
        config=rewritten.get(CONFIG) or checkpoint.source.read(CONFIG),
        originals={name: checkpoint.source.read(name) for name in replaced if name in checkpoint.files},
        notes=(*placed.notes, *notes(checkpoint, model, ep_size), *_why_all_ranks(writing, ranks)),
        checksums=checksums,
        whole=whole,
        ranks=ranks,
    )


def _weights(
    original: Original, placement: Placement, ep_size: int, writing: Writing
) -> tuple[list[OutputFile], Sharing]:
    """The weight files of the output, and which blocks they really share."""
    checkpoint, model, sharing = original.checkpoint, original.model, writing.sharing
    if writing.layout == "source":
        files = as_source(checkpoint, model, placement, block_size=sharing.block_size, digests=writing.digests)
        if sharing.required and not any(shareable(file.parts, sharing.block_size) for file in files):
            raise OutputError(f"{checkpoint.root}: --reflink always, but its tensors are too small to share blocks")
        return files, sharing
    cut = partial(
        by_rank,
        checkpoint,
        model,
        placement,
        ep_size,
        max_shard_size=writing.max_shard_size,
        digests=writing.digests,
    )
    files = cut(block_size=sharing.block_size)
    if sharing.block_size and (why := why_not_shared(files, checkpoint, ep_size, sharing.block_size)):
        if sharing.required:
            raise OutputError(f"{checkpoint.root}: files by rank cannot share its blocks: {why}; try --layout source")
        return cut(block_size=None), Sharing(None, why)
    return files, sharing


def _ranks(original: Original, weights: Sequence[OutputFile], ep_size: int, writing: Writing) -> tuple[int, ...] | None:
    """The EP ranks whose files are written; None if these are all files."""
    if writing.ranks is None:
        return None
    ranks = tuple(sorted(set(writing.ranks)))
    if not ranks or ranks[-1] >= ep_size:
        raise OutputError(f"{original.root}: --ranks must be some of the {ep_size} EP ranks, 0-{ep_size - 1}")
    return None if len(list(_needed_by(weights, ranks))) == len(weights) else ranks


def for_ranks(resharding: Resharding, ranks: tuple[int, ...]) -> Resharding:
    """The same resharding, of which only what the EP ranks `ranks` need is written."""
    left_out = any(file.rank not in (None, *ranks) for file in resharding.whole.files)
    wanted = ranks if left_out else None
    return replace(resharding, plan=_part(resharding.whole, wanted), ranks=wanted)


def _part(whole: Plan, ranks: Collection[int] | None) -> Plan:
    return whole if ranks is None else replace(whole, files=tuple(_needed_by(whole.files, ranks)))


def _needed_by(files: Iterable[OutputFile], ranks: Collection[int]) -> Iterator[OutputFile]:
    return (file for file in files if file.rank is None or file.rank in ranks)


def _why_all_ranks(writing: Writing, ranks: Collection[int] | None) -> Iterator[str]:
    if writing.ranks is not None and ranks is None:
        yield "--ranks leaves nothing out: it names all ranks, or no file is of one rank only; the output is whole"


def _rewritten_configs(
    checkpoint: Checkpoint, model: MoeModel, placement: Placement, contract: Contract | None
) -> dict[str, bytes]:
    changed = map_config_files(checkpoint, model, placement)
    if contract is not None:
        changed[CONFIG] = lock_config(changed.get(CONFIG, checkpoint.config), contract)
    return {name: (json.dumps(value, indent=2) + "\n").encode() for name, value in changed.items()}


def _refuse_collisions(checkpoint: Checkpoint, weights: Sequence[OutputFile]) -> None:
    for file in weights:
        if file.rank is None and _RANK_FILE_NAME.match(file.name):
            raise CheckpointError(
                f"{checkpoint.root / file.name}: named like a file of one EP rank, so only that rank would read it; "
                "rename it in the source, or leave out --layout source"
            )
    kept = {file.name for file in checkpoint.other_files}
    for file in weights:
        if file.name in kept:
            raise CheckpointError(f"{checkpoint.root / file.name}: the output needs this name; move the file away")


def records_of(resharding: Resharding, written: Iterable[FileRecord]) -> list[FileRecord]:
    """The records of all files of the whole output; those that are not among `written` have no digests."""
    records = {record.name: record for record in written}
    return [records.get(file.name) or _unwritten(file) for file in resharding.whole.files]


def _unwritten(file: OutputFile) -> FileRecord:
    header, *tensors = file.parts
    data = header.content.data if isinstance(header.content, Literal) else b""
    names = [part.tensor for part in tensors if part.tensor is not None]
    return FileRecord(
        file.name, file.size, file.rank, None, header=blake3(data).hexdigest(), tensors=dict.fromkeys(names)
    )


def manifest_of(resharding: Resharding, records: list[FileRecord]) -> Manifest:
    """The manifest of an output with the files `records`. Its digest is still empty."""
    checkpoint, model, routing = resharding.checkpoint, resharding.model, resharding.model.routing
    identity = checkpoint.source.identity
    source = Source(
        path=source_text(checkpoint.source),
        repo_id=identity.repo_id,
        revision=identity.revision,
        files=[_source_file(resharding, name) for name in checkpoint.files],
        directories=list(checkpoint.directories),
        left_out=list(checkpoint.left_out),
    )
    layers = [
        LayerRecord(
            name=layer.name,
            num_experts=routing.num_experts,
            rows=[tensor.name for tensor in (*layer.router, *layer.fused)],
            expert_ids=[tensor.name for tensor in layer.expert_ids],
        )
        for layer in model.layers
    ]
    return Manifest(
        version=MANIFEST_VERSION,
        reshard_version=__version__,
        strategy=resharding.strategy,
        layout=resharding.layout,
        ep_size=resharding.ep_size,
        family=model.family.name,
        model_type=model.model_type,
        routing=routing,
        plugin_required=resharding.contract is not None,
        contract=contract_to_json(resharding.contract) if resharding.contract is not None else None,
        physical_to_logical=placement_to_json(resharding.placement),
        moe_layers=layers,
        source=source,
        files=records,
        fingerprint=resharding.fingerprint,
        staged_ranks=None if resharding.ranks is None else list(resharding.ranks),
        digest="",
    )


def source_text(source: Files) -> str:
    """Where the source is, as a manifest has it: repository and commit if these are known, wherever the files lie."""
    identity, root = source.identity, source.root
    if identity.repo_id is not None and identity.revision is not None:
        return f"hf://{identity.repo_id}@{identity.revision}"
    return os.fsencode(root.absolute()).decode(errors="replace") if isinstance(root, Path) else str(root)


def _source_file(resharding: Resharding, name: str) -> SourceFile:
    size = resharding.checkpoint.files[name].size
    if name in resharding.checkpoint.shards:
        return SourceFile(name, size, header=pack(resharding.checkpoint.shards[name].raw))
    if name in resharding.originals:
        return SourceFile(name, size, content=pack(resharding.originals[name]))
    return SourceFile(name, size)
