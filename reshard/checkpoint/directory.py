"""A checkpoint directory as it lies on disk: index, headers, config and everything else. Never tensor data.

What this module returns is sound: every shard obeys safetensors' rule, the index and the shards name the same tensors,
each in one file. Which tensor is which expert's is `moe`'s business.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .header import Header, Tensor, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
MAX_NESTING = 100  # of JSON; where Python gives up depends on who asks it
_BRACKETS = re.compile(rb'"(?:[^"\\\\]|\\\\.)*"|[\[\]{}]', re.DOTALL)  # and strings, whose brackets are text
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half a character: no file name or UTF-8 text can hold one alone


@dataclass(frozen=True, slots=True)
class File:
    """A file of the checkpoint, by its path relative to the directory, as it was when the checkpoint was read."""

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint directory holds. Files are sorted by name, tensors by file and offset."""

    root: Path
    files: dict[str, File]
    directories: tuple[str, ...]
    shards: dict[str, Header]
    tensors: dict[str, Tensor]
    index_metadata: dict[str, Any]
    config: dict[str, Any]

    @property
    def other_files(self) -> list[File]:
        """Every file that is not a shard: config.json and the index among them."""
        return [file for name, file in self.files.items() if name not in self.shards]

    def where(self, tensor: Tensor) -> str:
        """The beginning of a message about `tensor`: its file and its name."""
        return f"{self.root / tensor.file}: tensor {tensor.name}"


def read_checkpoint(root: Path, absent: Container[str] = ()) -> Checkpoint:
    """Read index, headers and config.json of the checkpoint in `root`; CheckpointError where it is not sound.

    Files in `absent` may be named by the index and not be there; their tensors are then left out.
    """
    if not root.is_dir():
        fault = "not a directory" if root.exists() else "no such directory"
        raise CheckpointError(f"{root}: {fault}; expected a directory with a Hugging Face checkpoint")
    files, directories = _walk(root)
    config = read_json_object(root / CONFIG)
    weights = [name for name in files if _is_weights(name)]
    if INDEX in files:
        weight_map, index_metadata = _read_index(root, weights)
        weight_map = {tensor: name for tensor, name in weight_map.items() if name in files or name not in absent}
        if missing := next(((tensor, name) for tensor, name in weight_map.items() if name not in files), None):
            tensor, name = missing
            raise CheckpointError(f"{root / INDEX}: tensor {tensor}: its file {name} is absent; download it again")
        shards = {name: read_header(root / name) for name in weights}
        tensors = _by_name(root, shards)
        _compare(root / INDEX, weight_map, tensors)
    elif weights == [SINGLE]:
        index_metadata = {}
        shards = {SINGLE: read_header(root / SINGLE)}
        tensors = _by_name(root, shards)
    else:
        found = ", ".join(weights[:3]) + ", …" * (len(weights) > 3) if weights else "no .safetensors file"
        raise CheckpointError(f"{root}: no {INDEX}, so expected {SINGLE} and no other weights, found {found}")
    return Checkpoint(root, files, directories, shards, tensors, index_metadata, config)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file at `path`; CheckpointError where the file is absent or holds anything else."""
    try:
        data = path.read_bytes()
        refuse_nesting(data, path)
        value = json.loads(data)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; a checkpoint directory must have it") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path}: a directory, expected a JSON file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not sound JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _walk(root: Path) -> tuple[dict[str, File], tuple[str, ...]]:
    files: dict[str, File] = {}
    directories: list[str] = []
    for name, status in _entries(root):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(f"{root}: file name {name!a} is not valid UTF-8; rename it") from error
        if stat.S_ISDIR(status.st_mode):
            directories.append(name)
        elif stat.S_ISREG(status.st_mode):
            files[name] = File(name, status.st_size, status.st_mtime_ns)
        else:
            raise CheckpointError(f"{root / name}: neither a file nor a directory; move it out of the checkpoint")
    return dict(sorted(files.items())), tuple(sorted(directories))


def _entries(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    waiting: list[tuple[str, tuple[os.stat_result, ...]]] = [("", (root.stat(),))]
    while waiting:
        below, parents = waiting.pop()
        with os.scandir(root / below) as listing:
            names = [f"{below}{entry.name}" for entry in listing]
        for name in names:
            try:
                status = (root / name).stat()  # follows links: a Hugging Face cache is made of them
            except OSError as error:
                raise CheckpointError(f"{root / name}: cannot be read ({error.strerror}); a dangling link?") from error
            yield name, status
            if stat.S_ISDIR(status.st_mode):
                if any(os.path.samestat(status, parent) for parent in parents):
                    raise CheckpointError(f"{root / name}: a link to a directory that it lies in; remove it")
                waiting.append((f"{name}/", (*parents, status)))


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name


def _read_index(root: Path, weights: list[str]) -> tuple[dict[str, str], dict[str, Any]]:
    path = root / INDEX
    index = read_json_object(path)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: expected a weight_map from tensor names to files, found {weight_map!r:.80}")
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: expected metadata to be an object, found {metadata!r:.80}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_weights(name):
            raise CheckpointError(
                f"{path}: tensor {tensor}: expected a .safetensors file in this directory, found {name!r:.80}"
            )
    named = set(weight_map.values())
    for name in weights:
        if name not in named:
            raise CheckpointError(
                f"{root / name}: {INDEX} does not name this file; weights that stay as they are must not lie beside "
                "resharded ones, some engine may prefer them: move it away or mend the index"
            )
    return weight_map, metadata


def _by_name(root: Path, shards: dict[str, Header]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, header in shards.items():
        for tensor in header.tensors:
            other = tensors.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise CheckpointError(
                    f"{root / name}: tensor {tensor.name}: also in {other.file}; expected it in one file"
                )
    return tensors


def _compare(path: Path, weight_map: dict[str, str], tensors: dict[str, Tensor]) -> None:
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: tensor {name}: not in {file}, nor in any other file that the index names")
        if tensors[name].file != file:
            raise CheckpointError(f"{path}: tensor {name}: expected in {file}, found in {tensors[name].file}")
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise CheckpointError(f"{path}: leaves out tensor {name}, which is in {tensor.file}")


def refuse_nesting(text: bytes, path: Path) -> None:
    """CheckpointError where the JSON `text` is nested deeper than any config."""
    if text.count(b"[") + text.count(b"{") <= MAX_NESTING:
        return
    depth = 0
    for token in _BRACKETS.findall(text):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token, 0)
        if depth > MAX_NESTING:
            raise CheckpointError(f"{path}: nested more than {MAX_NESTING} deep, too deeply to be a config")
