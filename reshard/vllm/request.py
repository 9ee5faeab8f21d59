"""RESHARD_PLACEMENT: resolves the placement that a user requests for an original, or refuses it with one line.

    RESHARD_PLACEMENT=zigzag | node-zigzag:M | FILE
    --additional-config '{"reshard": {"placement": …}}'      the same; use it if variables do not travel (Ray, nodes)

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
from ..placement.contract import CONTRACT_KEY
from ..placement.placement_file import PlacementFile, read_placement_file
from .hooks import PLACEMENT
from .patching import replace_if_there
from .served import KEY, NODE_ZIGZAG, ZIGZAG, ServedPlacement, served_file, served_placement, served_strategy
from .support import VERSIONS, version_fault

VARIABLE = "RESHARD_PLACEMENT"
MANIFEST = "reshard_manifest.json"
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
    load_format: str
    lora: bool
    elastic: bool
    transfer: str | None  # backend of weight updates
    eplb: bool = False


def install(module: ModuleType) -> None:
    """Make VllmConfig resolve the requested placement; `module` defines VllmConfig."""
    replace_if_there(module.VllmConfig, "__post_init__", _then_resolve)


def _then_resolve(post_init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(post_init)
    def __post_init__(config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - vLLM's own name
        post_init(config, *args, **kwargs)
        if (model := config.model_config) is not None:
            if is_output(str(model.model), model.hf_config):
                refuse_placing_twice(str(model.model), str(config.parallel_config.expert_placement_strategy))
            resolve_in(config, os.environ)

    return __post_init__


def refuse_placing_twice(output: str, strategy: str) -> None:
    """UnsupportedError where vLLM's own strategy would place the experts of an output once more."""
    if strategy != "linear":
        raise UnsupportedError(
            f"{output}: this is an output of reshard, whose experts are placed already; --expert-placement-strategy "
            f"{strategy} would place them once more, and some kernels answer wrongly then; leave that option out"
        )


def resolve_in(config: Any, environment: Mapping[str, str]) -> None:
    """Put the requested placement, if any, into a VllmConfig; raise UnsupportedError if it cannot be served."""
    more = config.additional_config
    if served_placement(config) is not None or not (asked := asked_for(environment, more)):
        return
    if fault := version_fault(PLACEMENT):
        raise UnsupportedError(
            f"{VARIABLE}={asked}: placements need vLLM {VERSIONS}, {fault}; install one of these, or unset {VARIABLE}"
        )
    model = _model_of(config)
    served = resolve(asked, model)
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


def asked_for(environment: Mapping[str, str], more: Any) -> str | None:
    """The placement that the user requests, None if there is none; UnsupportedError for a malformed request.

    `more` is vLLM's additional_config.
    """
    variable = environment.get(VARIABLE) or None
    request = more.get(KEY) if isinstance(more, Mapping) else None
    if request is None:
        if variable and more is not None and not isinstance(more, Mapping):
            raise UnsupportedError(
                f"{VARIABLE}={variable}: additional_config is a {type(more).__name__}; expected a dictionary, which "
                "carries the placement to every process"
            )
        return variable
    if not isinstance(request, Mapping) or not isinstance(request.get("placement"), str):
        raise UnsupportedError(
            f'additional_config.{KEY} is {request!r:.80}; expected {{"placement": "zigzag"}}, or node-zigzag:M, or a '
            "placement file"
        )
    if unknown := sorted(set(map(str, request)) - {"placement"}):
        raise UnsupportedError(f"additional_config.{KEY}: unknown key {unknown[0]!r:.80}; expected placement only")
    asked = str(request["placement"])
    if variable and variable != asked:
        raise UnsupportedError(
            f"{VARIABLE} is {variable}, but additional_config.{KEY}.placement is {asked}: give only one, or the same "
            "for both"
        )
    return asked


def resolve(asked: str, model: Model) -> ServedPlacement:
    """Resolve the request `asked` for `model`; raise UnsupportedError if the placement cannot be served."""
    if fault := _fault(model):
        raise UnsupportedError(f"{VARIABLE}={asked}: {model.name}: {fault}")
    if asked == ZIGZAG:
        return served_strategy(asked, 1, model.num_experts, model.ep_size, model.num_layers)
    if asked.partition(":")[0] == NODE_ZIGZAG:
        return _node_zigzag(asked, model)
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
    return served_file(asked, file, model.ep_size, model.num_layers, make)


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
    return next((fault for fault, found in faults.items() if found), None)


def _node_zigzag(asked: str, model: Model) -> ServedPlacement:
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
    return served_strategy(asked, nodes, model.num_experts, model.ep_size, model.num_layers)


def _misfit(file: PlacementFile, model: Model) -> str | None:
    """Describe why a placement file does not fit the model or its number of EP ranks; None if it fits."""
    if file.num_experts != model.num_experts:
        return f"made for {file.num_experts} experts, {model.name} has {model.num_experts}"
    if file.ep_size is not None and file.ep_size != model.ep_size:
        off = "" if model.expert_parallel else " (expert parallelism is off: --enable-expert-parallel)"
        return f"made for {file.ep_size} EP ranks, served on {model.ep_size}{off}"
    if file.has_copies:
        return "it has copies of some experts, and copies cannot be served yet"
    return None


def _command(model: Model, strategy: str = ZIGZAG) -> str:
    """The command that makes a placement file for `model`."""
    needs = {"balanced": " --trace DIR", NODE_ZIGZAG: " --nodes M", "file": " --map FILE"}.get(strategy, "")
    return f"reshard export {model.name} --to vllm --ep {model.ep_size} --strategy {strategy}{needs} --out FILE"


def is_output(model: str, config: Any) -> bool:
    """Whether reshard wrote the model: its config has a contract, or its directory has a manifest."""
    return getattr(config, CONTRACT_KEY, None) is not None or Path(model, MANIFEST).is_file()


def _model_of(config: Any) -> Model:
    model, parallel = config.model_config, config.parallel_config
    text = model.hf_text_config
    transfer = getattr(config, "weight_transfer_config", None)
    return Model(
        name=str(model.model),
        num_experts=model.get_num_experts(),
        num_layers=model.get_total_num_hidden_layers(),
        n_group=getattr(text, "n_group", None) or 1,
        ep_size=ep_size_of(parallel),
        expert_parallel=bool(parallel.enable_expert_parallel),
        is_output=is_output(str(model.model), model.hf_config),
        strategy=str(parallel.expert_placement_strategy),
        load_format=str(getattr(config.load_config.load_format, "value", config.load_config.load_format)),
        lora=config.lora_config is not None,
        elastic=bool(getattr(parallel, "enable_elastic_ep", False)),
        transfer=None if transfer is None else str(transfer.backend),
        eplb=bool(parallel.enable_eplb),
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
