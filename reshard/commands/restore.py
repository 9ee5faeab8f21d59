"""Rebuilds the source from an output, every file byte-identical. The manifest is enough to plan it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3

from ..arguments import as_path
from ..checkpoint.directory import CONFIG, INDEX
from ..checkpoint.files import Files
from ..checkpoint.header import Header, Tensor, parse_header
from ..checkpoint.source import ANY, Hub, find_source
from ..errors import IntegrityError, OutputError, ReshardError
from ..execute.destination import JOURNAL
from ..execute.fetching import sources_of
from ..execute.fill import Progress
from ..execute.ready import refuse_out
from ..execute.reflink import find_sharing
from ..execute.run import Outcome, default_workers, run
from ..model.names import renumber
from ..placement.permutations import describe_ranks, invert
from ..plan.files import (
    Content,
    Digests,
    ExpertIds,
    Literal,
    OutputFile,
    Part,
    Plan,
    Range,
    Rows,
    literal_file,
    whole_file,
)
from ..plan.sharing import Reflink
from ..record.manifest import MANIFEST, FileRecord, FileSummary, Manifest, SourceFile, find_files, manifest_in, unpack
from .compare import compare_files, compare_tensors
from .original import read_original

MIN_BLOCK_SIZE = 512  # bytes; XFS allows blocks as small as this


def restore(
    resharded: str | Path,
    out: str | Path,
    *,
    hub: Hub = ANY,
    reflink: Reflink = "auto",
    restart: bool = False,
    workers: int | None = None,
    progress: Progress = lambda written: None,
) -> Outcome:
    """Rebuild in `out` the source that the output `resharded` was made from: the same files, bytes and sub-folders.

    Checks every byte taken from `resharded` against the manifest's digests, if it has them. Shares disk blocks if the
    file system can and `reflink` allows it. Call it again to resume after an interruption; `restart` starts over. If
    all is done, it is compared with `resharded`, byte by byte, because nothing but its bytes tells what was restored.
    Calls `progress` with the number of bytes just done. Raises IntegrityError if `resharded` is damaged or incomplete,
    and OutputError if `out` is refused or cannot be written.
    """
    started = time.monotonic()
    as_path(resharded, "the output to restore from")
    out = as_path(out, "out, the second argument,")
    source = find_source(resharded, hub)
    root, manifest = source.root, manifest_in(source)
    if manifest.staged_ranks is not None:
        missing = describe_ranks(set(range(manifest.ep_size)) - set(manifest.staged_ranks))
        raise IntegrityError(
            f"{root}: staged: the files of EP ranks {missing} are missing; restore needs the whole output"
        )
    restoration = _Restoration(source, manifest)
    files = [restoration.file(file) for file in manifest.source.files]
    last = [file for name in (INDEX, CONFIG) for file in files if file.name == name]
    plan = Plan(
        source=source,
        source_files=restoration.source_files,
        headers=restoration.headers,
        sharing=find_sharing(root, restoration.headers, manifest.source.directories, out, reflink),
        directories=tuple(manifest.source.directories),
        files=tuple(file for file in files if file not in last),
        last=tuple(file.name for file in last),
    )

    def finish(records: list[FileRecord]) -> Iterable[OutputFile]:
        restoration.check(records)
        return last

    if not restart and _has_all_files(out, manifest):
        _refuse_different(out, source, manifest, workers, progress)
        return Outcome(
            out=out,
            files=tuple(FileSummary(file.name, file.size, file.rank, file.tensors) for file in files),
            size=sum(file.size for file in files),
            shared=0,
            why_not_shared="",
            undigested=0,
            seconds=time.monotonic() - started,
            resumed=len(files),
            already_complete=True,
        )
    refuse_out(plan, out)
    restoration.check_rewritten()
    return run(plan, out, finish, restart=restart, workers=workers, progress=progress)


def _has_all_files(out: Path, manifest: Manifest) -> bool:
    """Whether `out` is no unfinished run, and has every file, of the right size, and folder of the source."""
    if (out / JOURNAL).exists():
        return False
    paths = [(out / file.name, file.size) for file in manifest.source.files]
    folders = [out / folder for folder in manifest.source.directories]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths) and all(
        folder.is_dir() for folder in folders
    )


def _refuse_different(out: Path, resharded: Files, manifest: Manifest, workers: int | None, progress: Progress) -> None:
    """OutputError unless every file in `out` is, byte for byte, the one that the output `resharded` was made from."""
    try:
        source = read_original(out)
        problems = compare_files(source, manifest)
        if not problems:
            with ThreadPoolExecutor(workers or default_workers(), thread_name_prefix="reshard") as pool:
                problems = compare_tensors(source, resharded, manifest, pool, progress)
    except ReshardError as error:
        problems = [str(error)]
    if problems:
        raise OutputError(
            f"{out}: not empty, and not what restore would write: {problems[0]}; choose another --out or empty it"
        )


class _Restoration:
    """Finds each byte of the source in the output `resharded`."""

    def __init__(self, resharded: Files, manifest: Manifest) -> None:
        self._resharded = resharded
        self._root = resharded.root
        self._records = {record.name: record for record in manifest.files}
        self._digests = manifest.digests
        self._to_logical = manifest.placement
        self._to_physical = {layer: invert(order) for layer, order in manifest.placement.items()}
        self._copied = {file.name for file in manifest.source.files if file.header is None and file.content is None}
        self._rows = {name: layer.name for layer in manifest.moe_layers for name in layer.rows}
        self._expert_ids = {name: layer.name for layer in manifest.moe_layers for name in layer.expert_ids}
        self.source_files = find_files(resharded, manifest.files)
        headers = resharded.headers([record.name for record in manifest.files if record.tensors])
        for name, header in headers.items():
            self._check_header(name, header)
        self._tensors = {tensor.name: tensor for header in headers.values() for tensor in header.tensors}
        self.headers = {name: header.raw for name, header in headers.items()}

    def file(self, file: SourceFile) -> OutputFile:
        """The plan of one file of the source."""
        if file.content is not None:
            return literal_file(file.name, unpack(file.content))
        if file.header is None:
            if file.name not in self._records or self._records[file.name].size != file.size:
                raise IntegrityError(f"{self._root / MANIFEST}: no file of the output holds {file.name} of the source")
            return whole_file(file.name, file.size)
        raw = unpack(file.header)
        header = parse_header(raw, file.size, Path(file.name))
        return OutputFile(file.name, (Part(None, Literal(raw)), *map(self._part, header.tensors)))

    def check_rewritten(self) -> None:
        """IntegrityError if a tensor that is reordered, or a copied config.json, differs from what was written.

        `check` cannot find this: reordered bytes have another digest, and config.json is written after it.
        """
        with sources_of(self._resharded, self.source_files).open() as opened:
            for name in (*self._rows, *self._expert_ids):
                tensor = self._find(name)
                found = opened.digest(tensor)
                if self._digests[name] not in (None, found):
                    raise self._damaged(tensor)
            copied = CONFIG in self._copied and CONFIG in self._records
            if copied and opened.digest_file(CONFIG) != self._records[CONFIG].digest:
                raise self._damaged_file(CONFIG)

    def check(self, records: list[FileRecord]) -> None:
        """IntegrityError if copied bytes differ from what was written. `records` describe the restored files."""
        for record in records:
            if record.name in self._copied and record.digest != self._records[record.name].digest:
                raise self._damaged_file(record.name)
            for name, digest in record.tensors.items():
                if name not in self._rows and name not in self._expert_ids:
                    tensor = self._find(renumber(name, self._to_physical))
                    if self._digests[tensor.name] not in (None, digest):
                        raise self._damaged(tensor)

    def _check_header(self, name: str, header: Header) -> None:
        """IntegrityError if an output file's header is another: it alone says which bytes belong to which tensor."""
        if blake3(header.raw).hexdigest() != self._records[name].header:
            raise IntegrityError(f"{self._root / name}: damaged: its header is not the one that was written")

    def _part(self, original: Tensor) -> Part:
        tensor = self._find(renumber(original.name, self._to_physical))
        content = self._content(original, tensor)
        if self._digests[tensor.name] is not None:
            return Part(original.name, content)
        if not _may_be_shared(original, content):
            raise IntegrityError(
                f"{self._root / tensor.file}: tensor {tensor.name}: has no digest, and its place in the file rules out "
                "shared blocks: an older reshard wrote it with --digests none, so restore cannot check it; use the "
                "source, or compare with it by `reshard verify --src`"
            )
        return Part(original.name, content, Digests.COPIED)

    def _content(self, original: Tensor, tensor: Tensor) -> Content:
        name = original.name
        if tensor.size != original.size:
            raise IntegrityError(
                f"{self._root / tensor.file}: tensor {tensor.name}: {tensor.size} bytes, but {name} had {original.size}"
            )
        if name in self._rows:
            return Rows(tensor.file, tensor.offset, tensor.size, self._to_physical[self._rows[name]])
        if name in self._expert_ids:
            order = self._to_logical[self._expert_ids[name]]
            return ExpertIds(tensor.file, tensor.offset, tensor.size, tensor.dtype, order)
        return Range(tensor.file, tensor.offset, tensor.size)

    def _find(self, name: str) -> Tensor:
        if name not in self._tensors or name not in self._digests:
            raise IntegrityError(f"{self._root / MANIFEST}: none of the files that it lists has tensor {name}")
        return self._tensors[name]

    def _damaged_file(self, name: str) -> IntegrityError:
        return IntegrityError(f"{self._root / name}: damaged: its bytes are not those that were written")

    def _damaged(self, tensor: Tensor) -> IntegrityError:
        return IntegrityError(
            f"{self._root / tensor.file}: tensor {tensor.name}: damaged: its bytes are not those that were written"
        )


def _may_be_shared(original: Tensor, content: Content) -> bool:
    """Whether some bytes of the tensor have the same offset in a block of MIN_BLOCK_SIZE as in the source."""
    match content:
        case Range(_, offset, _):
            return (offset - original.offset) % MIN_BLOCK_SIZE == 0
        case Rows(_, offset, size, order):
            row_size = size // len(order)
            moved = ((row - number) * row_size for number, row in enumerate(order))
            return any((offset + distance - original.offset) % MIN_BLOCK_SIZE == 0 for distance in moved)
    return False
