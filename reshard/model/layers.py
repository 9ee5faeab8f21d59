"""Which tensor is which expert's, and how the model routes: a checkpoint read as a mixture of experts.

Every tensor is accounted for: an expert's, indexed by expert in another way, or none of an expert's business. One that
might be indexed by expert in a way not listed in `families` is an error that names it, never a guess.
"""

from __future__ import annotations

import math
import re
import sys
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, NoReturn

from ..checkpoint.directory import CONFIG, Checkpoint
from ..checkpoint.header import Tensor
from ..errors import CheckpointError, UnsupportedError
from .families import (
    BY_MODEL_TYPE,
    EXPERT_ID_DTYPES,
    GROUP_KEYS,
    NUM_EXPERTS_KEYS,
    ROUTER_DTYPES,
    ROUTER_MODULES,
    ROUTER_TENSORS,
    ROUTING_KEYS,
    SCORING_KEYS,
    SCORINGS,
    SHARED_MODULES,
    TEXT_CONFIG_KEYS,
    TOP_K_KEYS,
    TOPK_METHODS,
    Family,
    Indexed,
)

_EXPERT_ID = re.compile(r"(0|[1-9][0-9]{0,8})\.(.+)", re.DOTALL)
_NAMES_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")
_MAY_ROUTE = re.compile(r"expert|router|(^|\.)gate\.(weight|bias)$", re.IGNORECASE)
_LIMITS_GROUPS = re.compile(
    r"(expert|limited|top_?k|moe|rout).*group|group.*(expert|limited|top_?k|moe|rout)", re.IGNORECASE
)
_NUMBER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Routing:
    """How a router chooses `top_k` of E experts for a token."""

    num_experts: int
    top_k: int
    scoring: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    n_group: int
    topk_group: int

    @property
    def group_limited(self) -> bool:
        """Whether a token's experts come from its `topk_group` best groups of E / n_group consecutive experts only."""
        return self.n_group > 1 and self.topk_group < self.n_group


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """One MoE layer; `name` is the module that holds experts and router, such as `model.layers.3.mlp`."""

    name: str
    experts: tuple[tuple[Tensor, ...], ...]  # [E] or empty: the tensors of each logical expert
    fused: tuple[Tensor, ...]  # dimension 0 is the logical expert
    router: tuple[Tensor, ...]  # likewise
    expert_ids: tuple[Tensor, ...]  # their values are logical experts


@dataclass(frozen=True, slots=True)
class MoeModel:
    """A checkpoint's MoE layers in model order, and how they route."""

    family: Family
    model_type: str
    routing: Routing
    layers: tuple[MoeLayer, ...]


