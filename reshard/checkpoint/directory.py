"""Reads a checkpoint directory: index, headers, config, and the names of all other files. Never tensor data.

What it returns has been checked: every shard is a valid safetensors file, and the index and the shards name the same
tensors, each in one file. `model.layers` finds out which tensors belong to which expert.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .files import File as File
from .files import Files, LocalFiles, and_others
from .files import is_left_out as is_left_out
from .header import Header, Tensor
from .lfs import refuse_pointer
from .location import Location
from .weights import INDEX as INDEX
from .weights import indices_among, is_weights, refuse_second_copy, refuse_without_index

CONFIG = "config.json"
MAX_NESTING = 100  # levels of JSON; Python's own limit depends on how deep the caller is
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)  # strings match too: their brackets do not count
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half of a UTF-16 pair: alone, UTF-8 and file names cannot hold it


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The contents of a checkpoint directory. Files are sorted by name, tensors by file and offset.

    `left_out` names what lies in the directory and is no part of the checkpoint: .git and a downloader's records.
    `indices` are the files that say which shard has which tensor: `INDEX`, msModelSlim's, both, or none.
    """

    source: Files
    files: dict[str, File]
    directories: tuple[str, ...]
    left_out: tuple[str, ...]
    shards: dict[str, Header]
    tensors: dict[str, Tensor]
    indices: tuple[str, ...]
    index_metadata: dict[str, Any]
    config: dict[str, Any]

    @property
    def root(self) -> Location:
        """What its files are below."""
        return self.source.root

    @property
    def other_files(self) -> list[File]:
        """Every file that is not a shard, config.json and the index included."""
        return [file for name, file in self.files.items() if name not in self.shards]

    def where(self, tensor: Tensor) -> str:
        """How an error message about `tensor` begins: its file and its name."""
        return f"{self.root / tensor.file}: tensor {tensor.name}"


def read_checkpoint(root: str | Path, absent: Container[str] = ()) -> Checkpoint:
    """Read index, headers and config.json of the checkpoint in `root`; CheckpointError if it is not valid.

    `absent` names shards that may be missing although the index names them; their tensors are then left out.
    """
    return read_files(LocalFiles(Path(root)), absent)


def read_files(source: Files, absent: Container[str] = ()) -> Checkpoint:
    """The same for the checkpoint that consists of the files of `source`."""
    root = source.root
    if isinstance(root, Path) and not root.is_dir():
        fault = "not a directory" if root.exists() else "no such directory"
        raise CheckpointError(f"{root}: {fault}; expected a directory with a Hugging Face checkpoint")
    listing = source.listing()
    files, directories = listing.files, listing.directories
    config = read_json(source, CONFIG)
    weights = [name for name in files if is_weights(name)]
    indices = indices_among(files)
    if INDEX in directories:
        raise CheckpointError(f"{root / INDEX}: is a directory, expected a file; an output needs this name")
    if not indices:
        refuse_without_index(root, files)
    maps = {root / name: _read_index(source, name, weights) for name in indices}
    for path, (weight_map, _) in maps.items():
        missing: dict[str, str] = {}
        for tensor, name in weight_map.items():
            if name not in files and name not in absent:
                missing.setdefault(name, tensor)
        if missing:
            first, *others = missing
            raise CheckpointError(
                f"{path}: tensor {missing[first]}: its file {first} is missing; download it again"
                f"{and_others('missing', others)}"
            )
    shards = source.headers(weights)
    tensors = _by_name(root, shards)
    for path, (weight_map, _) in maps.items():
        _compare(path, {tensor: name for tensor, name in weight_map.items() if name in files}, tensors)
    metadata = next((metadata for _, metadata in maps.values()), {})
    refuse_second_copy(root, {name: file.size for name, file in files.items()})
    return Checkpoint(source, files, directories, listing.left_out, shards, tensors, indices, metadata, config)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file at `path`; CheckpointError if the file is missing or holds anything else."""
    return read_json(LocalFiles(path.parent), path.name)


def read_json(source: Files, name: str) -> dict[str, Any]:
    """The JSON object in the file `name` of `source`; CheckpointError as from `read_json_object`."""
    path = source.root / name
    try:
        data = source.read(name)
        refuse_pointer(data, path)
        refuse_nesting(data, path)
        value = json.loads(data)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; a checkpoint directory must have it") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path}: is a directory, expected a JSON file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_index(source: Files, index_name: str, weights: list[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """The weight_map and the metadata of the index `index_name`, which must name every file of `weights`."""
    path = source.root / index_name
    index = read_json(source, index_name)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: expected a weight_map from tensor names to files, found {weight_map!r:.80}")
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: expected metadata to be an object, found {metadata!r:.80}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not is_weights(name):
            raise CheckpointError(
                f"{path}: tensor {tensor}: expected a .safetensors file in this directory, found {name!r:.80}"
            )
    named = set(weight_map.values())
    for name in weights:
        if name not in named:
            raise CheckpointError(
                f"{path.parent / name}: {path.name} does not name this file; reshard would not renumber its experts, "
                "and an engine might load it instead of the output's weights: move it away or correct the index"
            )
    return weight_map, metadata


def _by_name(root: Location, shards: dict[str, Header]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, header in shards.items():
        for tensor in header.tensors:
            other = tensors.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise CheckpointError(
                    f"{root / name}: tensor {tensor.name}: also in {other.file}; expected it in one file only"
                )
    return tensors


def _compare(path: Location, weight_map: dict[str, str], tensors: dict[str, Tensor]) -> None:
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: tensor {name}: not in {file}, nor in any other file that the index names")
        if tensors[name].file != file:
            raise CheckpointError(f"{path}: tensor {name}: expected in {file}, found in {tensors[name].file}")
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise CheckpointError(f"{path}: does not name tensor {name}, which is in {tensor.file}")


def refuse_nesting(text: bytes, path: Location) -> None:
    """CheckpointError if the JSON `text` is nested deeper than MAX_NESTING levels."""
    if text.count(b"[") + text.count(b"{") <= MAX_NESTING:
        return
    depth = 0
    for token in _BRACKETS.findall(text):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token, 0)
        if depth > MAX_NESTING:
            raise CheckpointError(f"{path}: nested more than {MAX_NESTING} levels deep, which no config needs")
