"""Finds the MoE layers of a checkpoint: which tensors belong to which expert, and how the router chooses.

Every tensor is accounted for: it belongs to an expert, or it is indexed by expert in another way (router, fused
experts), or it has nothing to do with expert ids. A tensor that might be indexed by expert in a way not listed in
`families` is an error that names it, never a guess.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NoReturn

from ..checkpoint.directory import CONFIG, Checkpoint
from ..checkpoint.header import Tensor
from ..checkpoint.location import Location
from ..errors import CheckpointError, UnsupportedError
from .families import (
    BY_MODEL_TYPE,
    EXPERT_ID_DTYPES,
    NUM_EXPERTS_KEYS,
    REFUSED,
    ROUTER_DTYPES,
    ROUTER_TENSORS,
    SHARED_MODULES,
    WRAPPERS,
    Family,
    Role,
)
from .names import EXPERT_ID, natural_key
from .routing import Routing, config_sections, read_routing

_OF_MLX = re.compile(r"\.switch_(mlp|glu)\.")
_NUMBER = re.compile(r"[0-9]{1,9}")
_MAY_ROUTE = re.compile(r"expert|router|(^|\.)gate\.(weight|bias)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """One MoE layer; `name` is the module that holds experts and router, such as `model.layers.3.mlp`."""

    name: str
    experts: tuple[tuple[Tensor, ...], ...]  # [E] or empty: the tensors of each logical expert
    fused: tuple[Tensor, ...]  # dimension 0 is the logical expert
    router: tuple[Tensor, ...]  # one row for each logical expert
    expert_ids: tuple[Tensor, ...]  # tensors whose values are logical expert ids


@dataclass(frozen=True, slots=True)
class MoeModel:
    """A checkpoint's MoE layers in model order, and how they route."""

    family: Family
    model_type: str
    routing: Routing
    layers: tuple[MoeLayer, ...]

    @property
    def gates(self) -> tuple[str, ...]:
        """The router tensors [E, hidden] of all layers, whose rows turn a hidden state into logits."""
        of_layers = ((layer.name, tensor.name) for layer in self.layers for tensor in layer.router)
        return tuple(
            name for layer, name in of_layers if ROUTER_TENSORS[name.removeprefix(f"{layer}.")].role is Role.LOGITS
        )


