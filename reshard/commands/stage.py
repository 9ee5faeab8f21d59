"""Copies one node's share of an output: the files of its EP ranks, the files that every rank needs, and small files.

Everything copied is checked against the manifest's digests before the copy becomes loadable. The index still names
every file of the output, so that vLLM without the plugin refuses the copy: it could otherwise run with experts missing.
Only the manifest is rewritten; it says which ranks are here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from blake3 import blake3

from ..arguments import as_path, check_whole
from ..checkpoint.directory import CONFIG, INDEX
from ..checkpoint.files import LocalFiles
from ..checkpoint.header import Header, read_header
from ..errors import IntegrityError, OutputError
from ..execute.fill import Progress
from ..execute.reflink import find_sharing
from ..execute.run import Outcome, run
from ..placement.permutations import describe_ranks
from ..plan.files import Digests, OutputFile, Part, Plan, Range, literal_file, whole_file
from ..plan.sharing import Reflink
from ..record.manifest import MANIFEST, FileRecord, Manifest, encode_manifest, find_files, read_manifest
from .earlier import already_complete, finished_output, names_of, refuse_other


@dataclass(frozen=True, slots=True)
class Staging:
    """All that is decided before the first byte is written.

    `manifest` is that of the copy. It has no `staged_ranks` if no file is left out: the copy is then a whole output
    too. `index` and `config` are the bytes of the two files that are written last.
    """

    manifest: Manifest
    plan: Plan
    index: bytes
    config: bytes
    notes: tuple[str, ...]


def plan_stage(resharded: str | Path, out: str | Path, ranks: Iterable[int], *, reflink: Reflink = "auto") -> Staging:
    """Decide what a node that holds the EP ranks `ranks` of the output `resharded` needs. Reads no weights, writes
    nothing.

    Only checks whether `out` can share blocks with `resharded`. Raises IntegrityError if `resharded` is damaged or
    incomplete, and OutputError if it lacks one of `ranks` or blocks cannot be shared as `reflink` demands.
    """
    root, out = as_path(resharded, "the output to stage"), as_path(out, "out, the second argument,")
    manifest = read_manifest(root)
    wanted = sorted(set(_checked_ranks(root, ranks)))
    _refuse_ranks(root, manifest, wanted)
    records = manifest.files_for(wanted)
    found = find_files(LocalFiles(root), records)
    headers = {record.name: _read_header(root, record) for record in records if record.tensors}
    staged = wanted if len(records) < len(manifest.files) else None
    plan = Plan(
        source=LocalFiles(root),
        source_files=found,
        headers={name: header.raw for name, header in headers.items()},
        sharing=find_sharing(root, headers, manifest.source.directories, out, reflink),
        directories=tuple(manifest.source.directories),
        files=tuple(
            _copy_of(record, headers.get(record.name)) for record in records if record.name not in (INDEX, CONFIG)
        ),
        last=(MANIFEST, INDEX, CONFIG),
    )
    return Staging(
        manifest=msgspec.structs.replace(manifest, staged_ranks=staged),
        plan=plan,
        index=_read_small(root, manifest, INDEX),
        config=_read_small(root, manifest, CONFIG),
        notes=tuple(_notes(manifest, staged)),
    )


def stage(
    resharded: str | Path,
    out: str | Path,
    ranks: Iterable[int],
    *,
    reflink: Reflink = "auto",
    restart: bool = False,
    workers: int | None = None,
    progress: Progress = lambda written: None,
) -> Outcome:
    """Copy to `out` what a node that holds the EP ranks `ranks` of the output `resharded` needs.

    Call it again to resume after an interruption; if all is done, that is checked quickly and said. `restart` starts
    over, also if all is done. Calls `progress` with the number of bytes just done. Shares disk blocks if the file
    system can and `reflink` allows it. `resharded` may itself be staged, if it has `ranks`.

    Raises:
        IntegrityError: `resharded` is damaged or incomplete; `out` then holds nothing loadable
        OutputError: `resharded` lacks one of `ranks`; `out` is refused, has no room, or cannot be written
        CheckpointError: a file of `resharded` cannot be read, or changed while it was read

    """
    staging = plan_stage(resharded, out, ranks, reflink=reflink)
    return write_staging(staging, out, restart=restart, workers=workers, progress=progress)


def write_staging(
    staging: Staging,
    out: str | Path,
    *,
    restart: bool = False,
    workers: int | None = None,
    progress: Progress = lambda written: None,
) -> Outcome:
    """Carry out `staging` in `out`: weights and small files, then the manifest, then the index and config.json."""
    out = Path(out)
    finished = finished_output(out)
    if finished is not None:
        refuse_other(out, finished, staging.manifest)
        if not restart:
            return already_complete(out, finished, workers)

    def finish(copied: list[FileRecord]) -> list[OutputFile]:
        _refuse_damaged(staging, copied)
        manifest = encode_manifest(staging.manifest)
        index, config = literal_file(INDEX, staging.index), literal_file(CONFIG, staging.config)
        return [literal_file(MANIFEST, manifest), index, config]

    replaced = None if finished is None else names_of(finished)
    return run(staging.plan, out, finish, restart=restart, replaced=replaced, workers=workers, progress=progress)


def _checked_ranks(root: Path, ranks: Iterable[int]) -> Iterator[int]:
    for rank in ranks:
        check_whole(rank, f"{root}: each of the ranks to stage", 0)
        yield rank


def _refuse_ranks(root: Path, manifest: Manifest, ranks: Collection[int]) -> None:
    """OutputError if `ranks` is empty, or one of them is not in the output `root`."""
    if not ranks:
        raise OutputError(f"{root}: no ranks to stage; name some of its EP ranks 0-{manifest.ep_size - 1}")
    if absent := set(ranks) - set(range(manifest.ep_size)):
        raise OutputError(
            f"{root}: an output for {manifest.ep_size} EP ranks, 0-{manifest.ep_size - 1}; it has no rank {min(absent)}"
        )
    if manifest.staged_ranks is not None and (absent := set(ranks) - set(manifest.staged_ranks)):
        raise OutputError(
            f"{root}: staged: it holds EP ranks {describe_ranks(manifest.staged_ranks)}, not {describe_ranks(absent)}; "
            "stage these from the whole output"
        )


def _read_header(root: Path, record: FileRecord) -> Header:
    """The header of a file of the output; IntegrityError if it differs from what was written."""
    header = read_header(root / record.name)
    if blake3(header.raw).hexdigest() != record.header:
        raise _damaged(f"{root / record.name}: its header")
    return header


def _read_small(root: Path, manifest: Manifest, name: str) -> bytes:
    """The bytes of the output's small file `name`; IntegrityError if they differ from what was written."""
    digests = {record.name: record.digest for record in manifest.files}
    if name not in digests:
        raise IntegrityError(f"{root / MANIFEST}: does not name {name}; expected an output of `reshard zigzag`")
    data = (root / name).read_bytes()
    if blake3(data).hexdigest() != digests[name]:
        raise _damaged(root / name)
    return data


