"""Which files at the top of a checkpoint hold its weights, and words for weights that are not where they should be.

vLLM reads `model.safetensors.index.json` or, without it, every safetensors file at the top. msModelSlim's checkpoints
have an index of another name, and vLLM loads them that second way.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from ..errors import CheckpointError
from .location import Location

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MIN_COPY = 1 << 20  # bytes; smaller files in other formats hold no model
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
_TRAINING_STATE = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state).*")
_MODELSLIM_INDEX = re.compile(r"quant_model_weights?(_[^/]*)?\.safetensors\.index\.json")
_NUMBERED = re.compile(r"(?P<before>.*)-(?P<number>[0-9]{1,9})-of-(?P<total>[0-9]{1,9})(?P<after>.*)")


def is_weights(name: str) -> bool:
    """Whether the file `name` is a safetensors file at the top of the checkpoint."""
    return name.endswith(".safetensors") and "/" not in name


def indices_among(names: Iterable[str]) -> tuple[str, ...]:
    """The files of `names` that say which file has which tensor: `INDEX`, and msModelSlim's."""
    return tuple(name for name in names if name == INDEX or _MODELSLIM_INDEX.fullmatch(name))


def is_other_format(name: str) -> bool:
    """Whether the file `name` may hold a model in another format than safetensors."""
    return name.endswith(_OTHER_FORMATS) and not _TRAINING_STATE.match(name)


def refuse_second_copy(root: Location, sizes: Mapping[str, int]) -> None:
    """CheckpointError if the weights are at the top of `root` in another format too; `sizes` has all files."""
    for name, size in sizes.items():
        if "/" not in name and is_other_format(name) and size > MIN_COPY:
            raise CheckpointError(
                f"{root / name}: weights beside the safetensors files; reshard would not renumber their experts, and "
                "an engine might load them instead of the output's weights: move the file away"
            )


def refuse_without_index(root: Location, names: Collection[str]) -> None:
    """CheckpointError if the files `names` in `root`, none of which is an index, are no whole checkpoint.

    Without an index, an engine loads every safetensors file at the top.
    """
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if is_weights(name)]
    if other := next((name for name in top if name.endswith(".safetensors.index.json")), None):
        raise CheckpointError(
            f"{root / other}: an index under another name than {INDEX}, which engines do not read; rename it"
        )
    if missing := _missing_shard(weights):
        raise CheckpointError(
            f"{root}: no {INDEX}, and by the names of its {len(weights)} safetensors files ({_some(weights)}) "
            f"{missing} is missing; download it again"
        )
    if not weights:
        others = [name for name in top if is_other_format(name)]
        raise CheckpointError(
            f"{root}: expected {INDEX} or {SINGLE}, found "
            + (
                f"{_some(others)}: reshard reads safetensors files only; convert it"
                if others
                else "no .safetensors file"
            )
        )


def _missing_shard(weights: list[str]) -> str | None:
    """What is missing of files that are numbered `…-00001-of-00005…`, from 0 or 1 on, in words; None if nothing is."""
    found: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for name in weights:
        if match := _NUMBERED.fullmatch(name):
            found[match["before"], match["total"], match["after"]].add(int(match["number"]))
    for (before, total, after), numbers in found.items():
        first = 0 if 0 in numbers else 1
        if missing := next((n for n in range(first, first + int(total)) if n not in numbers), None):
            return f"{before}-{missing:0{len(total)}}-of-{total}{after}"
    return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + ", …" * (len(names) > 3)
