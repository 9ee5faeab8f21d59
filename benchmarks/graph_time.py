"""Times CUDA graphs that hold one layer's work many times, as a decoding step does."""

from __future__ import annotations

import torch

LAYERS, REPLAYS = 58, 10  # R1 has 58 MoE layers


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    """The time of one of a graph's `LAYERS` layers."""
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    for _ in range(REPLAYS):
        graph.replay()
    after.record()
    after.synchronize()
    return 1000 * before.elapsed_time(after) / REPLAYS / LAYERS
