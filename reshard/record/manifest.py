"""reshard_manifest.json: the record of what was done, enough to verify the output and to restore the source.

The structs below are its format; `manifest.schema.json` is generated from them. The file is written in one canonical
form and ends with a digest of itself, so that a flipped bit in it is found, as in any other file.
"""

from __future__ import annotations

import zlib
from base64 import b64decode, b64encode
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from blake3 import blake3

from ..arguments import refuse_url
from ..checkpoint.directory import MAX_NESTING
from ..checkpoint.files import File, Files, LocalFiles
from ..errors import IntegrityError
from ..model.routing import Routing
from ..placement.contract import Contract, contract_from_json, placement_from_json
from ..placement.permutations import Placement

MANIFEST = "reshard_manifest.json"
MANIFEST_VERSION = 1
JOURNAL = ".reshard-journal"  # there as long as the output is not complete
UNFINISHED = f"an unfinished output of reshard, by its {JOURNAL}; rerun the command that writes it to finish it"
MAX_CONTRACT_NESTING = MAX_NESTING + 8  # a contract holds values of a config

Layout = Literal["ranks", "source"]
"""Output files by EP rank, or one for each file of the source."""

LAYOUTS: tuple[Layout, ...] = get_args(Layout)

Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class SourceFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the source, with the bytes that `restore` cannot take from the output, as base64 of zlib: the `header`
    of a safetensors file, or the whole `content` of a small file that was rewritten. A file with neither was copied
    under its own name.
    """

    name: str
    size: Count
    header: str | None = None
    content: str | None = None


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where the checkpoint came from, and all its files and sub-folders. `left_out` names what was in its directory and
    was not copied: `restore` does not bring it back.
    """

    path: str
    repo_id: str | None
    revision: str | None
    files: list[SourceFile]
    directories: list[str]
    left_out: list[str] = []


class LayerRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A MoE layer: the module that holds its experts, its tensors with a row per expert, those with expert ids."""

    name: str
    num_experts: Positive
    rows: list[str]
    expert_ids: list[str]


@dataclass(frozen=True, slots=True)
class FileSummary:
    """A file as results list it. `size` is in bytes, `rank` the only EP rank that needs it (None if every rank does),
    `tensors` their number.
    """

    name: str
    size: int
    rank: int | None = None
    tensors: int = 0


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the output. `rank` is the only EP rank that needs it, null if every rank does. `digest` is BLAKE3 over
    the whole file. For a safetensors file, `header` is the BLAKE3 of its header (with the length before it), and
    `tensors` has that of each tensor's bytes. A digest is null if some of the bytes were not read: their blocks
    are shared with the source; or the file is of a rank that was not written here; or, in outputs of earlier versions,
    the kernel copied them.
    """

    name: str
    size: Count
    rank: Count | None
    digest: Digest | None
    header: Digest | None = None
    tensors: dict[str, Digest | None] = {}

    @property
    def summary(self) -> FileSummary:
        """It without digests."""
        return FileSummary(self.name, self.size, self.rank, len(self.tensors))


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The whole record. `physical_to_logical` is one list, or one for each MoE layer if layers differ. `fingerprint` is
    the BLAKE3 of the plan, that is of the source's names, sizes, times and headers, and of what goes where: by it
    the same command finds that all is done.
    """

    version: Positive
    reshard_version: str
    strategy: str
    layout: Layout
    ep_size: Positive
    family: str
    model_type: str
    routing: Routing
    plugin_required: bool
    contract: dict[str, Any] | None
    physical_to_logical: list[int] | dict[str, list[int]]
    moe_layers: list[LayerRecord]
    source: Source
    files: list[FileRecord]
    fingerprint: Digest | None = None  # absent in outputs of older versions
    staged_ranks: list[Count] | None = None  # in the file only if `stage` left out the files of other ranks
    digest: Digest  # no default: `omit_defaults` would leave that out

    @property
    def expected_files(self) -> list[FileRecord]:
        """The files that the directory must hold: all, or for its ranks only if it was staged."""
        return self.files if self.staged_ranks is None else self.files_for(self.staged_ranks)

    def files_for(self, ranks: Container[int]) -> list[FileRecord]:
        """The files that a node which holds the EP ranks `ranks` needs."""
        return [record for record in self.files if record.rank is None or record.rank in ranks]

    @property
    def placement(self) -> Placement:
        """physical_to_logical [E] of each MoE layer."""
        return placement_from_json(self.physical_to_logical, [layer.name for layer in self.moe_layers], MANIFEST)

    @property
    def digests(self) -> dict[str, str | None]:
        """The digest of each tensor of the output, by its name there; None if it was not computed."""
        return {name: digest for record in self.files for name, digest in record.tensors.items()}

    def parsed_contract(self, where: str) -> Contract | None:
        """The routing contract; None for a model that needs none."""
        return contract_from_json(self.contract, where) if self.contract is not None else None


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of the file: `manifest` with its digest filled in."""
    digest = blake3(_canonical(msgspec.structs.replace(manifest, digest=""))).hexdigest()
    return _canonical(msgspec.structs.replace(manifest, digest=digest))


