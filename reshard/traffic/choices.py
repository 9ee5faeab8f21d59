"""Which experts tokens choose: logical ids [T, K] for each MoE layer, from a trace or from a checkpoint's own gates.

Random hidden states are not text. A router has learned to send a batch of one kind of text to fewer experts, and which
those are decides what a placement gains: random traffic cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.directory import Checkpoint
from ..checkpoint.location import Location
from ..errors import TraceError
from ..model.layers import MoeLayer, MoeModel
from ..placement.layer_names import find_layer
from .recordings import Recording, count_distinct_tokens, read_recordings

if TYPE_CHECKING:
    from torch import Tensor

MAX_TOKENS = 1 << 16
STRETCH = 4096  # tokens; sampling takes consecutive ones, because a batch consists of neighbours


@dataclass(frozen=True, slots=True)
class Traffic:
    """The logical experts that tokens chose.

    `ids` maps each MoE layer's name to an int64 tensor [T, K]; tokens of a batch are neighbours. `tokens` is T, and
    `of` is how many tokens these were sampled from.
    """

    ids: dict[str, Tensor]
    tokens: int
    of: int


def recorded_traffic(
    path: Path, model: MoeModel, root: Location, most: int = MAX_TOKENS, start: float = 0.0, end: float = 1.0
) -> Traffic:
    """Load the traffic of the model in `root` that was recorded in the directory or file `path`.

    Takes each recording's tokens from fraction `start` to fraction `end` (0 to 1), in the order recorded. If these are
    more than `most` in all, samples stretches of consecutive tokens, spread evenly. Layers that were not recorded,
    such as those of MTP drafts, are left out. Raises TraceError if nothing was recorded, or another model was.
    """
    import torch

    recordings = read_recordings(path)
    spans = [range(math.ceil(start * found.tokens), math.ceil(end * found.tokens)) for found in recordings]
    total = count_distinct_tokens(zip(recordings, map(len, spans), strict=True))
    parts: dict[str, list[Tensor]] = {layer.name: [] for layer in model.layers}
    for recording, span in zip(recordings, spans, strict=True):
        columns = _columns(recording, model, root)
        for stretch in stretches(len(span), len(span) * min(most, total) // max(total, 1)):
            ids_TLK = recording.read(span.start + stretch.start, len(stretch))[:, list(columns.values())]
            _refuse_unknown_experts(ids_TLK, recording, model)
            ids_TLK = ids_TLK[(ids_TLK >= 0).flatten(1).all(dim=1)]
            for column, layer in enumerate(columns):
                parts[layer].append(ids_TLK[:, column])
    found = {layer: torch.cat(part) for layer, part in parts.items() if part}
    tokens = min(map(len, found.values()), default=0)  # pipeline stages may have stopped at different tokens
    if not tokens:
        raise TraceError(f"{path}: has no recorded tokens for the MoE layers of {root}; record more")
    return Traffic({layer: ids[:tokens] for layer, ids in found.items()}, tokens, total)


def stretches(tokens: int, max_tokens: int) -> list[range]:
    """Choose at most `max_tokens` of `tokens` tokens: all, or stretches spread evenly, each at most STRETCH long."""
    if tokens <= max_tokens:
        return [range(first, min(first + STRETCH, tokens)) for first in range(0, tokens, STRETCH)]
    length = min(STRETCH, max_tokens)
    count = max_tokens // length if length else 0
    step = tokens // max(count, 1)
    return [range(first, first + length) for first in range((step - length) // 2, tokens, step)][:count]


def _columns(recording: Recording, model: MoeModel, root: Location) -> dict[str, int]:
    """The column of each of the model's MoE layers in `recording`; TraceError if it is another model's."""
    routing, where = model.routing, recording.where
    for what, found, expected in (
        ("experts per layer", recording.num_experts or routing.num_experts, routing.num_experts),
        ("experts per token", recording.top_k, routing.top_k),
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
                f"{where}: has layer {layer}, but {root} has no such MoE layer; give the trace of this model"
            )
    return columns


def _refuse_unknown_experts(ids_TLK: Tensor, recording: Recording, model: MoeModel) -> None:
    """TraceError if a token chose an expert that the model does not have."""
    if ids_TLK.numel() and int(ids_TLK.max()) >= model.routing.num_experts:
        raise TraceError(
            f"{recording.where}: has expert {int(ids_TLK.max())}, but a layer has {model.routing.num_experts} experts; "
            "give the trace of this model"
        )


def random_traffic(
    checkpoint: Checkpoint, model: MoeModel, tokens: int, seed: int, progress: Callable[[int], None]
) -> Traffic:
    """Route `tokens` random hidden states through the gate of every MoE layer.

    If a layer chooses by token id instead (`tid2eid`), looks up random token ids in its table. Calls `progress` with
    the number of layers just done.
    """
    ids = {}
    for number, layer in enumerate(model.layers):
        ids[layer.name] = _choices(checkpoint, model, layer, tokens, seed + number)
        progress(1)
    return Traffic(ids, tokens, tokens)


def _choices(checkpoint: Checkpoint, model: MoeModel, layer: MoeLayer, tokens: int, seed: int) -> Tensor:
    import torch

    from ..model.router import choose, load_tensor, read_routers

    generator = torch.Generator().manual_seed(seed)
    for table in layer.expert_ids:
        rows = torch.randint(table.shape[0], (tokens,), generator=generator)
        return load_tensor(checkpoint.source, table).long()[rows]

    def load(name: str) -> Tensor:
        return load_tensor(checkpoint.source, checkpoint.tensors[name])

    router = next(read_routers(layer, load, torch.float32))
    hidden_TH = torch.randn(tokens, router.weight_EH.shape[1], generator=generator)
    logits_TE = hidden_TH @ router.weight_EH.T
    if router.logit_bias_E is not None:
        logits_TE += router.logit_bias_E
    return choose(logits_TE, router.correction_E, model.routing).experts_TK
