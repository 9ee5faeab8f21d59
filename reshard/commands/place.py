"""From a checkpoint to its output: `plan_placement` decides everything, `write_resharding` carries it out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .._version import __version__
from ..checkpoint.directory import CONFIG, INDEX, Checkpoint, read_checkpoint
from ..checkpoint.source import find_source, identify
from ..errors import CheckpointError, OutputError
from ..execute.reflink import NOTHING_SHARED, Reflink, Sharing, find_sharing
from ..execute.run import Outcome, Progress, run
from ..model.config_ids import map_config_files
from ..model.layers import MoeModel, read_model
from ..placement.contract import (
    CONTRACT_KEY,
    LOCKED_KEYS,
    Contract,
    Placement,
    contract_to_json,
    lock_config,
    placement_to_json,
)
from ..placement.strategies import Strategy, Zigzag, check_placement
from ..plan.extents import shareable
from ..plan.files import Digests, OutputFile, Plan, literal_file, plan_index, whole_file
from ..plan.layouts import as_source, by_rank, why_not_shared
from ..record.manifest import (
    MANIFEST,
    MANIFEST_VERSION,
    FileRecord,
    LayerRecord,
    Layout,
    Manifest,
    Source,
    SourceFile,
    encode_manifest,
    pack,
    record_bytes,
)

DEFAULT_MAX_SHARD_SIZE = 5_000_000_000
_NAME_OF_RANK = re.compile(r"model-ep\d+-of-\d+-")


@dataclass(frozen=True, slots=True)
class Resharding:
    """All that is decided before the first byte is written.

    `index` and `config` are the bytes of the two files that come last; `originals` has the source's bytes of the small
    files that are rewritten.
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


def plan_placement(
    src: str | Path,
    strategy: Strategy,
    out: str | Path,
    *,
    layout: Layout = "ranks",
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    reflink: Reflink = "auto",
    digests: Digests | None = None,
) -> Resharding:
    """Decide how the checkpoint `src` is rewritten into `out`. Reads no weights, writes nothing.

    Parameters:
        src: a checkpoint directory, or the id of a repository in the Hugging Face cache
        strategy: where experts shall live; its ep_size R is 2 to E and need not divide E
        out: absent, empty, or an unfinished run; looked at only to see whether it can share blocks with `src`
        layout: "ranks", files by EP rank; "source", a file for each of the source's
        max_shard_size: bytes of tensors in a file at the most; with layout "source" files are as large as the source's
        reflink: share disk blocks with the source where the file system can; "always": or refuse
        digests: of which bytes; None: of all, with layout "source" of those that are copied

    Raises:
        CheckpointError: the checkpoint is not sound
        UnsupportedError: renumbering its experts is not known to be exact
        OutputError: `strategy`, `max_shard_size` or `reflink` does not fit

    """
    root = find_source(src)
    refuse_resharded(root)
    checkpoint = read_checkpoint(root)
    model = read_model(checkpoint)
    check_ep_size(strategy.ep_size, model.routing.num_experts, root)
    if max_shard_size < 1:
        raise OutputError(f"{root}: --max-shard-size must be at least 1 byte, found {max_shard_size}")
    placed = strategy.place(model, root)
    return plan_resharding(
        checkpoint,
        model,
        strategy.name,
        strategy.ep_size,
        placed.placement,
        notes=placed.notes,
        layout=layout,
        max_shard_size=max_shard_size,
        sharing=find_sharing(root, checkpoint.shards, checkpoint.directories, Path(out), reflink),
        digests=digests or (Digests.COPIED if layout == "source" else Digests.ALL),
    )


