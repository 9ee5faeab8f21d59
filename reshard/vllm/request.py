"""RESHARD_PLACEMENT: resolves the placement that a user requests for an original, or refuses it with one line.

    RESHARD_PLACEMENT=zigzag | node-zigzag:M | FILE
    --additional-config '{"reshard": {"placement": …}}'      the same; use it if variables do not travel (Ray, nodes)
                        '{"reshard": {"rearrange": true}}'   whether vLLM's EPLB moves experts while it serves; the
                                                             default is true, but false if experts have copies

We resolve the request once per vLLM configuration, when vLLM makes it and before it starts any process. Options that
would bypass the placement are refused there too.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import UnsupportedError
from ..placement.placement_file import PlacementFile, read_placement_file
from .asked import VARIABLE, asked_for, asked_to_rearrange, refuse_another
from .hooks import PLACEMENT
from .outputs import is_output, load_formats, refuse_options, refuse_worker, worker_fault, worker_of
from .patching import replace_if_there
from .served import KEY, NODE_ZIGZAG, ZIGZAG, ServedPlacement, served_file, served_placement, served_strategy
from .support import VERSIONS, version_fault

# Load formats that pass tensors to the model by name, with the original's expert ids.
LOAD_FORMATS = (
    *("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer"),
    *("pt", "npcache", "mistral", "dummy"),
)
# Weight transfer backends that pass whole tensors to the model by name.
TRANSFERS = ("nccl", "ipc")


@dataclass(frozen=True, slots=True)
class Model:
    """The settings in vLLM's configuration that decide which placements can be served."""

    name: str
    num_experts: int  # 0 if it has none
    num_layers: int
    n_group: int  # 1 if experts have no groups
    ep_size: int  # 1 if expert parallelism is off
    expert_parallel: bool
    is_output: bool
    strategy: str  # vLLM's own expert placement strategy
    load_format: str  # of the model or of its draft; the one that is not in LOAD_FORMATS, if there is one
    lora: bool
    elastic: bool
    transfer: str | None  # backend of weight updates
    eplb: bool = False
    redundant: int = 0  # experts of EPLB, beside E
    on_cuda: bool = True
    worker: str = "auto"  # its class


def install(module: ModuleType) -> None:
    """Make VllmConfig resolve the requested placement; `module` defines VllmConfig."""
    replace_if_there(module.VllmConfig, "__post_init__", _then_resolve)