def _refuse_damaged(staging: Staging, copied: Iterable[FileRecord]) -> None:
    """IntegrityError if a copied byte differs from what was written, as far as the manifest has digests."""
    records = {record.name: record for record in staging.manifest.files}
    for record in copied:
        written = records[record.name]
        path = str(staging.plan.source.root / record.name)
        if written.header != record.header or (not written.tensors and written.digest != record.digest):
            raise _damaged(path)
        for name, digest in record.tensors.items():
            if written.tensors[name] not in (None, digest):
                raise _damaged(f"{path}: tensor {name}")


def _copy_of(record: FileRecord, header: Header | None) -> OutputFile:
    """Plan an unchanged copy of the file: as a whole, or as `header` and tensors if it is a safetensors file."""
    if header is None:
        return replace(whole_file(record.name, record.size), rank=record.rank)
    parts = [Part(None, Range(record.name, 0, len(header.raw)))]
    for tensor in header.tensors:
        if tensor.name not in record.tensors:
            raise _damaged(f"{record.name}: tensor {tensor.name}")
        digests = Digests.COPIED if record.tensors[tensor.name] is None else Digests.ALL
        parts.append(Part(tensor.name, Range(record.name, tensor.offset, tensor.size), digests))
    return OutputFile(record.name, tuple(parts), record.rank)


def _damaged(path: str | Path) -> IntegrityError:
    return IntegrityError(
        f"{path}: damaged: its bytes are not those that were written; replace it, then stage again with --restart"
    )


def _notes(manifest: Manifest, staged: Collection[int] | None) -> list[str]:
    if staged is not None:
        return []
    if manifest.layout == "source":
        why = "this output has the files of the source, not files by rank"
    elif all(record.rank is None for record in manifest.files):
        why = "its experts are fused into one tensor a layer, so every rank reads all of them: no files by rank"
    else:
        why = "these are all of the output's ranks"
    return [f"{why}; the whole output is copied"]
