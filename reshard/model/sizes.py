"""How large the parts of a model are, from headers and config.json: what a model of its step time needs to know."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from ..checkpoint.directory import Checkpoint
from ..checkpoint.header import Tensor
from ..placement.time_model import ExpertShape
from .layers import MoeLayer, MoeModel
from .routing import config_sections

_NO_WEIGHTS = re.compile(r"scale|zero|g_idx|bias|shape", re.IGNORECASE)
_NOT_COMPUTED = re.compile(r"embed|vis(ual|ion)|audio|mtp\.", re.IGNORECASE)
_DRAFT = re.compile(r"mtp\.")
_LAYER = re.compile(r"layers\.([0-9]{1,9})\.")
_PACKED = {"I32": 8, "U8": 2}  # 4-bit weights in a number of this type
_DTYPES = {"F8_E4M3": "fp8", "F8_E5M2": "fp8", "I8": "int8", "U8": "fp4"}  # others, and I32, are multiplied as bf16


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of a model, in bytes unless said otherwise.

    `expert` is the mean expert. `layers` counts all layers of the model and `moe_layers` those with experts; neither
    counts MTP layers, which are no part of a step. `rest` is all that a token passes through beside experts, with
    `rest_parameters` in numbers multiplied as `rest_dtype`. `kv` is what attention keeps of a token in one layer, for
    `kv_heads` heads that ranks can share.
    """

    expert: ExpertShape
    layers: int
    moe_layers: int
    rest: int
    rest_parameters: int
    rest_dtype: str
    kv: int
    kv_heads: int


def read_sizes(checkpoint: Checkpoint, model: MoeModel) -> ModelSizes:
    """Measure `model`, which was read from `checkpoint`."""
    of_experts = [list(_of_experts(layer)) for layer in model.layers]
    names = {tensor.name for tensors in of_experts for tensor in tensors}
    layers = _number(checkpoint, "num_hidden_layers", "num_layers", "n_layers") or len(model.layers)
    rest = [tensor for name, tensor in checkpoint.tensors.items() if name not in names and _computed(name, layers)]
    every = [tensor for tensors in of_experts for tensor in tensors]
    experts = model.routing.num_experts * len(model.layers)
    parameters = _parameters(every) // experts
    hidden = _number(checkpoint, "hidden_size", "d_model", "n_embd", "dim") or max(
        (tensor.shape[-1] for layer in model.layers for tensor in layer.router), default=1
    )
    latent = _number(checkpoint, "kv_lora_rank")
    heads = _number(checkpoint, "num_key_value_heads") or 1
    width = _number(checkpoint, "head_dim") or hidden // (_number(checkpoint, "num_attention_heads") or 1)
    return ModelSizes(
        expert=ExpertShape(
            hidden=hidden,
            intermediate=max(1, parameters // (3 * hidden)),
            top_k=model.routing.top_k,
            size=sum(tensor.size for tensor in every) // experts,
            dtype=_dtype(every),
        ),
        layers=layers,
        moe_layers=sum(_computed(f"{layer.name}.", layers) for layer in model.layers),
        rest=sum(tensor.size for tensor in rest),
        rest_parameters=_parameters(rest),
        rest_dtype=_dtype(rest),
        kv=2 * (latent + (_number(checkpoint, "qk_rope_head_dim") or 0)) if latent else 2 * 2 * heads * width,
        kv_heads=1 if latent else heads,
    )


def shared_size(checkpoint: Checkpoint, model: MoeModel) -> int:
    """Bytes of all weights but experts that a server without drafts loads."""
    layers = _number(checkpoint, "num_hidden_layers", "num_layers", "n_layers") or len(model.layers)
    experts = {tensor.name for layer in model.layers for tensor in _of_experts(layer)}
    return sum(
        tensor.size
        for name, tensor in checkpoint.tensors.items()
        if name not in experts and not _DRAFT.search(name) and not _past(name, layers)
    )


def _of_experts(layer: MoeLayer) -> Iterable[Tensor]:
    yield from layer.fused
    for tensors in layer.experts:
        yield from tensors


def _computed(name: str, layers: int) -> bool:
    return not _NOT_COMPUTED.search(name) and not _past(name, layers)


def _past(name: str, layers: int) -> bool:
    """Whether the tensor belongs to a layer past the last one, as those of drafts do."""
    found = _LAYER.search(name)
    return found is not None and int(found[1]) >= layers


def _parameters(tensors: Iterable[Tensor]) -> int:
    """The numbers in `tensors` that are multiplied: weights, without scales."""
    return sum(prod(one.shape) * _PACKED.get(one.dtype, 1) for one in tensors if not _NO_WEIGHTS.search(one.name))


def _dtype(tensors: Iterable[Tensor]) -> str:
    """The type that most of the bytes are multiplied in."""
    sizes = Counter[str]()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.size
    return _DTYPES.get(sizes.most_common(1)[0][0] if sizes else "", "bf16")


def _number(checkpoint: Checkpoint, *keys: str) -> int:
    """The first whole number above 0 under `keys` in config.json, the language model's config inside first; or 0."""
    sections: list[Any] = [section for _, section in config_sections(checkpoint.config)]
    values = (section.get(key) for section in reversed(sections) for key in keys)
    return next((value for value in values if type(value) is int and value > 0), 0)
