"""Which layer a name means: the one place that reads a layer's kind and number from a module's or a tensor's name.

The same MoE layer has many names. DeepSeek-R1's draft layer is `model.layers.61.mlp` in the checkpoint; vLLM may call
it `model.layers.61.mtp_block.mlp.experts`. DeepSeek-V4 calls its own `mtp.0.ffn`. A model that sees has
`language_model.model.layers.3.mlp`. What they share is the kind and the numbers, and those make the key.
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

    Most layers have one number. Where a layer has several MoE blocks, those add their own.
    """

    kind: Literal["layer", "draft"]
    numbers: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind} {'.'.join(map(str, self.numbers)) or 'without a number'}"


def module_name(name: str) -> str:
    """The module that holds a layer's experts: `name` up to its experts (`model.layers.3.mlp`).

    `name` is that of the module, of its experts, or of a tensor of an expert.
    """
    parts = name.split(".")
    return ".".join(parts[: parts.index(EXPERTS)]) if EXPERTS in parts else name


def layer_key(name: str, num_layers: int | None = None) -> LayerKey:
    """Kind and numbers of the layer that `name` means.

    Parameters:
        name: of a module or tensor of the layer
        num_layers: how many layers the model itself has (`num_hidden_layers`); a layer from there on is its draft's.
            None where that is not known: then only a name that says `mtp` means a draft

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
    """The one of `layers` that is the layer `name`, None where none is, or more than one might be.

    Parameters:
        name: what an engine calls the layer, its experts or one of its tensors
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
