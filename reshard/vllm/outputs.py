"""Knows whether a model is an output of reshard, where its experts are, and what of vLLM cannot go with an output.

An output numbers its experts by slot. Whatever brings tensors in the original's numbering, or reads files without
asking which ones a rank needs, would answer wrongly with no error: for models with expert groups and without. So such
options are refused here, before anything is loaded. `updates` and `lora` refuse what a running server may be asked for.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import IntegrityError, OutputError, UnsupportedError
from ..placement.contract import (
    CONTRACT_KEY,
    GROUP_KEYS,
    NUMBERING,
    Contract,
    contract_from_json,
    mark_of,
    mixture,
    numbering_in,
    placement_from_json,
)
from ..placement.permutations import Placement

MANIFEST, INDEX = "reshard_manifest.json", "model.safetensors.index.json"
# Load formats whose files `loading` chooses, by the index. The others list a directory themselves, read files of a form
# that reshard does not write, or copy memory by slot. "dummy" reads nothing.
LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "dummy")

MARKED_NONE = ("0.1.0",)  # versions of reshard whose outputs' files do not say that experts are renumbered

# Workers that load models with the functions that reshard replaces; vLLM puts one of them in the place of "auto".
WORKERS = (
    "auto",
    "vllm.v1.worker.gpu_worker.Worker",
    "vllm.v1.worker.cpu_worker.CPUWorker",
    "vllm.v1.worker.xpu_worker.XPUWorker",
)


def is_output(model_config: Any) -> bool:
    """Whether reshard wrote the model: its config has a contract, its directory a manifest, or its files say so.

    Of a model that vLLM takes from the Hub, nothing but the files may say so, once they are read; see `note_output`.
    """
    if getattr(getattr(model_config, "hf_config", None), CONTRACT_KEY, None) is not None:
        return True
    folder = Path(str(model_config.model))
    return (folder / MANIFEST).is_file() or noted_numbering(model_config) is not None or _is_marked(folder)


def holds_output(model_config: Any) -> bool:
    """Whether a loaded model has an output's weights, whatever its path says: `reload_weights` changes the path."""
    return told_contract(model_config) is not None or noted_numbering(model_config) is not None


def lies_in(folder: Path) -> bool:
    """Whether an output lies in a directory, by its manifest, its config or its files."""
    return (folder / MANIFEST).is_file() or contract_in(folder) is not None or _is_marked(folder)


def _is_marked(folder: Path) -> bool:
    """Whether a safetensors file at the top of a directory says that its experts are renumbered.

    We look at one file of each name, without its numbers: there may be others beside the model, such as an adapter.
    """
    from safetensors import SafetensorError

    files = sorted(folder.glob("[!.]*.safetensors")) if folder.is_dir() else []
    for file in {re.sub(r"\d+", "", file.name): file for file in files}.values():
        try:
            if read_numberings([str(file)])[file.name] is not None:
                return True
        except (SafetensorError, OSError):  # if vLLM reads this file, it says so itself
            continue
    return False


def note_output(model_config: Any, numbering: str = "") -> None:
    """Remember how the files of this model number its experts, though its directory may not say it; see `mixture`."""
    model_config.reshard_numbering = numbering


def noted_numbering(model_config: Any) -> str | None:
    """What `note_output` was told of this model; None if no file of it was read that is an output's."""
    found: str | None = getattr(model_config, "reshard_numbering", None)
    return found


def numbering_of(model_config: Any) -> str | None:
    """How an output numbers its experts: the digest in its files, or of the placement that it has by its contract or
    its manifest; None if neither says it.
    """
    if noted := noted_numbering(model_config):
        return noted
    placement = read_placement(str(model_config.model), model_config.hf_config)
    return None if placement is None else mark_of(placement)[NUMBERING]


def contract_digest(contract: Contract) -> str:
    """A digest of all that ranks must have alike to serve an output with expert groups together."""
    routing = contract.n_group, contract.topk_group, mark_of(contract.physical_to_logical)
    return hashlib.sha256(json.dumps(routing).encode()).hexdigest()


def read_numberings(files: Sequence[str]) -> dict[str, str | None]:
    """How safetensors files say in their headers that their experts are numbered, by file; see `numbering_in`."""
    from safetensors import safe_open

    found = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            found[Path(file).name] = numbering_in(opened.metadata() or {})
    return found