def plan_resharding(
    checkpoint: Checkpoint,
    model: MoeModel,
    strategy: str,
    ep_size: int,
    physical_to_logical: Placement,
    *,
    notes: Sequence[str] = (),
    layout: Layout = "ranks",
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    sharing: Sharing = NOTHING_SHARED,
    digests: Digests = Digests.ALL,
) -> Resharding:
    """Decide how `checkpoint` is rewritten for any placement; `physical_to_logical` has [E] for each MoE layer.

    What `notes` say of the placement goes before what is to be known of the output.
    """
    ours = "a model type of reshard" if str(checkpoint.config.get("model_type")).startswith("reshard_") else None
    if mark := CONTRACT_KEY if CONTRACT_KEY in checkpoint.config else ours:
        raise CheckpointError(f"{checkpoint.root / CONFIG}: has {mark}: already resharded; start from the original")
    check_placement(physical_to_logical, model, checkpoint.root)
    contract = None
    if model.routing.group_limited:
        original = {key: checkpoint.config[key] for key in LOCKED_KEYS if key in checkpoint.config}
        routing = model.routing
        contract = Contract(strategy, ep_size, routing.n_group, routing.topk_group, physical_to_logical, original)
    weights, sharing = _weights(
        checkpoint, model, physical_to_logical, ep_size, layout, max_shard_size, sharing, digests
    )
    _refuse_collisions(checkpoint, weights)
    rewritten = _rewritten_configs(checkpoint, model, physical_to_logical, contract)
    rewritten[INDEX] = plan_index(weights, checkpoint.index_metadata)
    copied = [
        literal_file(file.name, rewritten[file.name]) if file.name in rewritten else whole_file(file.name, file.size)
        for file in checkpoint.other_files
        if file.name not in (INDEX, CONFIG)
    ]
    return Resharding(
        checkpoint=checkpoint,
        model=model,
        strategy=strategy,
        layout=layout,
        ep_size=ep_size,
        placement=physical_to_logical,
        contract=contract,
        plan=Plan(
            source=checkpoint.root,
            source_files=checkpoint.files,
            headers={name: header.raw for name, header in checkpoint.shards.items()},
            sharing=sharing,
            directories=checkpoint.directories,
            files=(*weights, *copied),
            last=(MANIFEST, INDEX, CONFIG),
        ),
        index=rewritten[INDEX],
        config=rewritten.get(CONFIG) or (checkpoint.root / CONFIG).read_bytes(),
        originals={name: (checkpoint.root / name).read_bytes() for name in rewritten if name in checkpoint.files},
        notes=(*notes, *_notes(checkpoint, model)),
    )


def place(
    src: str | Path,
    strategy: Strategy,
    out: str | Path,
    *,
    layout: Layout = "ranks",
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    reflink: Reflink = "auto",
    digests: Digests | None = None,
    restart: bool = False,
    workers: int | None = None,
    progress: Progress = lambda written: None,
) -> Outcome:
    """Rewrite the checkpoint `src` into `out` so that linear placement is the one that `strategy` makes.

    Interrupted, the same call takes up where it stopped; with `restart` it begins afresh. `progress` is told the bytes
    that are done, as they are. The other parameters and what is raised are those of `plan_placement`; OutputError also
    where `out` is refused or cannot be written.
    """
    resharding = plan_placement(
        src, strategy, out, layout=layout, max_shard_size=max_shard_size, reflink=reflink, digests=digests
    )
    return write_resharding(resharding, Path(out), restart=restart, workers=workers, progress=progress)


def zigzag(src: str | Path, ep_size: int, out: str | Path, **options: Any) -> Outcome:
    """`place` with experts dealt round-robin to `ep_size` EP ranks."""
    return place(src, Zigzag(ep_size), out, **options)


def write_resharding(
    resharding: Resharding,
    out: Path,
    *,
    restart: bool = False,
    workers: int | None = None,
    progress: Progress = lambda written: None,
) -> Outcome:
    """Carry out `resharding` in `out`: weights and small files, then the manifest, then the index and config.json."""

    def finish(records: list[FileRecord]) -> list[OutputFile]:
        index, config = literal_file(INDEX, resharding.index), literal_file(CONFIG, resharding.config)
        records = [*records, record_bytes(INDEX, resharding.index), record_bytes(CONFIG, resharding.config)]
        return [literal_file(MANIFEST, encode_manifest(_manifest(resharding, records))), index, config]

    return run(resharding.plan, out, finish, restart=restart, workers=workers, progress=progress)


