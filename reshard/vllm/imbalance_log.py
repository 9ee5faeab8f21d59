"""Says in the log, once a minute, how evenly a recorded step loaded the EP ranks.

It counts the rows that RESHARD_TRACE has brought to the CPU anyway, in the thread that writes them, so no step waits
for it. Without a trace nothing is counted: see docs/gpu.md for what that would cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..placement.permutations import rank_of_each
from .request import ep_size_of
from .served import served_placement

if TYPE_CHECKING:
    from torch import Tensor

EVERY_SECONDS = 60.0


@dataclass
class ImbalanceLog:
    """Counts a step now and then. `ranks_LE` has the EP rank of each id that rows hold, by layer."""

    ranks_LE: Tensor
    ep_size: int
    log: Callable[..., None]
    due: float = 0.0  # the time of the next count

    def note(self, rows: memoryview, id_size: int, top_k: int) -> None:
        """Count the rows of a step, [T, L, K] ids of `id_size` bytes, if it is time."""
        import torch

        if time.monotonic() < self.due or not len(rows):
            return
        self.due = time.monotonic() + EVERY_SECONDS
        layers = len(self.ranks_LE)
        ids = torch.frombuffer(bytearray(rows), dtype=torch.uint8 if id_size == 1 else torch.uint16)
        ids_TLK = ids.long().view(-1, layers, top_k)
        active, pairs = busiest_over_mean(ids_TLK, self.ranks_LE, self.ep_size)
        self.log(
            "a step of %d tokens: the busiest of %d EP ranks has %.2f times the mean of active experts, %.2f times the "
            "mean of pairs of token and expert (average of %d layers)",
            *(len(ids_TLK), self.ep_size, active, pairs, layers),
        )


def imbalance_log(config: Any, layers: Sequence[str], log: Callable[..., None]) -> ImbalanceLog | None:
    """The log for a VllmConfig and its MoE layers; None where a rank's rows do not tell the ranks' load."""
    import torch

    parallel = config.parallel_config
    ep_size = ep_size_of(parallel)
    if ep_size == 1 or parallel.data_parallel_size > 1 or parallel.enable_eplb:
        return None
    if parallel.expert_placement_strategy != "linear":
        return None
    num_experts = config.model_config.get_num_experts()
    served = served_placement(config)
    orders = [served.order(layer, num_experts) if served is not None else None for layer in layers]
    ranks_LE = torch.tensor([rank_of_each(order or range(num_experts), ep_size) for order in orders])
    return ImbalanceLog(ranks_LE, ep_size, log)


def busiest_over_mean(ids_TLK: Tensor, ranks_LE: Tensor, ep_size: int) -> tuple[float, float]:
    """The busiest rank over the mean, averaged over layers: of its active experts, and of its pairs.

    Parameters:
        ids_TLK: ids of the experts that tokens chose
        ranks_LE: the EP rank of each id
        ep_size: R, EP ranks
    """
    import torch

    layers, num_experts = ranks_LE.shape
    pairs_LE = torch.zeros(layers, num_experts, dtype=torch.long)
    chosen = ids_TLK.transpose(0, 1).reshape(layers, -1)
    pairs_LE.scatter_add_(1, chosen, torch.ones_like(chosen))

    def over_mean(counts_LE: Tensor) -> float:
        counts_LR = torch.zeros(layers, ep_size, dtype=torch.long).scatter_add_(1, ranks_LE, counts_LE).double()
        return float((counts_LR.amax(1) / counts_LR.mean(1)).mean())

    return over_mean((pairs_LE > 0).long()), over_mean(pairs_LE)