def refuse_mixture(folder: str, numberings: Mapping[str, str | None], contract: Contract | None) -> None:
    """IntegrityError if the files that a rank reads in `folder` are not all of the output there, with this contract."""
    manifest = Path(folder, MANIFEST)
    placement = _placement_in(manifest) if contract is None else contract.physical_to_logical
    fault = None
    if contract is None and numberings and set(numberings.values()) == {None}:
        writer = _writer_in(manifest)
        if writer not in (None, *MARKED_NONE):
            fault = f"reshard {writer} wrote {MANIFEST}, and would have marked files, but no file has its mark"
    if fault := fault or mixture(numberings, placement, marked=contract is not None and bool(contract.flattened)):
        raise IntegrityError(
            f"{folder}: {fault}; files of two checkpoints lie here, and experts would be taken for others: run "
            "`reshard verify`, and write the output anew"
        )


def read_placement(model: str, hf_config: Any = None) -> Placement | None:
    """An output's placement: from its contract, or from its manifest if it has no contract; None for an original."""
    if (contract := getattr(hf_config, CONTRACT_KEY, None)) is not None:
        return contract_from_json(contract, model).physical_to_logical
    if (contract := contract_in(Path(model))) is not None:
        return contract.physical_to_logical
    return _placement_in(Path(model, MANIFEST))


def _placement_in(manifest: Path) -> Placement | None:
    """The placement in a manifest; None if there is no such file."""
    found = _read(manifest)
    return None if found is None else found[0]


def _writer_in(manifest: Path) -> str | None:
    """The version of reshard that wrote a manifest; None if there is no such file, or it does not say."""
    found = _read(manifest)
    return None if found is None else found[1]


def _read(manifest: Path) -> tuple[Placement, str | None] | None:
    if not manifest.is_file():
        return None
    status = manifest.stat()
    return _in_manifest(manifest, (status.st_mtime_ns, status.st_ino, status.st_size))


@functools.lru_cache(maxsize=1)  # a model's layers ask one by one
def _in_manifest(path: Path, version: tuple[int, ...]) -> tuple[Placement, str | None]:
    manifest = json.loads(path.read_bytes())
    names = [layer["name"] for layer in manifest["moe_layers"]]
    placement = placement_from_json(manifest["physical_to_logical"], names, str(path))
    return placement, manifest.get("reshard_version")


def contract_in(folder: Path) -> Contract | None:
    """The contract in a directory's config.json, None if it has none."""
    path = folder / "config.json"
    value = json.loads(path.read_bytes()).get(CONTRACT_KEY) if path.is_file() else None
    return contract_from_json(value, str(path)) if value is not None else None


def told_contract(model_config: Any) -> Contract | None:
    """The contract in a ModelConfig, None if it has none."""
    value = getattr(getattr(model_config, "hf_config", None), CONTRACT_KEY, None)
    return contract_from_json(value, str(model_config.model)) if value is not None else None


def contract_beside(folder: str, told: Contract | None) -> Contract | None:
    """The contract of the weights in `folder`, None if they have none.

    With --download-dir, vLLM keeps config.json elsewhere than the weights. Then they have the contract that vLLM was
    `told`, if their headers say so: `refuse_mixture` compares them.
    """
    if told is not None and told.flattened and not Path(folder, "config.json").is_file():
        return told
    return contract_in(Path(folder))


def refuse_options(config: Any, output: str, formats: Sequence[str] | None = None) -> None:
    """Raise UnsupportedError if a VllmConfig has an option that cannot go with `output`, the directory or its name.

    `formats` are the load formats, if it is known by which the output is loaded: the configuration is for a draft, too.
    """
    refuse_placing_twice(output, str(config.parallel_config.expert_placement_strategy))
    for load_format in load_formats(config, is_output) if formats is None else formats:
        if load_format not in LOAD_FORMATS:
            raise UnsupportedError(
                f"{output}: this is an output of reshard, and load format {load_format} does not ask which files a "
                f"rank needs; use one of {', '.join(LOAD_FORMATS)}"
            )
    if (transfer := getattr(config, "weight_transfer_config", None)) is not None:
        raise UnsupportedError(
            f"{output}: this is an output of reshard, whose experts are renumbered, and weight transfer "
            f"({transfer.backend}) would bring them in the original's numbering; serve the original for that, with "
            "RESHARD_PLACEMENT if it is to be placed"
        )


