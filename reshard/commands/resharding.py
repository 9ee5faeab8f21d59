"""How an original becomes an output: from an outline to every byte of it, before the first one is written."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3

from .._version import __version__
from ..checkpoint.directory import CONFIG, INDEX, Checkpoint
from ..checkpoint.files import Files
from ..model.layers import MoeModel
from ..placement.contract import Contract, contract_to_json, placement_to_json
from ..placement.permutations import Placement
from ..placement.strategies import Placed
from ..plan.files import (
    Literal,
    OutputFile,
    Plan,
    assign_checksums,
    fingerprint,
    literal_file,
    plan_index,
    whole_file,
)
from ..plan.layouts import output_files
from ..record.manifest import (
    MANIFEST,
    MANIFEST_VERSION,
    FileRecord,
    FileSummary,
    LayerRecord,
    Layout,
    Manifest,
    Source,
    SourceFile,
    pack,
)
from .original import Original
from .outline import Writing, outline_resharding


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
    def files(self) -> list[FileSummary]:
        """The files of the plan, without those that are written last."""
        return [FileSummary(file.name, file.size, file.rank, file.tensors) for file in self.plan.files]

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
    outline = outline_resharding(original, strategy, ep_size, placed, writing)
    weights = output_files(outline.shards, checkpoint, model, placement, writing.digests)
    # an original that is not rewritten has no place in the output: another index, or what would open the lock
    copied = [
        literal_file(file.name, outline.rewritten[file.name])
        if file.name in outline.rewritten
        else whole_file(file.name, file.size)
        for file in checkpoint.other_files
        if file.name != CONFIG and (file.name in outline.rewritten or file.name not in outline.originals)
    ]
    files, read_first = assign_checksums((*weights, *copied), outline.checksums)
    whole = Plan(
        source=checkpoint.source,
        source_files=checkpoint.files,
        headers={name: header.raw for name, header in checkpoint.shards.items()},
        sharing=outline.sharing,
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
        contract=outline.contract,
        plan=_part(whole, outline.ranks),
        index=plan_index(weights, checkpoint.index_metadata),
        config=outline.config,
        originals=outline.originals,
        notes=outline.notes,
        checksums=outline.checksums,
        whole=whole,
        ranks=outline.ranks,
    )


def for_ranks(resharding: Resharding, ranks: tuple[int, ...]) -> Resharding:
    """The same resharding, of which only what the EP ranks `ranks` need is written."""
    left_out = any(file.rank not in (None, *ranks) for file in resharding.whole.files)
    wanted = ranks if left_out else None
    return replace(resharding, plan=_part(resharding.whole, wanted), ranks=wanted)


def _part(whole: Plan, ranks: Collection[int] | None) -> Plan:
    return whole if ranks is None else replace(whole, files=tuple(_needed_by(whole.files, ranks)))


def _needed_by(files: Iterable[OutputFile], ranks: Collection[int]) -> Iterator[OutputFile]:
    return (file for file in files if file.rank is None or file.rank in ranks)


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
