"""Which experts tokens choose: logical ids [T, K] for each MoE layer, as recorded, or from a checkpoint's own gates.

Random hidden states are no text: what a router has learned sends a batch of one kind of text to fewer experts. What is
measured on random traffic is therefore a lower bound on how uneven the load will be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import Checkpoint
from .errors import TraceError
from .moe import MoeLayer, MoeModel
from .recordings import Recording, read_recordings
from .trace import layer_key

if TYPE_CHECKING:
    from torch import Tensor

MOST_TOKENS = 1 << 16
RUN = 4096  # consecutive tokens that a choice of tokens keeps together: a batch is made of neighbours


@dataclass(frozen=True, slots=True)
class Traffic:
    """`ids` has for each MoE layer the logical experts that each token chose, [T, K] int64; tokens of a batch are
    neighbours. `tokens` is the largest T: layers of a recording may have lost some.
    """

    ids: dict[str, Tensor]
    tokens: int


def recorded_traffic(path: Path, model: MoeModel, root: Path, most: int = MOST_TOKENS) -> Traffic:
    """What was recorded in the directory or file `path` of the model in `root`.

    Where it is more than `most` tokens, runs of consecutive ones that are spread evenly. Layers that were not recorded
    (MTP drafts are not) are left out. Raises TraceError where nothing was recorded, or another model.
    """
    import torch

    recordings = read_recordings(path)
    total = sum(recording.tokens for recording in recordings)
    parts: dict[str, list[Tensor]] = {layer.name: [] for layer in model.layers}
    for recording in recordings:
        columns = _columns(recording, model, root)
        own = recording.tokens * min(most, total) // total
        for run in runs(recording.tokens, own):
            ids_TLK = recording.read(run.start, len(run))
            _refuse_strange(ids_TLK, columns, recording, model)
            for layer, column in columns.items():
                chosen_TK = ids_TLK[:, column]
                parts[layer].append(chosen_TK[(chosen_TK >= 0).all(dim=1)])
    ids = {layer: torch.cat(found) for layer, found in parts.items() if sum(map(len, found))}
    if not ids:
        raise TraceError(f"{path}: no token of the MoE layers of {root} is recorded there; record again")
    return Traffic(ids, max(map(len, ids.values())))


def runs(tokens: int, most: int) -> list[range]:
    """All of `tokens` tokens, or at most `most`: runs of at most RUN consecutive ones, spread evenly."""
    if tokens <= most:
        return [range(first, min(first + RUN, tokens)) for first in range(0, tokens, RUN)]
    length = min(RUN, most)
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
    named = {layer.name: layer.name for layer in model.layers}
    keyed = {key: layer.name for layer in reversed(model.layers) if (key := layer_key(layer.name))}
    columns = {}
    for column, layer in enumerate(recording.layers):
        key = layer_key(layer)
        name = named.get(layer) or (keyed.get(key) if key else None)
        if name is not None:
            columns[name] = column
        elif not recording.all_layers:
            raise TraceError(
                f"{where}: has layer {layer}, and {root} has no such MoE layer; give the trace of this model"
            )
    return columns


def _refuse_strange(ids_TLK: Tensor, columns: dict[str, int], recording: Recording, model: MoeModel) -> None:
    """TraceError where a token chose an expert that is not there."""
    ids_TLK = ids_TLK[:, list(columns.values())]
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
    return Traffic(ids, tokens)


def _choices(checkpoint: Checkpoint, model: MoeModel, layer: MoeLayer, tokens: int, seed: int) -> Tensor:
    import torch
    from safetensors import safe_open

    from .router import choose, read_routers

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
