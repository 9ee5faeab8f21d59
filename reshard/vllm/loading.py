"""Chooses the files that a rank reads, and checks every router and expert after loading, before the model serves.

Resharded outputs name files by EP rank: each rank opens the shared files and its own. After loading, a model with a
contract must route every MoE layer by it, and an original with a placement must hold every expert in its slot.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import UnsupportedError
from ..placement.contract import Contract
from .agreement import ORIGINAL, agree, agree_numbering
from .gates import shape_gates
from .outputs import (
    MANIFEST,
    contract_beside,
    contract_digest,
    contract_in,
    format_of,
    holds_output,
    is_output,
    note_output,
    numbering_of,
    read_numberings,
    refuse_mixture,
    refuse_options,
    refuse_other_contract,
    refuse_unknown_files,
    told_contract,
)
from .patching import replace_if_there
from .rank_files import RANK_FILE, Parallel, choose_files, placement_warnings
from .returned import check_returning, returns_experts
from .routing import LogicalOrder
from .runners import foreign_part, lets_kernel_route, moe_runners
from .served import Build, ServedPlacement, building, builds_draft, current_build, is_building, served_placement
from .support import hook_fault
from .updates import close, own_files_are_read
from .worker import has_placement, mark_checked, mark_proved

# With these load formats, ranks divide all files among themselves and exchange tensors: all must name the same files.
COOPERATIVE_FORMATS = ("fastsafetensors", "instanttensor")
OUTPUT_UPDATE = (
    "{}: new weights are refused while this output of reshard is served: its experts are renumbered, and new weights "
    "would be taken as if they were, too; call reload_weights for the output's own files, or serve the original"
)
DUMMY_UPDATE = (
    "{}: new weights are refused while the model is served with a placement and was started with --load-format dummy: "
    "nothing has shown that this model's loader puts experts into their slots; start with real weights"
)
_ACTIVATION_SCALE = re.compile(r"\.experts\.\d+\..*\binput_\w+$")


def install_file_choice(default_loader: ModuleType) -> None:
    """Make vLLM's default loader open only the files that this rank needs."""
    replace_if_there(default_loader, "filter_duplicate_safetensors_files", _with_ranks)


def install_check(base_loader: ModuleType) -> None:
    """Compare placements among ranks before a model is built, and check the model after it is loaded."""
    replace_if_there(base_loader, "process_weights_after_loading", _with_check)
    replace_if_there(base_loader, "initialize_model", _with_agreement)
    replace_if_there(getattr(base_loader, "BaseModelLoader", None), "load_model", _as_build)


def check_model(model: Any, contract: Contract, is_draft: bool, stage: range | None = None) -> None:
    """Raise UnsupportedError unless every MoE layer of `model` routes by `contract`, and none by its kernel.

    `stage` has the numbers of the layers that this process holds; None: it holds all layers of the model itself.
    """
    import vllm.model_executor.layers.fused_moe.layer as layer

    fault = hook_fault(getattr(layer, "create_fused_moe_router", None))
    runners = moe_runners(model)
    for name, runner in runners.items():
        if foreign := foreign_part(runner):
            raise _refusal(f"layer {name} has a part that is not vLLM's own ({foreign})")
        if not isinstance(runner.router, LogicalOrder):
            raise _refusal(f"layer {name} does not route by the contract" + (f": {fault}" if fault else ""))
        if lets_kernel_route(runner):
            raise _refusal(f"layer {name} lets its kernel {_kernel(runner)} route")
    expected = 1 if is_draft else _layers_in(stage or range(_num_layers(model)), contract)
    if len(runners) < expected:
        raise _refusal(
            f"vLLM made routers for only {len(runners)} of its {expected} MoE layers" + (f": {fault}" if fault else "")
        )


def _kernel(runner: Any) -> str:
    return type(getattr(runner.routed_experts, "quant_method", runner)).__name__