def check_ep_size(ep_size: int, num_experts: int, root: Path) -> None:
    """OutputError unless `num_experts` can be dealt to `ep_size` ranks."""
    if not 2 <= ep_size <= num_experts:
        raise OutputError(f"{root}: --ep must be from 2 to the {num_experts} experts of a layer, found {ep_size}")


def refuse_resharded(root: Path) -> None:
    """CheckpointError where `root` is an output already."""
    if (root / MANIFEST).exists():
        raise CheckpointError(
            f"{root / MANIFEST}: already resharded; start from the original, or `reshard restore` it first"
        )


def _weights(
    checkpoint: Checkpoint,
    model: MoeModel,
    physical_to_logical: Placement,
    ep_size: int,
    layout: Layout,
    max_shard_size: int,
    sharing: Sharing,
    digests: Digests,
) -> tuple[list[OutputFile], Sharing]:
    """The weight files of an output, and whether they share blocks after all."""
    if layout == "source":
        files = as_source(checkpoint, model, physical_to_logical, block_size=sharing.block_size, digests=digests)
        if sharing.required and not any(shareable(file.parts, sharing.block_size) for file in files):
            raise OutputError(f"{checkpoint.root}: --reflink always, but its tensors are too small to share blocks")
        return files, sharing
    cut = partial(
        by_rank, checkpoint, model, physical_to_logical, ep_size, max_shard_size=max_shard_size, digests=digests
    )
    files = cut(block_size=sharing.block_size)
    if sharing.block_size and (why := why_not_shared(files, checkpoint, ep_size, sharing.block_size)):
        if sharing.required:
            raise OutputError(f"{checkpoint.root}: its blocks cannot be shared by rank: {why}; try --layout source")
        return cut(block_size=None), Sharing(None, why)
    return files, sharing


def _rewritten_configs(
    checkpoint: Checkpoint, model: MoeModel, physical_to_logical: Placement, contract: Contract | None
) -> dict[str, bytes]:
    changed = map_config_files(checkpoint, model, physical_to_logical)
    if contract is not None:
        changed[CONFIG] = lock_config(changed.get(CONFIG, checkpoint.config), contract)
    return {name: (json.dumps(value, indent=2) + "\n").encode() for name, value in changed.items()}


def _refuse_collisions(checkpoint: Checkpoint, weights: Sequence[OutputFile]) -> None:
    for file in weights:
        if file.rank is None and _NAME_OF_RANK.match(file.name):
            raise CheckpointError(
                f"{checkpoint.root / file.name}: named like a file of one EP rank, and would be read by that one only; "
                "rename it in the source, or leave out --layout source"
            )
    kept = {file.name for file in checkpoint.other_files}
    for file in weights:
        if file.name in kept:
            raise CheckpointError(f"{checkpoint.root / file.name}: the output has a file of this name; move it away")


def _notes(checkpoint: Checkpoint, model: MoeModel) -> list[str]:
    notes = []
    if not any(layer.experts for layer in model.layers):
        notes.append("its experts are fused into one tensor a layer, so every rank reads all of them: no files by rank")
    other_weights = [
        file.name
        for file in checkpoint.other_files
        if Path(file.name).suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") and file.size > 1 << 20
    ]
    if other_weights:
        notes.append(f"copied as they are, not resharded: {', '.join(other_weights)}")
    return notes


def _manifest(resharding: Resharding, records: list[FileRecord]) -> Manifest:
    checkpoint, model, routing = resharding.checkpoint, resharding.model, resharding.model.routing
    identity = identify(checkpoint.root)
    source = Source(
        path=os.fsencode(checkpoint.root.absolute()).decode(errors="replace"),
        repo_id=identity.repo_id,
        revision=identity.revision,
        files=[_source_file(resharding, name) for name in checkpoint.files],
        directories=list(checkpoint.directories),
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
        digest="",
    )


def _source_file(resharding: Resharding, name: str) -> SourceFile:
    size = resharding.checkpoint.files[name].size
    if name in resharding.checkpoint.shards:
        return SourceFile(name, size, header=pack(resharding.checkpoint.shards[name].raw))
    if name in resharding.originals:
        return SourceFile(name, size, content=pack(resharding.originals[name]))
    return SourceFile(name, size)
