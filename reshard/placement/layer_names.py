"""Finds out which layer a name means. No other module reads a layer's kind or number from a module or tensor name.

One MoE layer has many names. DeepSeek-R1's draft layer is `model.layers.61.mlp` in the checkpoint; vLLM may call it
`model.layers.61.mtp_block.mlp.experts`. DeepSeek-V4's draft layer is `mtp.0.ffn`. A vision-language model has
`language_model.model.layers.3.mlp`. All names of a layer share its kind and its numbers, so these are its key.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

EXPERTS = "experts"
DRAFT = "mtp"


@dataclass(frozen=True, slots=True)
class LayerKey:
    """A layer of the model itself, or of its multi-token-prediction draft, by number.

    Most layers have one number. If a layer has several MoE blocks, each block adds its own number.
    """

    kind: Literal["layer", "draft"]
    numbers: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind} {'.'.join(map(str, self.numbers)) or 'without a number'}"


def module_name(name: str) -> str:
    """The module that holds a layer's experts: `name` up to `.experts` (`model.layers.3.mlp`).

    `name` is the name of that module, of its experts, or of an expert's tensor.
    """
    parts = name.split(".")
    return ".".join(parts[: parts.index(EXPERTS)]) if EXPERTS in parts else name


def layer_key(name: str, num_layers: int | None = None) -> LayerKey:
    """Kind and numbers of the layer that `name` means.

    Parameters:
        name: of a module or tensor of the layer
        num_layers: how many layers the model itself has (`num_hidden_layers`); later layers belong to its draft.
            None if that is unknown: then only names with `mtp` mean a draft

    Returns:
        the key, draft layers counted from 0
    """
    parts = module_name(name).split(".")
    numbers = tuple(int(part) for part in parts if part.isdecimal())
    if DRAFT in parts:
        return LayerKey("draft", numbers)
    if num_layers is not None and numbers and numbers[0] >= num_layers:
        return LayerKey("draft", (numbers[0] - num_layers, *numbers[1:]))
    return LayerKey("layer", numbers)


def find_layer(name: str, layers: Iterable[str], num_layers: int | None = None) -> str | None:
    """Find the one of `layers` that is the layer `name`; None if there is none, or more than one candidate.

    Parameters:
        name: an engine's name for the layer, its experts or one of its tensors
        layers: names of modules that hold experts
        num_layers: see `layer_key`
    """
    wanted = module_name(name)
    key = layer_key(wanted, num_layers)
    found = []
    for layer in layers:
        if layer == wanted:
            return layer
        if layer_key(layer, num_layers) == key:
            found.append(layer)
    return found[0] if len(found) == 1 else None