def read_manifest(root: str | Path) -> Manifest:
    """The manifest of the output directory `root`; IntegrityError if there is none or it is damaged."""
    root = Path(root)
    refuse_url(root, IntegrityError)
    return manifest_in(LocalFiles(root))


def manifest_in(source: Files) -> Manifest:
    """The same for an output that consists of the files of `source`."""
    root = source.root
    path = root / MANIFEST
    try:
        data = source.read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        if source.has(JOURNAL):
            raise IntegrityError(f"{root}: {UNFINISHED}") from error
        raise IntegrityError(f"{path}: no such file; expected an output of `reshard zigzag`") from error
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        version = msgspec.json.decode(data, type=dict[str, Any]).get("version")
        if version != MANIFEST_VERSION:
            raise IntegrityError(
                f"{path}: version {version!r:.80}, this reshard reads version {MANIFEST_VERSION}; upgrade reshard"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path}: damaged: {error}") from error
    if _is_deep(manifest.contract):
        raise IntegrityError(f"{path}: damaged: its contract is nested more than {MAX_CONTRACT_NESTING} deep")
    if encode_manifest(manifest) != data:
        raise IntegrityError(f"{path}: damaged: its content does not match the digest at its end")
    if wrong := _inconsistency(manifest):
        raise IntegrityError(f"{path}: {wrong}")
    return manifest


def _is_deep(contract: Any) -> bool:
    """Whether `contract` is nested deeper than any that reshard writes; found without recursion."""
    level = [contract]
    for _ in range(MAX_CONTRACT_NESTING):
        inner = (
            value.values() if isinstance(value, dict) else value for value in level if isinstance(value, dict | list)
        )
        level = [value for values in inner for value in values]
    return bool(level)


def _inconsistency(manifest: Manifest) -> str | None:
    """What is inconsistent in a manifest that reshard did not write, in words; None if nothing is."""
    placement = manifest.placement if manifest.moe_layers else {}  # parsed once: the property parses all layers
    for layer in manifest.moe_layers:
        placed = len(placement[layer.name])
        if placed != layer.num_experts:
            return f"{layer.name} has {layer.num_experts} experts, but its placement has {placed}"
        if manifest.ep_size > layer.num_experts:
            return f"ep_size is {manifest.ep_size}, but {layer.name} has {layer.num_experts} experts"
    for record in manifest.files:
        if record.rank is not None and record.rank >= manifest.ep_size:
            return f"{record.name} is of rank {record.rank}, but there are {manifest.ep_size} ranks"
    if (staged := manifest.staged_ranks) is not None:
        in_order = staged == sorted(set(staged))
        if not staged or not in_order or staged[-1] >= manifest.ep_size:
            return f"staged_ranks is {staged!r:.80}, expected some of the {manifest.ep_size} ranks in ascending order"
    names = [*manifest.source.directories, *(file.name for file in manifest.source.files)]
    names += [record.name for record in manifest.files]
    for name in names:
        if not is_inside(name):
            return f"{name!r:.80} is not a path inside a directory"
    return None


def is_inside(name: str) -> bool:
    """Whether the relative path `name` stays inside the directory that it is joined to."""
    return bool(name) and "\0" not in name and all(part not in ("", ".", "..") for part in name.split("/"))


def find_files(source: Files, records: Iterable[FileRecord]) -> dict[str, File]:
    """The files of `records` in the output `source`, by name; IntegrityError if one is missing or of another size."""
    found = {}
    for record in records:
        path = source.root / record.name
        file = source.find(record.name)
        if file is None:
            raise IntegrityError(f"{path}: missing; expected {record.size} bytes: copy it here from the whole output")
        if file.size != record.size:
            raise IntegrityError(f"{path}: damaged: {file.size} bytes, expected {record.size}")
        found[record.name] = file
    return found


def record_bytes(name: str, data: bytes) -> FileRecord:
    """The record of a small file that every rank needs."""
    return FileRecord(name, len(data), None, blake3(data).hexdigest())


def pack(data: bytes) -> str:
    """Compress `data` into the text that `SourceFile` keeps."""
    return b64encode(zlib.compress(data, 9)).decode()


def unpack(saved: str) -> bytes:
    """The inverse of `pack`; IntegrityError if `saved` is damaged."""
    try:
        return zlib.decompress(b64decode(saved, validate=True))
    except (ValueError, zlib.error) as error:
        raise IntegrityError(
            f"{MANIFEST}: damaged: the saved bytes of a source file cannot be unpacked: {error}"
        ) from error


def manifest_schema() -> dict[str, Any]:
    """The JSON schema of the file."""
    schema = msgspec.json.schema(Manifest)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": MANIFEST, **schema}


def _canonical(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
