"""Chooses the files that a rank reads, and checks every router and expert after loading, before the model serves.

Resharded outputs name files by EP rank: each rank opens the shared files and its own. After loading, a model with a
contract must route every MoE layer by it, and an original with a placement must hold every expert in its slot.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import OutputError, UnsupportedError
from ..placement.contract import CONTRACT_KEY, Contract, contract_from_json
from ..placement.permutations import rank_slots
from .patching import replace_if_there
from .request import MANIFEST, refuse_placing_twice
from .routing import LogicalOrder
from .runners import lets_kernel_route, moe_runners
from .served import Build, ServedPlacement, building, current_build, served_placement
from .support import hook_fault
from .worker import has_placement, mark_checked, mark_proved

RANK_FILE = re.compile(r"model-ep(\d{2,})-of-(\d{2,})-(\d{5})-of-(\d{5})\.safetensors")
# With these load formats, ranks divide all files among themselves and exchange tensors: all must name the same files.
COOPERATIVE_FORMATS = ("fastsafetensors", "instanttensor")
_ACTIVATION_SCALE = re.compile(r"\.experts\.\d+\..*\binput_\w+$")


@dataclass(frozen=True, slots=True)
class Parallel:
    """How this process's EP group divides the experts, as far as that decides which files to read."""

    ep_rank: int
    ep_size: int  # 1 if expert parallelism is off
    consecutive: bool  # whether a rank needs only its consecutive physical experts (vLLM's linear rule)


def install_file_choice(default_loader: ModuleType) -> None:
    """Make vLLM's default loader open only the files that this rank needs."""
    replace_if_there(default_loader, "filter_duplicate_safetensors_files", _with_ranks)


def install_check(base_loader: ModuleType) -> None:
    """Compare placements among ranks before a model is built, and check the model after it is loaded."""
    replace_if_there(base_loader, "process_weights_after_loading", _with_check)
    replace_if_there(base_loader, "initialize_model", _with_agreement)
    replace_if_there(getattr(base_loader, "BaseModelLoader", None), "load_model", _as_build)


def choose_files(named: list[str], present: list[str], num_experts: int, parallel: Parallel) -> list[str]:
    """Choose the files that a rank needs, among those `named` by the index: shared files, and files with its experts.

    Raises OutputError if a needed file is not `present`.
    """
    ranks = {file: _rank_of(file) for file in named}
    sizes = {int(match[2]) for file in named if (match := RANK_FILE.fullmatch(Path(file).name))}
    needed = needed_ranks(max(sizes), num_experts, parallel)
    chosen = [file for file, rank in ranks.items() if rank is None or rank in needed]
    absent = sorted(set(chosen) - set(present)) or [f"model-ep{rank:02}-…" for rank in needed - set(ranks.values())]
    if absent:
        raise OutputError(
            f"{absent[0]}: absent, but EP rank {parallel.ep_rank} of {parallel.ep_size} needs it (EP ranks "
            f"{', '.join(map(str, sorted(needed)))} of the output); copy them here with `reshard stage`"
        )
    return chosen


def _rank_of(file: str) -> int | None:
    match = RANK_FILE.fullmatch(Path(file).name)
    return int(match[1]) if match else None


def needed_ranks(ranks: int, num_experts: int, parallel: Parallel) -> set[int]:
    """The ranks whose files hold experts of this process; the files were made for `ranks` EP ranks."""
    if parallel.ep_size == 1 or not parallel.consecutive:
        return set(range(ranks))
    owned = rank_slots(num_experts, parallel.ep_size)[parallel.ep_rank]
    made_for = rank_slots(num_experts, ranks)
    return {rank for rank, slots in enumerate(made_for) if slots.start < owned.stop and owned.start < slots.stop}


def placement_warnings(ranks: int, parallel: Parallel) -> list[str]:
    """Warnings for a user whose options make the placement of an output for `ranks` EP ranks useless."""
    if parallel.ep_size == 1:
        return [
            f"resharded for {ranks} EP ranks, but expert parallelism is off: answers are right, but the placement has "
            "no effect"
        ]
    if parallel.ep_size != ranks:
        return [
            f"resharded for {ranks} EP ranks, served on {parallel.ep_size}: answers are right, but the ranks do not "
            f"own the experts as planned; reshard the original again with --ep {parallel.ep_size}"
        ]
    return []


