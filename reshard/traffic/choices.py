"""Which experts tokens choose: logical ids [T, K] for each MoE layer, as recorded, or from a checkpoint's own gates.

Random hidden states are no text: what a router has learned sends a batch of one kind of text to fewer experts. What is
measured on random traffic is therefore a lower bound on how uneven the load will be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.directory import Checkpoint
from ..errors import TraceError
from ..model.layers import MoeLayer, MoeModel
from ..placement.layer_names import find_layer
from .recordings import Recording, counted_once, read_recordings

if TYPE_CHECKING:
    from torch import Tensor

MAX_TOKENS = 1 << 16
STRETCH = 4096  # consecutive tokens that sampling keeps together, because a batch consists of neighbours


@dataclass(frozen=True, slots=True)
class Traffic:
    """`ids` has for each MoE layer the logical experts that each token chose, [T, K] int64; tokens of a batch are
    neighbours. `tokens` is T, and `of` how many there were to choose them from.
    """

    ids: dict[str, Tensor]
    tokens: int
    of: int


def recorded_traffic(
    path: Path, model: MoeModel, root: Path, most: int = MAX_TOKENS, start: float = 0.0, end: float = 1.0
) -> Traffic:
    """What was recorded in the directory or file `path` of the model in `root`.

    Of each recording the tokens from the part `start` to the part `end` of it (0 to 1), in time; where they are more
    than `most` in all, stretches of consecutive ones, spread evenly. Layers that were not recorded (MTP drafts are
    not) are left out. Raises TraceError where nothing was recorded, or another model.
    """
    import torch

    recordings = read_recordings(path)
    spans = [range(*(math.ceil(part * recording.tokens) for part in (start, end))) for recording in recordings]
    total = counted_once(zip(recordings, map(len, spans), strict=True))
    parts: dict[str, list[Tensor]] = {layer.name: [] for layer in model.layers}
    for recording, span in zip(recordings, spans, strict=True):
        columns = _columns(recording, model, root)
        for stretch in stretches(len(span), len(span) * min(most, total) // max(total, 1)):
            ids_TLK = recording.read(span.start + stretch.start, len(stretch))[:, list(columns.values())]
            _refuse_strange(ids_TLK, recording, model)
            ids_TLK = ids_TLK[(ids_TLK >= 0).flatten(1).all(dim=1)]
            for column, layer in enumerate(columns):
                parts[layer].append(ids_TLK[:, column])
    found = {layer: torch.cat(part) for layer, part in parts.items() if part}
    tokens = min(map(len, found.values()), default=0)  # stages of a pipeline may have been cut off at different tokens
    if not tokens:
        raise TraceError(f"{path}: no token of the MoE layers of {root} is recorded there; record more")
    return Traffic({layer: ids[:tokens] for layer, ids in found.items()}, tokens, total)


def stretches(tokens: int, most: int) -> list[range]:
    """All of `tokens` tokens, or at most `most`: stretches of at most STRETCH consecutive ones, spread evenly."""
    if tokens <= most:
        return [range(first, min(first + STRETCH, tokens)) for first in range(0, tokens, STRETCH)]
    length = min(STRETCH, most)
    number = most // length if length else 0
    step = tokens // max(number, 1)
    return [range(first, first + length) for first in range((step - length) // 2, tokens, step)][:number]


def _columns(recording: Recording, model: MoeModel, root: Path) -> dict[str, int]:
    """Which of a recording's layers is which of the model's MoE layers; TraceError where it is of another model."""
    routing, where = model.routing, recording.where
    for what, found, expected in (
        ("experts in a layer", recording.num_experts or routing.num_experts, routing.num_experts),
        ("experts of a token", recording.top_k, routing.top_k),
    ):
        if found != expected:
            raise TraceError(
                f"{where}: recorded with {found} {what}, but {root} has {expected}; give the trace of this model"
            )
    names = [layer.name for layer in model.layers]
    columns = {}
    for column, layer in enumerate(recording.layers):
        name = find_layer(layer, names)
        if name is not None:
            columns[name] = column
        elif not recording.all_layers:
            raise TraceError(
                f"{where}: has layer {layer}, and {root} has no such MoE layer; give the trace of this model"
            )
    return columns


def _refuse_strange(ids_TLK: Tensor, recording: Recording, model: MoeModel) -> None:
    """TraceError where a token chose an expert that is not there."""
    if ids_TLK.numel() and int(ids_TLK.max()) >= model.routing.num_experts:
        raise TraceError(
            f"{recording.where}: has expert {int(ids_TLK.max())}, and a layer has {model.routing.num_experts}; "
            "give the trace of this model"
        )


def random_traffic(
    checkpoint: Checkpoint, model: MoeModel, tokens: int, seed: int, progress: Callable[[int], None]
) -> Traffic:
    """Route `tokens` random hidden states through the gates of every MoE layer; `progress` is told the layers done.

    Where a layer chooses by token instead (`tid2eid`), random tokens are looked up in its table.
    """
    ids = {}
    for number, layer in enumerate(model.layers):
        ids[layer.name] = _choices(checkpoint, model, layer, tokens, seed + number)
        progress(number + 1)
    return Traffic(ids, tokens, tokens)


def _choices(checkpoint: Checkpoint, model: MoeModel, layer: MoeLayer, tokens: int, seed: int) -> Tensor:
    import torch
    from safetensors import safe_open

    from ..model.router import choose, read_routers

    generator = torch.Generator().manual_seed(seed)
    for table in layer.expert_ids:
        with safe_open(checkpoint.root / table.file, framework="pt") as file:
            rows = torch.randint(table.shape[0], (tokens,), generator=generator)
            chosen_TK: Tensor = file.get_tensor(table.name).long()[rows]
            return chosen_TK
    files = {tensor.name: checkpoint.root / tensor.file for tensor in layer.router}
    router = next(read_routers(layer, files, torch.float32))
    hidden_TH = torch.randn(tokens, router.weight_EH.shape[1], generator=generator)
    logits_TE = hidden_TH @ router.weight_EH.T
    if router.logit_bias_E is not None:
        logits_TE += router.logit_bias_E
    return choose(logits_TE, router.correction_E, model.routing).experts_TK