def _layers_in(numbers: range, contract: Contract) -> int:
    """How many MoE layers of the contract have one of these numbers."""
    found = [[int(part) for part in layer.split(".") if part.isdigit()] for layer in contract.physical_to_logical]
    return sum(1 for number in found if number and number[0] in numbers)


def _num_layers(model: Any) -> int:
    """How many layers the model itself has; later layers belong to its draft."""
    return int(getattr(model.config, "text_config", model.config).num_hidden_layers)


def _stage(model: Any) -> range:
    """The numbers of the layers that this pipeline stage holds, by vLLM's own rule."""
    from vllm.distributed.parallel_state import get_pp_group
    from vllm.distributed.utils import get_pp_indices

    group = get_pp_group()
    return range(*get_pp_indices(_num_layers(model), group.rank_in_group, group.world_size))


def _refusal(fault: str) -> UnsupportedError:
    return UnsupportedError(
        f"this model was resharded and has expert groups, but {fault}; it would give wrong answers. Serve it with "
        "other options or another vLLM version, or restore the original with `reshard restore`"
    )


def _with_check(process: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(process)
    def process_weights_after_loading(model: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        build = current_build()
        config = build.vllm_config
        is_draft = getattr(model_config, "runner_type", None) == "draft"
        pipelined = config.parallel_config.pipeline_parallel_size > 1
        served = None if config.parallel_config.enable_eplb else served_placement(config)
        if served is not None:
            _check_filled(model, served, build, is_draft, pipelined)
        result = process(model, model_config, *args, **kwargs)
        if served is not None:
            from .proof import check_kernels  # imports torch

            kernels = check_kernels(model, served, served.ep_size)
            _log().info("kernels that compute the placed experts: %s", ", ".join(sorted(kernels)) or "none here")
            mark_proved(served)
            if _is_dummy(build):
                close(model, DUMMY_UPDATE.format(served.asked))
        elif (contract := _contract_on_disk(model_config)) is not None:
            check_model(model, contract, is_draft, _stage(model) if pipelined else None)
            if not is_draft:
                mark_checked(str(model_config.model))
        from_output = is_output(model_config)
        if from_output or getattr(model_config, "is_moe", True):  # other models have nothing to compare
            agree_numbering(numbering_of(model_config) if from_output else ORIGINAL, draft=is_draft)
        if from_output:
            if returns_experts(config) and not is_draft:
                check_returning(model)
            close(model, OUTPUT_UPDATE.format(model_config.model))
        return result

    return process_weights_after_loading


def _check_filled(model: Any, served: ServedPlacement, build: Build, is_draft: bool, pipelined: bool) -> None:
    from .proof import check_filled  # imports torch

    dummy = _is_dummy(build)
    placed = check_filled(model, served, is_draft=is_draft, pipelined=pipelined, dummy=dummy)
    _log().info(
        "%s%d MoE layers are placed: %s, digest %s%s",
        "draft: " if is_draft else "",
        placed,
        served.asked,
        served.digest[:12],
        "" if dummy else "; every slot was seen to be filled with its expert",
    )


def _is_dummy(build: Build) -> bool:
    return str(build.load_config.load_format) == "dummy"


def _log() -> Any:
    from vllm.logger import init_logger

    return init_logger("vllm.plugins.reshard")


def _as_build(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_model(loader: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        with building(Build(vllm_config, model_config, loader.load_config)):
            return load(loader, vllm_config, model_config, *args, **kwargs)

    return load_model


def _with_agreement(initialize: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(initialize)
    def initialize_model(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        served = served_placement(vllm_config)
        model_config = kwargs.get("model_config") or vllm_config.model_config
        contract = told_contract(model_config)
        if not is_building() and (served is not None or contract is not None):
            raise UnsupportedError(
                f"{model_config.model}: its experts are placed, and vLLM builds this model outside of its usual "
                "loaders, as `vllm preload` does, so nothing would check it; serve it with a usual load format"
            )
        digest = None if contract is None else contract_digest(contract)
        agree(digest if served is None else served.agreed, draft=builds_draft())
        model = initialize(vllm_config, *args, **kwargs)
        if contract is not None:
            shape_gates(model, contract)
        return model

    return initialize_model


def _contract_on_disk(model_config: Any) -> Contract | None:
    """The model's contract; from config.json if the config object lost it: then its routers did not see it."""
    return told_contract(model_config) or contract_in(Path(model_config.model))


def _with_ranks(filter_files: Callable[..., list[str]]) -> Callable[..., list[str]]:
    @functools.wraps(filter_files)
    def filter_duplicate_safetensors_files(files: list[str], folder: str, index_file: str) -> list[str]:
        sizes = {int(match[2]) for file in files if (match := RANK_FILE.fullmatch(Path(file).name))}
        by_rank = len(sizes) == 1
        contract = contract_beside(folder, told_contract(current_build().model_config) if is_building() else None)
        if not (sizes or contract or Path(folder, MANIFEST).is_file()):
            chosen = filter_files(files, folder, index_file)
            if not any(numbering is not None for numbering in read_numberings(chosen).values()):
                if is_building() and is_output(current_build().model_config):
                    refuse_other_contract(current_build().model_config, folder)
                return chosen
        from vllm.logger import init_logger

        build = current_build()
        parallel_config = build.vllm_config.parallel_config
        _refuse_originals(build, folder)
        refuse_options(build.vllm_config, folder, [format_of(build.load_config)])
        index = Path(folder, index_file)
        refuse_unknown_files(files, index, alone=not sizes and len(files) == 1)
        refuse_other_contract(build.model_config, folder)

        def checked(chosen: list[str]) -> list[str]:
            numberings = read_numberings(chosen)
            refuse_mixture(folder, numberings, contract)
            note_output(build.model_config, next(iter(numberings.values()), None) or "")
            return chosen

        if not (by_rank or contract) or not index.is_file():
            return checked(filter_files(files, folder, index_file))
        weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        parallel = _parallel(parallel_config, str(build.load_config.load_format), weight_map)
        logger = init_logger("vllm.plugins.reshard")
        made_for = contract.ep_size if contract else sizes.pop()
        for warning in placement_warnings(made_for, parallel, _redundant(parallel_config)):
            logger.warning("%s: %s", folder, warning)
        if not by_rank:
            return checked(filter_files(files, folder, index_file))
        named = [str(Path(folder, name)) for name in sorted(set(weight_map.values()))]
        chosen = choose_files(named, files, build.model_config.get_num_experts(), parallel)
        logger.info("EP rank %d reads %d of %d files", parallel.ep_rank, len(chosen), len(named))
        return checked(chosen)

    return filter_duplicate_safetensors_files


def _refuse_originals(build: Build, folder: str) -> None:
    """UnsupportedError if an output's files in `folder` are loaded into an original."""
    if has_placement() or served_placement(build.vllm_config) is not None:
        raise UnsupportedError(
            f"{folder}: an output of reshard, whose experts are renumbered already; a model with a placement takes "
            "weights in the original's ids only"
        )
    if own_files_are_read() and not holds_output(build.model_config):
        raise UnsupportedError(
            f"{folder}: an output of reshard, whose experts are renumbered; the running model is an original, and "
            "takes an original's weights only: start anew to serve the output"
        )


def _redundant(config: Any) -> int:
    return int(config.eplb_config.num_redundant_experts) if config.enable_eplb else 0


def _parallel(config: Any, load_format: str, weight_map: Iterable[str]) -> Parallel:
    if not config.enable_expert_parallel:
        return Parallel(ep_rank=0, ep_size=1, consecutive=True)
    from vllm.distributed.parallel_state import get_ep_group

    group = get_ep_group()
    # some kernels use the largest activation scale of all experts, so every rank must read the scales of all
    needs_all = any(_ACTIVATION_SCALE.search(name) for name in weight_map)
    alone = load_format not in COOPERATIVE_FORMATS and not needs_all
    consecutive = not config.enable_eplb and config.expert_placement_strategy == "linear" and alone
    return Parallel(group.rank_in_group, group.world_size, consecutive)