def refuse_worker(config: Any) -> None:
    """UnsupportedError if a VllmConfig's model or draft has a contract, and nothing would check its routers."""
    fault = worker_fault(worker_of(config))
    draft = getattr(config.speculative_config, "draft_model_config", None)
    for model in (config.model_config, *([] if draft is None else [draft])):
        if fault and getattr(getattr(model, "hf_config", None), CONTRACT_KEY, None) is not None:
            raise UnsupportedError(f"{model.model}: this is an output of reshard with expert groups, and {fault}")


def worker_fault(worker: str) -> str | None:
    """Describe why a worker class cannot serve renumbered or placed experts; None if it can."""
    if worker in WORKERS:
        return None
    return (
        f"nothing would check what worker class {worker} serves, as it is not vLLM's own; leave --worker-cls out, or "
        "serve the original without a placement, where another package brings the worker"
    )


def worker_of(config: Any) -> str:
    """The name of the worker's class in a VllmConfig."""
    return str(getattr(config.parallel_config, "worker_cls", None))


def refuse_placing_twice(output: str, strategy: str) -> None:
    """UnsupportedError where vLLM's own strategy would place the experts of an output once more."""
    if strategy != "linear":
        raise UnsupportedError(
            f"{output}: this is an output of reshard, whose experts are placed already; --expert-placement-strategy "
            f"{strategy} would place them once more, and some kernels answer wrongly then; leave that option out"
        )


def refuse_other_contract(model_config: Any, folder: str) -> None:
    """UnsupportedError unless a model routes as the weights in `folder`, an output or an original, need it.

    The config may be another one than lies there, and a server may be given new weights.
    """
    contract = told_contract(model_config)
    here = contract_beside(folder, contract)
    if contract is not None:
        if here is None or _routing(here) != _routing(contract):
            what = "no output of reshard with expert groups" if here is None else "another output of reshard"
            raise UnsupportedError(
                f"{folder}: {what}, but {CONTRACT_KEY} in the config of {model_config.model} says where other weights "
                "have their experts; serve each output with its own config.json"
            )
        if _placement_in(Path(folder, MANIFEST)) not in (None, here.physical_to_logical):
            raise UnsupportedError(
                f"{folder}: the placement in config.json differs from that in {MANIFEST}; one of the two files belongs "
                "to another output: run `reshard verify`"
            )
        return
    text = getattr(model_config, "hf_text_config", None)
    n_group, topk_group = (getattr(text, key, None) or 1 for key in GROUP_KEYS)
    if here is not None or topk_group < n_group:
        raise UnsupportedError(
            f"{folder}: this is an output of reshard, and the model that it is loaded into has no routing contract, so "
            "it would choose other experts; serve the output with its own config.json, or load an original"
        )


def _routing(contract: Contract) -> object:
    """What has to be the same for weights of one output to fit the routers of another."""
    return contract.n_group, contract.topk_group, contract.physical_to_logical


def refuse_unknown_files(files: Sequence[str], index: Path, *, alone: bool) -> None:
    """Raise an error if the output's own index does not say which files vLLM needs; it is about to load `files`.

    `index` is the one that vLLM goes by. It needs none if one file holds the whole model (`alone`).
    """
    if index.name != INDEX:
        raise UnsupportedError(
            f"{files[0]}: vLLM would load this file by {index.name}, but it lies beside an output of reshard and is no "
            f"part of it, as {INDEX} names the output's files; move it away: its experts have the original's ids"
        )
    if not alone and not index.is_file():
        raise OutputError(
            f"{index}: absent, so nobody can tell whether a file of this output of reshard is missing, and experts "
            "might stay uninitialised; copy the index here, or run `reshard stage` again"
        )


def load_formats(config: Any, counts: Callable[[Any], bool] = lambda draft: True) -> list[str]:
    """The load formats of a VllmConfig's model, and of its draft if that has its own; `counts` says whether it does."""
    speculative = getattr(config, "speculative_config", None)
    draft, load = getattr(speculative, "draft_model_config", None), getattr(speculative, "draft_load_config", None)
    if load is None:
        return [format_of(config.load_config)]
    if getattr(config.model_config, "runner_type", None) == "draft":
        return [format_of(load)]
    return [format_of(one) for one in (config.load_config, *([load] if draft is None or counts(draft) else []))]


def format_of(load_config: Any) -> str:
    """The load format of a LoadConfig."""
    return str(getattr(load_config.load_format, "value", load_config.load_format))