@dataclass(slots=True)
class _Block:
    experts: dict[int, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    fused: list[Tensor] = field(default_factory=list)
    router: dict[str, Tensor] = field(default_factory=dict)


def read_model(checkpoint: Checkpoint) -> MoeModel:
    """Find the MoE layers of `checkpoint`.

    Raises:
        UnsupportedError: no experts, an unknown model type, or a tensor that may depend on expert ids in an unknown way
        CheckpointError: config.json at odds with the tensors, or an expert that is incomplete
    """
    if not any(_NAMES_EXPERTS.search(name) for name in checkpoint.tensors):
        raise UnsupportedError(f"{checkpoint.root}: a model without experts: no tensor is named ….experts.…")
    family, model_type = _family(checkpoint)
    routing = read_routing(checkpoint.config, family, str(checkpoint.root / CONFIG))
    blocks = _collect(checkpoint, family)
    layers = [_layer(checkpoint, name, block, routing.num_experts) for name, block in blocks.items()]
    layers.sort(key=lambda layer: natural_key(layer.name))
    return MoeModel(family, model_type, routing, tuple(layers))


class ExpertName(NamedTuple):
    """A tensor's name, taken apart: `<layer>.experts.<expert>.<leaf>`."""

    layer: str
    expert: int
    leaf: str

    def __str__(self) -> str:
        """The name, put together."""
        return f"{self.layer}.experts.{self.expert}.{self.leaf}"


def parse_expert_name(name: str, layers: Container[str]) -> ExpertName | None:
    """Take the name of an expert's tensor apart; None for any other. `layers` are the names of the MoE layers."""
    layer, _, rest = name.partition(".experts.")
    match = _EXPERT_ID.fullmatch(rest)
    return ExpertName(layer, int(match[1]), match[2]) if match and layer in layers else None


def renumber(name: str, tables: Mapping[str, Sequence[int]]) -> str:
    """`name` with its expert id mapped by its layer's table; a name that is no expert's stays as it is."""
    parsed = parse_expert_name(name, tables)
    if parsed is None or parsed.expert >= len(tables[parsed.layer]):
        return name
    return str(ExpertName(parsed.layer, tables[parsed.layer][parsed.expert], parsed.leaf))


def why_plugin(routing: Routing) -> str:
    """Whether an output of a model that routes like this needs the plugin, and why, in a sentence."""
    if routing.group_limited:
        return (
            f"needed: each token's experts come from {routing.topk_group} of {routing.n_group} groups of "
            f"{routing.num_experts // routing.n_group} consecutive experts, and only the plugin knows the groups "
            "after renumbering"
        )
    return "not needed: the router treats every expert alike, so any engine serves the output as it is"


class Kind(Enum):
    """What a tensor is of."""

    EXPERT = "expert"
    ROUTER = "router"
    SHARED = "everything else"


def kind_of(name: str, layers: Container[str]) -> Kind:
    """What the tensor `name` is of, in a model whose MoE layers are `layers`."""
    layer, _, rest = name.partition(".experts.")
    if rest and layer in layers:
        return Kind.EXPERT
    layer, _, leaf = name.rpartition(".")[0].rpartition(".")
    return Kind.ROUTER if leaf in ROUTER_MODULES and layer in layers else Kind.SHARED


def natural_key(name: str) -> list[tuple[bool, int, str]]:
    """Sorts `layers.10` after `layers.9`, and `mtp.0` after all layers."""
    return [(False, int(part), part) if _NUMBER.fullmatch(part) else (True, 0, part) for part in name.split(".")]


def routing_section(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What `config` says of routing, at its top and where models that see or hear keep their language model's config.

    Raises CheckpointError where two places disagree, since engines differ in which they read, and UnsupportedError
    where a key that is not known may limit which groups of experts a token can reach.
    """
    sections = [config, *(config[key] for key in TEXT_CONFIG_KEYS if isinstance(config.get(key), dict))]
    found: dict[str, Any] = {}
    for section in sections:
        for key in ROUTING_KEYS:
            if section.get(key) is not None and found.setdefault(key, section[key]) != section[key]:
                raise CheckpointError(
                    f"{where}: {key} is {found[key]!r:.80} in one place and {section[key]!r:.80} in another"
                )
        for key, value in section.items():
            if _LIMITS_GROUPS.search(key) and key not in GROUP_KEYS and value not in (None, False, 0, 1):
                raise UnsupportedError(
                    f"{where}: {key} = {value!r:.80} may limit which experts a token can reach, in a way that "
                    "reshard does "
                    f"not know; known are {' and '.join(GROUP_KEYS)}"
                )
    return found


def read_routing(whole_config: Mapping[str, Any], family: Family, where: str) -> Routing:
    """The routing that a config.json asks for; `where` names the file in errors."""
    config = routing_section(whole_config, where)
    limited = config.get("topk_method") == "group_limited_greedy"
    num_experts = _count(config, NUM_EXPERTS_KEYS, where)
    top_k = _count(config, TOP_K_KEYS, where)
    n_group = _count(config, ("n_group",), where, default=None if family.assumes_groups or limited else 1)
    topk_group = _count(config, ("topk_group",), where, default=n_group if n_group == 1 else None)
    if top_k > num_experts:
        raise CheckpointError(f"{where}: a token chooses {top_k} experts, but a layer has {num_experts}")
    if num_experts % n_group:
        raise CheckpointError(
            f"{where}: n_group = {n_group} does not divide the {num_experts} experts into equal groups"
        )
    if topk_group > n_group:
        raise CheckpointError(f"{where}: topk_group = {topk_group} is more than n_group = {n_group}")
    if top_k > topk_group * (num_experts // n_group):
        raise CheckpointError(
            f"{where}: a token chooses {top_k} experts, but topk_group = {topk_group} groups "
            f"of {num_experts // n_group} hold fewer"
        )
    return Routing(
        num_experts=num_experts,
        top_k=top_k,
        scoring=_scoring(config, family, where),
        norm_topk_prob=bool(config.get("norm_topk_prob", True)),
        routed_scaling_factor=_scaling_factor(config, where),
        n_group=n_group,
        topk_group=topk_group,
    )


def _scoring(config: Mapping[str, Any], family: Family, where: str) -> str:
    for keys, known in ((SCORING_KEYS, SCORINGS), (("topk_method",), TOPK_METHODS)):
        for key in keys:
            if config.get(key) is not None and config[key] not in known:
                raise UnsupportedError(
                    f"{where}: {key} = {config[key]!r:.80} is no way to choose experts that reshard knows; "
                    f"known are {', '.join(known)}"
                )
    return next((config[key] for key in SCORING_KEYS if config.get(key) is not None), family.scoring)


def _scaling_factor(config: Mapping[str, Any], where: str) -> float:
    value = config.get("routed_scaling_factor")
    if value is None:
        return 1.0
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise CheckpointError(f"{where}: routed_scaling_factor must be a number, found {str(value)[:80]!r}")
    return float(value)


def _family(checkpoint: Checkpoint) -> tuple[Family, str]:
    """The family, by the model type or that of its language model, and the model type."""
    where, config = checkpoint.root / CONFIG, checkpoint.config
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError(f"{where}: expected model_type to name the model's family, found {model_type!r:.80}")
    inner = [config[key].get("model_type") for key in TEXT_CONFIG_KEYS if isinstance(config.get(key), dict)]
    names = [model_type, *(str(name).removesuffix("_text") for name in inner)]
    family = next((BY_MODEL_TYPE[name] for name in names if name in BY_MODEL_TYPE), None)
    if family is None:
        raise UnsupportedError(
            f"{where}: model type {model_type!r:.80} is not one whose router reshard knows; known are "
            f"{', '.join(BY_MODEL_TYPE)}"
        )
    return family, model_type


def _count(config: Mapping[str, Any], keys: Sequence[str], where: str, default: int | None = None) -> int:
    found = {key: config[key] for key in keys if config.get(key) is not None}
    if not found and default is not None:
        return default
    if not found:
        raise CheckpointError(f"{where}: expected a value for {' or '.join(keys)}, found none")
    for key, value in found.items():
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{where}: {key} must be a whole number of at least 1, found {value!r:.80}")
    if len(set(found.values())) > 1:
        raise CheckpointError(f"{where}: " + " but ".join(f"{key} = {value}" for key, value in found.items()))
    return int(next(iter(found.values())))


def _collect(checkpoint: Checkpoint, family: Family) -> dict[str, _Block]:
    """Every tensor of the MoE blocks, by the block's name. Experts or routers elsewhere are refused."""
    blocks: dict[str, _Block] = defaultdict(_Block)
    others: list[Tensor] = []
    for name, tensor in checkpoint.tensors.items():
        block, found, rest = name.partition(".experts.")
        if found:
            if not f".{block}".endswith(f".{family.block}"):
                _unknown(checkpoint, tensor, f"{family.name} keeps its experts in ….{family.block}.experts.…")
            if match := _EXPERT_ID.fullmatch(rest):
                blocks[block].experts[int(match[1])][match[2]] = tensor
            elif rest[:1].isdigit():
                _unknown(checkpoint, tensor, "an expert's tensor is named ….experts.<id>.<anything>")
            else:
                blocks[block].fused.append(tensor)
        else:
            others.append(tensor)
    for tensor in others:
        block, _, module = tensor.name.rpartition(".")[0].rpartition(".")
        if module in ROUTER_MODULES and f".{block}".endswith(f".{family.block}"):
            blocks[block].router[tensor.name.removeprefix(f"{block}.")] = tensor
    for tensor in others:
        _check_other(checkpoint, tensor, blocks)
    return dict(blocks)


def _check_other(checkpoint: Checkpoint, tensor: Tensor, blocks: Mapping[str, _Block]) -> None:
    """Refuse a tensor that is no expert's, and neither a known router tensor nor one that every token goes through."""
    parts = tensor.name.split(".")
    for length in range(1, len(parts)):
        if (block := ".".join(parts[:length])) in blocks:
            router = tensor.name.removeprefix(f"{block}.") in blocks[block].router
            if not router and parts[length] not in SHARED_MODULES:
                known = ", ".join(SHARED_MODULES)
                _unknown(checkpoint, tensor, f"known beside the experts of {block} are its router and {known}")
            return
    if _MAY_ROUTE.search(tensor.name):
        _unknown(checkpoint, tensor, "it is named like a router's or an expert's, but stands beside no experts")


def _layer(checkpoint: Checkpoint, name: str, block: _Block, num_experts: int) -> MoeLayer:
    if not block.experts and not block.fused:
        tensor = next(iter(block.router.values()))
        raise CheckpointError(
            f"{checkpoint.where(tensor)}: a router, but no expert of {name} is there; download the checkpoint again"
        )
    if not any(f"{module}.weight" in block.router for module in ROUTER_MODULES):
        first = next(iter(block.experts.values()), {}).values() or block.fused
        tensor = next(iter(first))
        raise CheckpointError(
            f"{checkpoint.where(tensor)}: {name} has experts, but neither {name}.gate.weight nor "
            f"{name}.router.weight is there"
        )
    if len({leaf.partition(".")[0] for leaf in block.router}) > 1:
        _unknown(checkpoint, next(iter(block.router.values())), f"{name} has both a gate and a router")
    rows, ids = [], []
    for leaf, tensor in block.router.items():
        known = ROUTER_TENSORS.get(leaf.partition(".")[2])
        if known is None:
            _unknown(checkpoint, tensor, f"known beside a router are {', '.join(ROUTER_TENSORS)}")
        if len(tensor.shape) != known.dimensions:
            raise CheckpointError(
                f"{checkpoint.where(tensor)}: expected {known.dimensions} dimensions, found shape {list(tensor.shape)}"
            )
        dtypes = ROUTER_DTYPES if known.indexed is Indexed.ROWS else EXPERT_ID_DTYPES
        if tensor.dtype not in dtypes:
            _unknown(checkpoint, tensor, f"expected one of {', '.join(dtypes)}, found {tensor.dtype}")
        if known.indexed is Indexed.ROWS:
            rows.append(_check_rows(checkpoint, tensor, num_experts))
        else:
            ids.append(tensor)
    # a scalar beside fused experts is one for all of them
    fused = [_check_rows(checkpoint, tensor, num_experts) for tensor in block.fused if math.prod(tensor.shape) != 1]
    experts = _check_experts(checkpoint, name, block.experts, num_experts) if block.experts else ()
    return MoeLayer(name, experts, tuple(fused), tuple(rows), tuple(ids))


def _check_rows(checkpoint: Checkpoint, tensor: Tensor, num_experts: int) -> Tensor:
    if not tensor.shape or tensor.shape[0] != num_experts:
        raise CheckpointError(
            f"{checkpoint.where(tensor)}: expected one row for each of the {num_experts} experts that {CONFIG} "
            f"gives, found shape {list(tensor.shape)}"
        )
    if tensor.size % num_experts:
        raise UnsupportedError(f"{checkpoint.where(tensor)}: its rows of {tensor.dtype} do not begin at whole bytes")
    return tensor


def _check_experts(
    checkpoint: Checkpoint, name: str, experts: Mapping[int, Mapping[str, Tensor]], num_experts: int
) -> tuple[tuple[Tensor, ...], ...]:
    """The tensors of each expert, checked to be all there, and alike up to how they are quantized."""
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
    shapes: dict[tuple[str, str], Tensor] = {}
    variants: dict[str, dict[frozenset[tuple[str, str]], int]] = defaultdict(dict)
    for expert, tensors in experts.items():
        modules: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for leaf, tensor in tensors.items():
            modules[leaf.rpartition(".")[0]].append((leaf, tensor.dtype))
            like = shapes.setdefault((leaf, tensor.dtype), tensor)
            if like.shape != tensor.shape:
                raise CheckpointError(
                    f"{checkpoint.where(tensor)}: shape {list(tensor.shape)}, but {like.name} has {list(like.shape)}"
                )
        for module, found in modules.items():
            variants[module].setdefault(frozenset(found), expert)
    # Experts may be quantized differently, so that they have other tensors or dtypes; none may have only a part of
    # what another has.
    for module, found_by in variants.items():
        for expert, tensors in experts.items():
            own = {(leaf, tensor.dtype) for leaf, tensor in tensors.items() if leaf.rpartition(".")[0] == module}
            for variant, example in found_by.items():
                if own < variant:
                    lacking = min(leaf for leaf, _ in variant - own)
                    raise CheckpointError(
                        f"{where}: tensor {name}.experts.{expert}.{lacking} is missing; expert {example} has its own"
                    )
    return tuple(tuple(experts[expert].values()) for expert in range(num_experts))


def _unknown(checkpoint: Checkpoint, tensor: Tensor, reason: str) -> NoReturn:
    raise UnsupportedError(
        f"{checkpoint.where(tensor)}: reshard does not know how it depends on the expert ids: {reason}"
    )
