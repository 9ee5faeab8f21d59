"""Build DeepSeek-R1 from its published layout: the whole model as sparse files, or one layer in bytes.

`fill_routers` gives the sparse model's routers values. Names, shapes, dtypes and config are R1's
(tests/facts/deepseek-r1-layout.json); the values are random or zero. This module writes safetensors itself, so that it
does not depend on the code that is measured.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FACTS = json.loads((Path(__file__).parents[1] / "tests" / "facts" / "deepseek-r1-layout.json").read_text())
DTYPE_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
FILES = FACTS["files"]


@dataclass(frozen=True)
class Tensor:
    """A tensor in the layout."""

    name: str
    dtype: str
    shape: list[int]

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def layer(self) -> int | None:
        """The number of its layer; None for embeddings, head and final norm."""
        found = re.match(r"model\.layers\.(\d+)\.", self.name)
        return int(found[1]) if found else None


def tensors() -> list[Tensor]:
    """All 91,991 tensors, in layer order."""
    found = [
        Tensor(name, entry["dtype"], entry["shape"]) for entry in FACTS["tensors"] for name in _expand(entry["name"])
    ]
    if len(found) != FACTS["tensors_total"] or sum(tensor.size for tensor in found) != FACTS["bytes_total"]:
        raise ValueError("the layout does not add up")
    first = {"model.embed_tokens.weight": -1}
    return sorted(found, key=lambda tensor: first.get(tensor.name, 1000 if tensor.layer is None else tensor.layer))


def build_sparse(directory: Path) -> None:
    """Write the whole model as 163 files with real headers and holes for data: 641 GiB that use almost no disk."""
    directory.mkdir(parents=True)
    everything = tensors()
    mtp = FACTS["config"]["num_hidden_layers"]
    head = [tensor for tensor in everything if tensor.layer is None and "embed" not in tensor.name]
    body = [tensor for tensor in everything if tensor.layer != mtp and tensor not in head]
    shards = _split(body, FILES - 1)
    shards[FACTS["first_files"]["lm_head, model.norm"] - 1] += head
    shards.append([tensor for tensor in everything if tensor.layer == mtp])
    names = [f"model-{number:05}-of-{FILES:06}.safetensors" for number in range(1, FILES + 1)]
    for name, shard in zip(names, shards, strict=True):
        header = _header(shard)
        with (directory / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(tensor.size for tensor in shard))
    _write_rest(directory, dict(zip(names, shards, strict=True)))


def fill_routers(directory: Path, likeness: float = 0.0, favour: float = 0.0) -> None:
    """Write random values into the routers that `build_sparse` wrote in `directory`: 217 MB.

    With `likeness` 0 and `favour` 0, all experts are equally likely to be chosen.

    Parameters:
        likeness: 0 to 1, the share of a router's row that the experts of a group have in common; it makes tokens choose
            them together
        favour: standard deviation of the correction biases, in scores of 0 to 1, half of it by group; it makes tokens
            choose some experts more often
    """
    import torch

    groups = FACTS["config"]["n_group"]
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    for number, tensor in enumerate(found for found in tensors() if ".mlp.gate." in found.name):
        generator = torch.Generator().manual_seed(number)
        common, own = (
            torch.randn(groups, 1, *tensor.shape[1:], generator=generator),
            torch.randn(groups, tensor.shape[0] // groups, *tensor.shape[1:], generator=generator),
        )
        if len(tensor.shape) == 2:
            values = (likeness**0.5 * common + (1 - likeness) ** 0.5 * own) / tensor.shape[1] ** 0.5
        else:
            values = favour * 0.5**0.5 * (common + own)
        dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[tensor.dtype]
        data = values.reshape(tensor.shape).to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
        with (directory / index[tensor.name]).open("r+b") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            start = json.loads(file.read(length))[tensor.name]["data_offsets"][0]
            file.seek(8 + length + start)
            file.write(data)


def build_layer(directory: Path, layer: int = 3, files: int = 3) -> None:
    """Write one MoE layer at full size with random bytes in `files` files: 11.3 GB."""
    import torch

    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(layer)
    shards = _split([tensor for tensor in tensors() if tensor.layer == layer], files)
    _write_shards(directory, shards, generator)


def build_like(directory: Path, layers: int, hidden: int, width: int, files: int) -> None:
    """Write `layers` MoE layers with R1's names and dtypes, narrower hidden states and experts, and random bytes."""
    import torch

    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    narrowed = {7168: hidden, 2048: width, 56: max(1, hidden // 128), 16: max(1, width // 128)}
    of_layer = [tensor for tensor in tensors() if tensor.layer == 3]
    found = [
        Tensor(
            tensor.name.replace(".3.", f".{3 + number}.", 1),
            tensor.dtype,
            [narrowed.get(length, length) for length in tensor.shape],
        )
        for number in range(layers)
        for tensor in of_layer
        if ".self_attn." not in tensor.name
    ]
    _write_shards(directory, _split(found, files), generator)


def _write_shards(directory: Path, shards: list[list[Tensor]], generator: torch.Generator) -> None:
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        with (directory / name).open("wb") as file:
            file.write(_header(shard))
            for tensor in shard:
                file.write(_random_bytes(tensor, generator))
    _write_rest(directory, dict(zip(names, shards, strict=True)))


def _random_bytes(tensor: Tensor, generator: torch.Generator) -> bytearray:
    import torch

    data = bytearray(tensor.size)
    if tensor.dtype == "F8_E4M3" and tensor.size % 8 == 0:
        torch.frombuffer(data, dtype=torch.int64).random_(generator=generator)
    else:  # tests and benchmarks compute with routers, so these must be finite numbers
        dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[tensor.dtype]
        torch.frombuffer(data, dtype=dtype).normal_(generator=generator)
    return data


def _expand(pattern: str) -> Iterator[str]:
    """Expand `a.{0..2}.b` to a.0.b, a.1.b, a.2.b."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        yield pattern
        return
    for number in range(int(found[1]), int(found[2]) + 1):
        yield from _expand(pattern[: found.start()] + str(number) + pattern[found.end() :])


def _split(found: list[Tensor], files: int) -> list[list[Tensor]]:
    """Split consecutive tensors into `files` shards of about equal size."""
    total = sum(tensor.size for tensor in found)
    shards: list[list[Tensor]] = [[] for _ in range(files)]
    written = 0
    for tensor in found:
        shards[min(files - 1, written * files // total)].append(tensor)
        written += tensor.size
    return shards


def _header(shard: Iterable[Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [end, end + tensor.size],
        }
        end += tensor.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_rest(directory: Path, shards: dict[str, list[Tensor]]) -> None:
    weight_map = {tensor.name: name for name, shard in shards.items() for tensor in shard}
    total = sum(tensor.size for shard in shards.values() for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (directory / "config.json").write_text(json.dumps(FACTS["config"], indent=2))
