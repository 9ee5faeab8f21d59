"""Which experts tokens choose: logical ids [T, K] for each MoE layer, here from a checkpoint's own gates.

Random hidden states are no text: what a router has learned sends a batch of one kind of text to fewer experts. What is
measured on this traffic is therefore a lower bound on how uneven the load will be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .checkpoint import Checkpoint
from .moe import MoeLayer, MoeModel

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Traffic:
    """`ids` has for each MoE layer the logical experts that each token chose, [T, K] int64."""

    ids: dict[str, Tensor]
    tokens: int


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