def _then_resolve(post_init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(post_init)
    def __post_init__(config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - vLLM's own name
        post_init(config, *args, **kwargs)
        if (model := config.model_config) is not None:
            if is_output(model):
                refuse_options(config, str(model.model))
            refuse_worker(config)
            resolve_in(config, os.environ)

    return __post_init__


def resolve_in(config: Any, environment: Mapping[str, str]) -> None:
    """Put the requested placement, if any, into a VllmConfig; raise UnsupportedError if it cannot be served."""
    more = config.additional_config
    if (resolved := served_placement(config)) is not None:
        refuse_another(resolved, environment)
        _refuse_more(config, resolved)
        return
    if not (asked := asked_for(environment, more)):
        return
    if fault := version_fault(PLACEMENT):
        raise UnsupportedError(
            f"{VARIABLE}={asked}: placements need vLLM {VERSIONS}, {fault}; install one of these, or unset {VARIABLE}"
        )
    model = _model_of(config)
    served = resolve(asked, model, rearrange=asked_to_rearrange(more))
    if not model.expert_parallel:
        _log().warning(
            "%s=%s: expert parallelism is off (--enable-expert-parallel): answers are right, but the placement has no "
            "effect",
            VARIABLE,
            asked,
        )
    config.additional_config = {**(more or {}), KEY: served}
    _log().info(
        "serving %s with placement %s on %d EP ranks, digest %s", model.name, asked, model.ep_size, served.digest[:12]
    )


def _refuse_more(config: Any, resolved: ServedPlacement) -> None:
    """Refuse what a resolved placement cannot go with: vLLM copies it to the configuration of a draft or engine."""
    model, is_draft = _model_of(config), getattr(config.model_config, "runner_type", None) == "draft"
    has_nothing_to_place = model.num_experts == 0 and is_draft
    if not has_nothing_to_place and (fault := _fault(model)):
        raise UnsupportedError(f"{resolved.asked}: {model.name}: {fault}")
    if is_draft:  # vLLM 0.26 turns expert parallelism off for drafts, and has none of those kernels
        return
    _refuse_without_ep(resolved, model)
    if model.ep_size != resolved.ep_size:
        raise UnsupportedError(
            f"{resolved.asked}: resolved for {resolved.ep_size} EP ranks, and {model.name} is served on "
            f"{model.ep_size}; make additional_config anew"
        )
    if resolved.redundant and (fault := _copies_fault(resolved.redundant, model)):
        raise UnsupportedError(f"{resolved.asked}: {fault}")


def resolve(asked: str, model: Model, *, rearrange: bool | None = None) -> ServedPlacement:
    """Resolve the request `asked` for `model`; raise UnsupportedError if the placement cannot be served.

    `rearrange`: whether EPLB moves experts; None: unless they have copies.
    """
    if fault := _fault(model):
        raise UnsupportedError(f"{VARIABLE}={asked}: {model.name}: {fault}")
    if rearrange is not None and not model.eplb:
        raise UnsupportedError(
            f"additional_config.{KEY}.rearrange is for vLLM's EPLB, which is off; add --enable-eplb, or leave it out"
        )
    if asked == ZIGZAG:
        nodes = 1
    elif asked.partition(":")[0] == NODE_ZIGZAG:
        nodes = _nodes(asked, model)
    else:
        return _resolve_file(asked, model, rearrange)
    return served_strategy(
        *(asked, nodes, model.num_experts, model.ep_size, model.num_layers), rearrange=rearrange is not False
    )


def _resolve_file(asked: str, model: Model, rearrange: bool | None) -> ServedPlacement:
    path = Path(asked)
    if not path.exists():
        raise UnsupportedError(
            f"{VARIABLE}={asked}: no such file; expected {ZIGZAG}, {NODE_ZIGZAG}:M (M nodes), or a placement file; "
            f"make one with `{_command(model)}`"
        )
    file = read_placement_file(path)
    make = f"make a placement for it with `{_command(model, file.strategy)}`"
    if misfit := _misfit(file, model):
        raise UnsupportedError(f"{asked}: {misfit}; {make}")
    if file.has_copies and (fault := _copies_fault(len(file.orders[0]) - file.num_experts, model)):
        raise UnsupportedError(f"{asked}: {fault}")
    rearrange = not file.has_copies if rearrange is None else rearrange
    served = served_file(asked, file, model.ep_size, model.num_layers, make, rearrange=rearrange)
    _refuse_without_ep(served, model)
    return served


def _refuse_without_ep(served: ServedPlacement, model: Model) -> None:
    """UnsupportedError if experts would move, and vLLM may choose decode kernels that route by themselves.

    It chooses those only if expert parallelism is off (`--monokernel`, `decode_backend`, Flint's).
    """
    if not model.expert_parallel and not served.is_linear:
        raise UnsupportedError(
            f"{served.asked}: {model.name}: this placement moves experts, but expert parallelism is off, and vLLM has "
            "decode kernels that route by themselves then; add --enable-expert-parallel (on one rank, too), or serve "
            f"without {VARIABLE}"
        )


def _fault(model: Model) -> str | None:
    """Describe an option with which no placement can be served, and what to do; None if there is none."""
    faults = {
        f"this model has no experts to place; unset {VARIABLE}": model.num_experts == 0,
        f"this is an output of reshard and already has a placement; serve the original, or unset {VARIABLE}": (
            model.is_output
        ),
        "--expert-placement-strategy round_robin would place the experts again; leave that option out": (
            model.strategy != "linear"
        ),
        f"load format {model.load_format} does not load experts by their ids; use one of {', '.join(LOAD_FORMATS)}": (
            model.load_format not in LOAD_FORMATS
        ),
        "LoRA adapters name experts by their ids in the original; serve without LoRA, or without a placement": (
            model.lora
        ),
        "elastic expert parallelism moves experts by itself; serve without it": model.elastic,
        f"weight transfer by {model.transfer} writes to slots directly; use one of {', '.join(TRANSFERS)}": (
            model.transfer is not None and model.transfer not in TRANSFERS
        ),
        "EPLB moves experts, and weight transfer writes them where they were at first; serve without one of them": (
            model.eplb and model.transfer is not None
        ),
        f"{model.num_experts} experts are fewer than the {model.ep_size} EP ranks; use fewer ranks": (
            0 < model.num_experts < model.ep_size
        ),
    }
    return next((fault for fault, found in faults.items() if found), None) or worker_fault(model.worker)


def _nodes(asked: str, model: Model) -> int:
    """M of node-zigzag:M. Raises UnsupportedError if nodes, ranks, groups and experts cannot be divided evenly."""
    match = re.fullmatch(rf"{NODE_ZIGZAG}:([1-9]\d*)", asked)
    if match is None:
        raise UnsupportedError(f"{VARIABLE}={asked}: expected {NODE_ZIGZAG}:M with M nodes, such as {NODE_ZIGZAG}:2")
    nodes = int(match[1])
    uneven = {
        f"{model.ep_size} EP ranks": model.ep_size % nodes,
        f"{model.n_group} expert groups": model.n_group > 1 and model.n_group % nodes,
        f"{model.num_experts} experts": model.num_experts % model.ep_size,
    }
    if fault := next((what for what, found in uneven.items() if found), None):
        raise UnsupportedError(
            f"{VARIABLE}={asked}: {model.name}: {fault} cannot be divided evenly among {nodes} nodes with "
            f"{model.ep_size} EP ranks; use another M, or {ZIGZAG}"
        )
    return nodes


def _misfit(file: PlacementFile, model: Model) -> str | None:
    """Describe why a placement file does not fit the model or its number of EP ranks; None if it fits."""
    if file.num_experts != model.num_experts:
        return f"made for {file.num_experts} experts, {model.name} has {model.num_experts}"
    if file.ep_size is not None and file.ep_size != model.ep_size:
        off = "" if model.expert_parallel else " (expert parallelism is off: --enable-expert-parallel)"
        return f"made for {file.ep_size} EP ranks, served on {model.ep_size}{off}"
    if len(sizes := sorted({len(order) for order in file.orders})) > 1:
        return f"a layer has {sizes[0]} slots and another one {sizes[-1]}, and vLLM has as many in each layer"
    if file.has_copies and sizes[0] % model.ep_size:
        return f"its {sizes[0]} slots cannot be divided evenly among {model.ep_size} EP ranks"
    return None


def _copies_fault(redundant: int, model: Model) -> str | None:
    """Describe why a placement with so many copies cannot be served, and what to do; None if it can."""
    option = f"--eplb-config '{{\"num_redundant_experts\": {redundant}}}'"
    if not model.eplb:
        return f"it has copies of some experts, and vLLM holds copies with EPLB only; add --enable-eplb {option}"
    if model.redundant != redundant:
        return f"it has {redundant} copies, and vLLM has room for {model.redundant}; give {option}"
    if not model.on_cuda:
        return "it has copies of some experts, and a kernel for NVIDIA GPUs chooses among them; serve without copies"
    return None


def _command(model: Model, strategy: str = ZIGZAG) -> str:
    """The command that makes a placement file for `model`."""
    options = {"balanced": "--trace DIR", NODE_ZIGZAG: "--nodes M", "file": "--map FILE", "copies": "--spare S"}
    needs = f" {options[strategy]}" if strategy in options else ""
    return f"reshard export {model.name} --to vllm --ep {model.ep_size} --strategy {strategy}{needs} --out FILE"


def _model_of(config: Any) -> Model:
    model, parallel = config.model_config, config.parallel_config
    text = model.hf_text_config
    transfer = getattr(config, "weight_transfer_config", None)
    from vllm.platforms import current_platform

    return Model(
        name=str(model.model),
        num_experts=model.get_num_experts(),
        num_layers=model.get_total_num_hidden_layers(),
        n_group=getattr(text, "n_group", None) or 1,
        ep_size=ep_size_of(parallel),
        expert_parallel=bool(parallel.enable_expert_parallel),
        is_output=is_output(model),
        strategy=str(parallel.expert_placement_strategy),
        load_format=next((name for name in load_formats(config) if name not in LOAD_FORMATS), LOAD_FORMATS[0]),
        lora=config.lora_config is not None,
        elastic=bool(getattr(parallel, "enable_elastic_ep", False)),
        transfer=None if transfer is None else str(transfer.backend),
        eplb=bool(parallel.enable_eplb),
        redundant=int(parallel.eplb_config.num_redundant_experts) if parallel.enable_eplb else 0,
        on_cuda=bool(current_platform.is_cuda()),
        worker=worker_of(config),
    )


def ep_size_of(parallel: Any) -> int:
    """R, the number of EP ranks: vLLM uses all ranks of data, prefill context and tensor parallelism."""
    if not parallel.enable_expert_parallel:
        return 1
    context = getattr(parallel, "prefill_context_parallel_size", 1)
    return int(parallel.data_parallel_size * context * parallel.tensor_parallel_size)


def _log() -> Any:
    from vllm.logger import init_logger

    return init_logger("vllm.plugins.reshard")