@dataclass(slots=True)
class _Block:
    experts: dict[int, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    fused: list[Tensor] = field(default_factory=list)
    router: dict[str, Tensor] = field(default_factory=dict)


def read_model(checkpoint: Checkpoint) -> MoeModel:
    """Find the MoE layers of `checkpoint`.

    Raises:
        UnsupportedError: no experts, an unknown model type, or a tensor that may depend on expert ids in an unknown way
        CheckpointError: config.json contradicts the tensors, or an expert is incomplete
    """
    if mlx := next((tensor for name, tensor in checkpoint.tensors.items() if _OF_MLX.search(name)), None):
        raise UnsupportedError(
            f"{checkpoint.where(mlx)}: experts in MLX's form, which vLLM does not load either; give the checkpoint "
            "that this one was converted from"
        )
    count = _number_of_experts(checkpoint)
    if not count and not any(map(_MAY_ROUTE.search, checkpoint.tensors)):
        raise UnsupportedError(
            f"{checkpoint.root}: not a MoE model: {CONFIG} gives no number of experts, and no tensor is named like an "
            "expert's or a router's"
        )
    family, model_type = _family(checkpoint)
    blocks = _collect(checkpoint, family)
    if not blocks:
        raise CheckpointError(
            f"{checkpoint.root}: {CONFIG} says {count or model_type}, but no tensor is an expert's: expected "
            f"….{family.block}.{(*family.fused, 'experts')[0]}.…; download the checkpoint again"
        )
    routing = read_routing(checkpoint.config, family, str(checkpoint.root / CONFIG))
    layers = [_layer(checkpoint, family, name, block, routing.num_experts) for name, block in blocks.items()]
    layers.sort(key=lambda layer: natural_key(layer.name))
    return MoeModel(family, model_type, routing, tuple(layers))


def _number_of_experts(checkpoint: Checkpoint) -> str:
    """The key of config.json that gives a number of experts, with it; empty if it gives none, or none but 0 and 1."""
    for _, section in config_sections(checkpoint.config):
        for key in NUM_EXPERTS_KEYS:
            if section.get(key) not in (None, 0, 1):
                return f"{key} = {section[key]!r:.80}"
    return ""


def _family(checkpoint: Checkpoint) -> tuple[Family, str]:
    """The family and the model type. The language model's config inside must name the same family, if it names any.

    A wrapper has no family of its own: there the config inside must name one that it is known with.
    """
    where, config = checkpoint.root / CONFIG, checkpoint.config
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError(f"{where}: expected model_type to name the model's family, found {model_type!r:.80}")
    inside = [
        (key, str(section["model_type"]).removesuffix("_text").removesuffix("_thinker"), section.get("architectures"))
        for key, section in config_sections(config)
        if section is not config and section.get("model_type") is not None
    ]
    if model_type in WRAPPERS:
        expected, _ = WRAPPERS[model_type]
        _, inner, architectures = inside[0] if inside else ("", None, None)
        if inner not in expected:
            raise UnsupportedError(
                f"{where}: model type {model_type} is known around {' or '.join(expected)}, but the language model's "
                f"config inside has model type {inner!r:.80}; serve it placed instead (RESHARD_PLACEMENT=zigzag)"
            )
        family = _known(inner, architectures, where)
    else:
        family = _known(model_type, config.get("architectures"), where)
    for key, inner, architectures in inside:
        if _known(inner, architectures, where) is not family:
            raise UnsupportedError(
                f"{where}: model type {model_type} is known as {family.name}, but {key} has model type {inner!r:.80}"
            )
    return family, model_type


def _known(model_type: str, architectures: Any, where: Location) -> Family:
    """The family of that model type; families that share one are told apart by architecture."""
    names = architectures if isinstance(architectures, list) else []
    for key in (*(f"{model_type}:{name}" for name in names), model_type):
        if key in BY_MODEL_TYPE:
            return BY_MODEL_TYPE[key]
    if model_type in REFUSED:
        raise UnsupportedError(
            f"{where}: model type {model_type} cannot be renumbered exactly: its router {REFUSED[model_type]}"
        )
    if shared := [key.partition(":")[2] for key in BY_MODEL_TYPE if key.startswith(f"{model_type}:")]:
        raise UnsupportedError(
            f"{where}: model type {model_type} has several routers; expected architectures to name "
            f"{' or '.join(shared)}, found {architectures!r:.80}"
        )
    known = ", ".join(dict.fromkeys(name.partition(":")[0] for name in (*BY_MODEL_TYPE, *WRAPPERS)))
    raise UnsupportedError(
        f"{where}: reshard does not know the router of model type {model_type!r:.80}, so it cannot rewrite this model; "
        f"serve it placed instead (RESHARD_PLACEMENT=zigzag). It knows {known}"
    )


def _collect(checkpoint: Checkpoint, family: Family) -> dict[str, _Block]:
    """The tensors of each MoE block, by the block's name. Experts and routers anywhere else are refused."""
    blocks: dict[str, _Block] = defaultdict(_Block)
    others: list[Tensor] = []
    pattern = re.escape(family.block).replace(r"\*", "[0-9]+")
    is_block = cache(re.compile(rf"(?:.*\.)?{pattern}", re.DOTALL).fullmatch)  # most tensors share their block
    for name, tensor in checkpoint.tensors.items():
        if name.startswith(family.apart):
            continue
        block, found, rest = name.partition(".experts.")
        if found:
            if not is_block(block):
                _unknown(checkpoint, tensor, f"{family.name} keeps its experts in ….{family.block}.experts.…")
            if match := EXPERT_ID.fullmatch(rest):
                blocks[block].experts[int(match[1])][match[2]] = tensor
            elif any(part[:1].isdigit() for part in rest.split(".")):
                _unknown(
                    checkpoint,
                    tensor,
                    "an expert's tensor is named ….experts.<id>.<anything>; export the model under such names",
                )
            else:
                blocks[block].fused.append(tensor)
        elif (parts := _below_block(name, family, is_block)) is None:
            others.append(tensor)
        elif parts[1] in family.router:
            blocks[parts[0]].router[parts[1]] = tensor
        else:
            blocks[parts[0]].fused.append(tensor)
    for tensor in others:
        _check_other(checkpoint, family, tensor, blocks)
    return dict(blocks)


def _below_block(name: str, family: Family, is_block: Callable[[str], object]) -> tuple[str, str] | None:
    """Block and name below it of a router tensor or of fused experts; None for any other tensor."""
    for known in family.router:
        if name.endswith(f".{known}") and is_block(block := name.removesuffix(f".{known}")):
            return block, known
    block, _, leaf = name.rpartition(".")
    block, _, module = block.rpartition(".")
    return (block, f"{module}.{leaf}") if module in family.fused and is_block(block) else None


def _refuse_ids_in_names(checkpoint: Checkpoint, fused: Iterable[Tensor], num_experts: int) -> None:
    """Refuse fused tensors whose names differ in one number, if that counts all experts: each is of one expert."""
    found: dict[tuple[str, str], set[int]] = defaultdict(set)
    for tensor in fused:
        for match in _NUMBER.finditer(tensor.name):
            numbers = found[tensor.name[: match.start()], tensor.name[match.end() :]]
            numbers.add(int(match[0]))
            if len(numbers) >= num_experts and numbers.issuperset(range(num_experts)):
                _unknown(checkpoint, tensor, "there is one for each expert, and not named ….experts.<id>.<anything>")


def _check_other(checkpoint: Checkpoint, family: Family, tensor: Tensor, blocks: Mapping[str, _Block]) -> None:
    """Refuse a tensor that belongs to no expert but may depend on expert ids in a way that we do not know."""
    shared = (*SHARED_MODULES, *family.beside)
    parts = tensor.name.split(".")
    for length in range(1, len(parts)):
        if (block := ".".join(parts[:length])) in blocks:
            if parts[length] not in shared:
                known = ", ".join((*family.router, *shared))
                _unknown(checkpoint, tensor, f"beside the experts of {block} it knows only {known}")
            return
    if _MAY_ROUTE.search(tensor.name) and not set(parts) & set(family.beside):
        _unknown(checkpoint, tensor, "it is named like a router's or an expert's, but there are no experts beside it")


def _layer(checkpoint: Checkpoint, family: Family, name: str, block: _Block, num_experts: int) -> MoeLayer:
    if not block.experts and not block.fused:
        tensor = next(iter(block.router.values()))
        raise CheckpointError(
            f"{checkpoint.where(tensor)}: {name} has a router, but no experts; download the checkpoint again"
        )
    if not any(ROUTER_TENSORS[leaf].role is Role.LOGITS for leaf in block.router):
        tensors = next(iter(block.experts.values()), {}).values() or block.fused
        tensor = next(iter(tensors))
        raise CheckpointError(
            f"{checkpoint.where(tensor)}: {name} has experts, but no router: expected {name}.{family.router[0]}; "
            "download the checkpoint again"
        )
    rows, ids = [], []
    for leaf, tensor in block.router.items():
        known = ROUTER_TENSORS[leaf]
        if len(tensor.shape) != len(known.shape):
            raise CheckpointError(
                f"{checkpoint.where(tensor)}: expected {len(known.shape)} dimensions, found shape {list(tensor.shape)}"
            )
        dtypes = EXPERT_ID_DTYPES if known.role is Role.IDS else ROUTER_DTYPES
        if tensor.dtype not in dtypes:
            _unknown(checkpoint, tensor, f"expected one of {', '.join(dtypes)}, found {tensor.dtype}")
        if known.role is Role.IDS:
            ids.append(tensor)
        elif "E" in known.shape:
            rows.append(_check_rows(checkpoint, tensor, num_experts, known.shape.index("E")))
    _refuse_ids_in_names(checkpoint, block.fused, num_experts)
    # a scalar beside fused experts applies to all of them
    fused = [_check_rows(checkpoint, tensor, num_experts) for tensor in block.fused if math.prod(tensor.shape) != 1]
    experts = _check_experts(checkpoint, name, block.experts, num_experts) if block.experts else ()
    return MoeLayer(name, experts, tuple(fused), tuple(rows), tuple(ids))


def _check_rows(checkpoint: Checkpoint, tensor: Tensor, num_experts: int, dimension: int = 0) -> Tensor:
    """The tensor, if it has one row for each expert along `dimension`, and is 1 long along those before."""
    if tensor.shape[: dimension + 1] != (*[1] * dimension, num_experts):
        raise CheckpointError(
            f"{checkpoint.where(tensor)}: expected one row for each of the {num_experts} experts that {CONFIG} "
            f"gives, found shape {list(tensor.shape)}"
        )
    if tensor.size % num_experts:
        raise UnsupportedError(f"{checkpoint.where(tensor)}: its rows of {tensor.dtype} do not fill whole bytes")
    return tensor


def _check_experts(
    checkpoint: Checkpoint, name: str, experts: Mapping[int, Mapping[str, Tensor]], num_experts: int
) -> tuple[tuple[Tensor, ...], ...]:
    """The tensors of each expert, once checked: none is missing, and experts differ only in how they are quantized."""
    where = f"{checkpoint.root}: {name}"
    missing = sorted(set(range(num_experts)) - set(experts))
    if max(experts) >= num_experts:
        tensor = next(iter(experts[max(experts)].values()))
        raise CheckpointError(
            f"{checkpoint.where(tensor)}: {CONFIG} gives {num_experts} experts, 0 to {num_experts - 1}"
        )
    if missing:
        raise CheckpointError(
            f"{where}: expert {missing[0]} is missing: found {len(experts)} experts, {CONFIG} gives {num_experts}"
        )
    first_by_leaf: dict[tuple[str, str], Tensor] = {}
    # by module: each set of tensors and dtypes that some expert has, and one such expert
    variants: dict[str, dict[frozenset[tuple[str, str]], int]] = defaultdict(dict)
    for expert, tensors in experts.items():
        modules: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for leaf, tensor in tensors.items():
            modules[leaf.rpartition(".")[0]].append((leaf, tensor.dtype))
            first = first_by_leaf.setdefault((leaf, tensor.dtype), tensor)
            if first.shape != tensor.shape:
                raise CheckpointError(
                    f"{checkpoint.where(tensor)}: shape {list(tensor.shape)}, but {first.name} has {list(first.shape)}"
                )
        for module, found in modules.items():
            variants[module].setdefault(frozenset(found), expert)
    # Experts may be quantized differently and so have different tensors or dtypes. But if an expert has only part of
    # what another has, a tensor is missing.
    for module, found_by in variants.items():
        for expert, tensors in experts.items():
            own = {(leaf, tensor.dtype) for leaf, tensor in tensors.items() if leaf.rpartition(".")[0] == module}
            for variant, example in found_by.items():
                if own < variant:
                    missing_leaf = min(leaf for leaf, _ in variant - own)
                    raise CheckpointError(
                        f"{where}: tensor {name}.experts.{expert}.{missing_leaf} is missing, but expert {example} has "
                        "it; download the checkpoint again"
                    )
    return tuple(tuple(experts[expert].values()) for expert in range(num_experts))


def _unknown(checkpoint: Checkpoint, tensor: Tensor, reason: str) -> NoReturn:
    raise UnsupportedError(
        f"{checkpoint.where(tensor)}: reshard does not know how this tensor depends on expert ids: {reason}"
    )
