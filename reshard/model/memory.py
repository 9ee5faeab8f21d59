"""What copies of experts take of a GPU's memory, and what is left for the KV cache. An estimate, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoint.directory import Checkpoint
from ..placement.time_model import GpuProfile
from .layers import MoeModel
from .sizes import read_sizes, shared_size

UTILIZATION = 0.92  # vLLM 0.32's default of --gpu-memory-utilization


@dataclass(frozen=True, slots=True)
class CopiesMemory:
    """The memory of each of R GPUs that serve a model with copies, in bytes.

    Attributes:
        spare_slots: S, on each rank in each MoE layer
        redundant_experts: R * S, what vLLM calls num_redundant_experts
        copies_size: experts in the spare slots of all MoE layers but those of drafts
        buffer_size: one layer's experts of a rank, which EPLB keeps room for
        weights_size: all weights without copies, if tensor parallelism shares what is no expert evenly
        gpu_size: the GPU's memory; 0 if it is not known, and then the next two are 0
        kv_size_without: left for the KV cache without copies, by vLLM's rule: UTILIZATION of the memory, less weights.
            Activations and CUDA graphs take some more, which is not estimated.
        kv_size: left with copies; negative if they do not fit
    """

    spare_slots: int
    redundant_experts: int
    copies_size: int
    buffer_size: int
    weights_size: int
    gpu_size: int
    kv_size_without: int
    kv_size: int

    @property
    def taken(self) -> int:
        """What copies and EPLB's buffer take together."""
        return self.copies_size + self.buffer_size

    @property
    def fits(self) -> bool:
        """Whether something is left for the KV cache, as far as it is known."""
        return not self.gpu_size or self.kv_size > 0


def gigabytes(size: int) -> str:
    """A number of bytes in words."""
    return f"{size / 1e9:.1f} GB"


def copies_memory(checkpoint: Checkpoint, model: MoeModel, ep_size: int, spare: int, gpu: GpuProfile) -> CopiesMemory:
    """Estimate the memory of each of `ep_size` GPUs for `model`, which was read from `checkpoint`.

    Parameters:
        checkpoint: where the model lies
        model: the model
        ep_size: R, a divisor of E
        spare: S
        gpu: what serves

    """
    sizes = read_sizes(checkpoint, model)
    own = model.routing.num_experts // ep_size
    copies, buffer = spare * sizes.moe_layers * sizes.expert.size, (own + spare) * sizes.expert.size
    weights = own * sizes.moe_layers * sizes.expert.size + shared_size(checkpoint, model) // ep_size
    without = int(UTILIZATION * gpu.memory) - weights if gpu.memory else 0
    return CopiesMemory(
        spare_slots=spare,
        redundant_experts=ep_size * spare,
        copies_size=copies,
        buffer_size=buffer,
        weights_size=weights,
        gpu_size=int(gpu.memory),
        kv_size_without=without,
        kv_size=without - copies - buffer if gpu.memory else 0,
    )
