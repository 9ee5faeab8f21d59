"""Which files at the top of a checkpoint hold its weights, and words for weights that are not where they should be."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from ..errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MIN_COPY = 1 << 20  # bytes; smaller files in other formats hold no model
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
_TRAINING_STATE = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state).*")
_MODELSLIM_INDEX = re.compile(r"quant_model_weights?.*\.safetensors\.index\.json")


def is_weights(name: str) -> bool:
    """Whether the file `name` is a safetensors file at the top of the checkpoint."""
    return name.endswith(".safetensors") and "/" not in name


def is_other_format(name: str) -> bool:
    """Whether the file `name` may hold a model in another format than safetensors."""
    return name.endswith(_OTHER_FORMATS) and not _TRAINING_STATE.match(name)


def refuse_second_copy(root: Path, sizes: Mapping[str, int]) -> None:
    """CheckpointError if the weights are at the top of `root` in another format too; `sizes` has all files."""
    for name, size in sizes.items():
        if "/" not in name and is_other_format(name) and size > MIN_COPY:
            raise CheckpointError(
                f"{root / name}: weights beside the safetensors files; reshard would not renumber their experts, and "
                "an engine might load them instead of the output's weights: move the file away"
            )


def no_index(root: Path, names: Collection[str]) -> CheckpointError:
    """What is wrong with `root`, which holds the files `names` and neither an index nor a single weights file."""
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if is_weights(name)]
    if other := next((name for name in top if name.endswith(".safetensors.index.json")), None):
        whose = "msModelSlim's index" if _MODELSLIM_INDEX.fullmatch(other) else "an index"
        return CheckpointError(
            f"{root / other}: {whose} under another name than {INDEX}, the only one that reshard reads; rename it"
        )
    if len(weights) > 1:
        return CheckpointError(
            f"{root}: {len(weights)} safetensors files ({_some(weights)}) and no index: expected {INDEX}, without "
            "which nobody can tell whether a file is missing; download it, or save the model again with "
            "save_pretrained, which writes one"
        )
    if weights:
        return CheckpointError(f"{root / weights[0]}: no {INDEX}, so expected the weights in {SINGLE}; rename the file")
    if others := [name for name in top if is_other_format(name)]:
        return CheckpointError(
            f"{root}: expected {INDEX} or {SINGLE}, found {_some(others)}: reshard reads safetensors files only; "
            "convert the checkpoint"
        )
    return CheckpointError(f"{root}: expected {INDEX} or {SINGLE}, found no .safetensors file")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + ", …" * (len(names) > 3)