def check_model(model: Any, contract: Contract, is_draft: bool, pipelined: bool) -> None:
    """Raise UnsupportedError unless every MoE layer of `model` routes by `contract`, and none by its kernel."""
    import vllm.model_executor.layers.fused_moe.layer as layer

    fault = hook_fault(getattr(layer, "create_fused_moe_router", None))
    runners = moe_runners(model)
    for name, runner in runners.items():
        if not isinstance(runner.router, LogicalOrder):
            raise _refusal(f"layer {name} does not route by the contract" + (f": {fault}" if fault else ""))
        if lets_kernel_route(runner):
            raise _refusal(f"layer {name} lets its kernel {type(runner.routed_experts.quant_method).__name__} route")
    expected = 1 if is_draft or pipelined else _layers_before(contract, model)
    if len(runners) < expected and not pipelined:
        raise _refusal(
            f"vLLM made routers for only {len(runners)} of its {expected} MoE layers" + (f": {fault}" if fault else "")
        )


def _layers_before(contract: Contract, model: Any) -> int:
    """How many MoE layers of the contract belong to the model itself; later layers belong to its draft."""
    config = getattr(model.config, "text_config", model.config)
    numbers = [[int(part) for part in layer.split(".") if part.isdigit()] for layer in contract.physical_to_logical]
    return sum(1 for number in numbers if number and number[0] < config.num_hidden_layers)


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
        elif (contract := _contract_on_disk(model_config)) is not None:
            check_model(model, contract, is_draft, pipelined)
            if not is_draft:
                mark_checked(str(model_config.model))
        return result

    return process_weights_after_loading


def _check_filled(model: Any, served: ServedPlacement, build: Build, is_draft: bool, pipelined: bool) -> None:
    from .proof import check_filled  # imports torch

    dummy = str(build.load_config.load_format) == "dummy"
    placed = check_filled(model, served, is_draft=is_draft, pipelined=pipelined, dummy=dummy)
    _log().info(
        "%s%d MoE layers are placed: %s, digest %s%s",
        "draft: " if is_draft else "",
        placed,
        served.asked,
        served.digest[:12],
        "" if dummy else "; every slot was seen to be filled with its expert",
    )


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
        from .agreement import agree

        served = served_placement(vllm_config)
        agree(None if served is None else served.digest)
        return initialize(vllm_config, *args, **kwargs)

    return initialize_model


def _contract_on_disk(model_config: Any) -> Contract | None:
    """The model's contract; from config.json if the config object lost it: then its routers did not see it."""
    value = getattr(model_config.hf_config, CONTRACT_KEY, None)
    if value is not None:
        return contract_from_json(value, str(model_config.model))
    return _contract_in(Path(model_config.model))


def _contract_in(folder: Path) -> Contract | None:
    path = folder / "config.json"
    value = json.loads(path.read_bytes()).get(CONTRACT_KEY) if path.is_file() else None
    return contract_from_json(value, str(path)) if value is not None else None


def _with_ranks(filter_files: Callable[..., list[str]]) -> Callable[..., list[str]]:
    @functools.wraps(filter_files)
    def filter_duplicate_safetensors_files(files: list[str], folder: str, index_file: str) -> list[str]:
        if has_placement() and Path(folder, MANIFEST).is_file():
            raise UnsupportedError(
                f"{folder}: an output of reshard, whose experts are renumbered already; a model with a placement takes "
                "weights in the original's ids only"
            )
        sizes = {int(match[2]) for file in files if (match := RANK_FILE.fullmatch(Path(file).name))}
        by_rank = len(sizes) == 1
        contract = None if by_rank else _contract_in(Path(folder))
        index = Path(folder, index_file)
        if not (by_rank or contract) or not index.is_file():
            return filter_files(files, folder, index_file)
        from vllm.logger import init_logger

        build = current_build()
        parallel_config = build.vllm_config.parallel_config
        refuse_placing_twice(folder, str(parallel_config.expert_placement_strategy))
        weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        parallel = _parallel(parallel_config, str(build.load_config.load_format), weight_map)
        logger = init_logger("vllm.plugins.reshard")
        made_for = contract.ep_size if contract else sizes.pop()
        for warning in placement_warnings(made_for, parallel):
            logger.warning("%s: %s", folder, warning)
        if not by_rank:
            return filter_files(files, folder, index_file)
        named = [str(Path(folder, name)) for name in sorted(set(weight_map.values()))]
        chosen = choose_files(named, files, build.model_config.get_num_experts(), parallel)
        logger.info("EP rank %d reads %d of %d files", parallel.ep_rank, len(chosen), len(named))
        return chosen

    return filter_duplicate_safetensors_files


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
