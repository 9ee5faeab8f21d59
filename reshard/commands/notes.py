"""What the user should know before a source is copied: what is left out, what is not resharded, what is checked."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.directory import INDEX, Checkpoint, File
from ..checkpoint.files import Files
from ..checkpoint.lfs import MAX_POINTER_SIZE, is_pointer
from ..checkpoint.source import find_checksums
from ..checkpoint.weights import MIN_COPY, SINGLE, is_other_format
from ..errors import CheckpointError
from ..model.layers import MoeModel

PARAMS = "params.json"  # a config in Mistral's form; vLLM reads it with --config-format mistral
ADAPTER_CONFIG = "adapter_config.json"  # of PEFT, beside an adapter's weights


def notes(checkpoint: Checkpoint, model: MoeModel, ep_size: int) -> list[str]:
    """What the user should know of the source and its output for `ep_size` EP ranks."""
    found = []
    num_experts = model.routing.num_experts
    if model.family.even_ranks and num_experts % ep_size:
        found.append(
            f"vLLM's MegaMoE kernels need as many experts on every rank, and {num_experts} experts cannot be dealt "
            f"evenly to {ep_size}: choose another --ep, or serve the output without these kernels"
        )
    if checkpoint.left_out:
        found.append(f"left out, and not brought back by restore: {', '.join(checkpoint.left_out)}")
    for index in checkpoint.indices:
        if index != INDEX:
            found.append(f"{index} is not in the output, whose index is {INDEX}; restore brings it back")
    if model.routing.group_limited and PARAMS in checkpoint.files:
        found.append(
            f"{PARAMS} is not in the output: it has the original's expert groups, and an engine that reads it in the "
            "place of config.json would choose other experts; restore brings it back"
        )
    if not checkpoint.indices and checkpoint.shards.keys() != {SINGLE}:
        found.append(
            f"no index: its {len(checkpoint.shards)} safetensors files are taken as the whole model, as vLLM takes "
            "them; nobody can tell whether one is missing"
        )
    pointers = [file.name for file in checkpoint.other_files if _is_pointer(checkpoint.source, file)]
    if pointers:
        found.append(f"copied unchanged, but only Git LFS pointers: {', '.join(pointers)}; run `git lfs pull`")
    if not any(layer.experts for layer in model.layers):
        found.append("its experts are fused into one tensor a layer, so every rank reads all of them: no files by rank")
    if not model.routing.group_limited:
        found.append(
            "LoRA adapters of experts or routers, and weights that a running server is given, have the original's "
            "expert ids: an engine without reshard's plugin applies them to other experts, with no error"
        )
    adapters = [file.name.rpartition("/")[0] for file in checkpoint.other_files if _is_adapter(file)]
    if adapters:
        found.append(
            f"LoRA adapters, copied unchanged: {', '.join(f'{folder}/' for folder in adapters)}; those that change "
            "routers are for the original only"
        )
    other_weights = [
        file.name
        for file in checkpoint.other_files
        if (file.name.endswith(".safetensors") or is_other_format(file.name))
        and file.size > MIN_COPY
        and file.name.rpartition("/")[0] not in adapters
    ]
    if other_weights:
        found.append(f"copied unchanged, not resharded: {', '.join(other_weights)}")
    return found


def _is_adapter(file: File) -> bool:
    return file.name.rpartition("/")[2] == ADAPTER_CONFIG


def _is_pointer(source: Files, file: File) -> bool:
    return file.size <= MAX_POINTER_SIZE and is_pointer(source.read(file.name))


def refuse_adapters(checkpoint: Checkpoint) -> None:
    """CheckpointError if a sub-folder has an adapter for experts: it names them by the original's ids."""
    for file in checkpoint.other_files:
        folder, _, _ = file.name.rpartition("/")
        if not file.name.endswith(".safetensors") or f"{folder}/{ADAPTER_CONFIG}" not in checkpoint.files:
            continue
        path = checkpoint.root / file.name
        for tensor in checkpoint.source.headers([file.name])[file.name].tensors:
            if ".experts." in tensor.name:
                raise CheckpointError(
                    f"{path}: tensor {tensor.name}: an adapter for experts by the original's ids, which are other "
                    "experts in the output; move the adapter away, and use it with the original"
                )


def known_checksums(checkpoint: Checkpoint) -> dict[str, str]:
    """The checksums that the source was downloaded by; CheckpointError if its weights have none."""
    if not isinstance(checkpoint.root, Path):
        raise CheckpointError(
            f"{checkpoint.root}: --check-source compares files with the checksums that they were downloaded by, and "
            "these are not downloaded: add --download"
        )
    found = find_checksums(checkpoint.root, checkpoint.files)
    if not found.keys() & checkpoint.shards.keys():
        raise CheckpointError(
            f"{checkpoint.root}: --check-source: no checksums of its weights: expected a snapshot in the Hugging Face "
            "cache, or a folder that `hf download --local-dir` made"
        )
    return found
