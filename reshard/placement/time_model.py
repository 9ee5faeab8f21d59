"""How long a rank takes for one MoE layer and one batch, from the tokens that each of its experts gets. Pure functions.

An expert that gets at least one token is *active*: its weights must be read, however few tokens it gets. A kernel
computes an expert's rows in tiles; the first tile is computed while the weights arrive, and each further tile costs
its own time. Beside that, a layer costs the launch of its kernels and a pass over the rows of its tokens:

    time of an expert = max(bytes / bandwidth, tile) + (tiles - 1) * tile        0 without a token
    time of a rank    = launch + tokens * row + the sum over its experts + slow start
    slow start        = (sqrt(n^2 + few^2) - n) * max(bytes / bandwidth, tile)   of n active experts, 0 without one

A few experts do not keep the whole GPU busy, so the first ones are read more slowly: n of them take as long as
sqrt(n^2 + few^2) would at full speed.

So decoding waits for the rank with the most active experts, and prefill for the rank with the most tiles. A layer ends
when its slowest rank does. Apart from the slow start, a rank's time is a sum over its experts, and a search for
placements uses that sum.

What a GPU can do comes from its datasheet, and how much of that MoE kernels reach was fitted to measured kernels:
`gpus.json` has both, each with its source. Times are in seconds. Tensors carry their shape in their name: B batches,
E experts, R EP ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_GPU = "H200"
_PROFILES = Path(__file__).with_name("gpus.json")


class Kernels(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How MoE kernels use a GPU.

    `launch` is the time of a layer that has nothing to do, and `few` the experts of the slow start. The shares are
    fractions of the GPU's own figures: `read_share` of the bandwidth when experts are read, `flops_share` of the FLOP/s
    in tiles, and `rows_share` of the bandwidth when the activations of all tokens are passed over. `tile` is the rows
    of a tile. `fitted` says whether these were fitted to measured times, and `source` to which.
    """

    source: str
    fitted: bool = False
    launch: float
    few: float = 0
    read_share: float
    flops_share: float
    rows_share: float
    tile: int


class GpuProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a GPU can do: `bandwidth` of its memory and of its `link` to the node's other GPUs, one way, in bytes/s.

    `flops` has dense FLOP/s by the type of the numbers multiplied, of which bf16 is always one. `memory` is in bytes,
    0 if it is not known; where datasheets write GB, it is 2^30 bytes.
    """

    source: str
    bandwidth: float
    flops: dict[str, float]
    link: float
    memory: float = 0
    kernels: Kernels
    name: str = ""


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """One expert of a MoE layer.

    `size` is in bytes, with scales and all else that is stored for it. `dtype` is the type that it is multiplied in.
    `hidden` and `intermediate` are the sizes of its input and of its inner activations, `top_k` the experts a token
    chooses.
    """

    hidden: int
    intermediate: int
    top_k: int
    size: int
    dtype: str

    @property
    def flops(self) -> int:
        """Floating-point operations for one row: multiply and add for three matrices."""
        return 2 * 3 * self.hidden * self.intermediate

    @property
    def row_bytes(self) -> int:
        """Bytes of activations that a token's rows move, in bf16, whichever rank computes them.

        For each chosen expert: the up projection's two outputs are written and read, their product written and read,
        the down projection's output written and read.
        """
        return self.top_k * 2 * (2 * 2 * self.intermediate + 2 * self.intermediate + 2 * self.hidden)


def gpu_names() -> list[str]:
    """The GPUs that reshard has a profile of."""
    return list(_known())


def read_gpu(name: str) -> GpuProfile:
    """The profile of a GPU: one of `gpu_names`, or of a JSON file.

    A file has the fields of `GpuProfile`. Without `kernels` it gets those fitted on the H200. Raises OutputError if
    there is no such GPU, or the file is not a profile.
    """
    known = _known()
    if name in known:
        return known[name]
    path = Path(name)
    if not path.is_file():
        raise OutputError(
            f"--gpu {name}: not a GPU that reshard knows, nor a file; expected {', '.join(known)} or a JSON"
        )
    try:
        given = msgspec.json.decode(path.read_bytes())
        if isinstance(given, dict):
            given = {"kernels": msgspec.to_builtins(next(iter(known.values())).kernels), "name": path.stem} | given
        profile = msgspec.convert(given, GpuProfile)
    except (OSError, msgspec.MsgspecError) as error:
        raise OutputError(f"{path}: not the profile of a GPU: {error}; see reshard/placement/gpus.json") from error
    kernels = profile.kernels
    shares = (kernels.tile, kernels.read_share, kernels.flops_share, kernels.rows_share)
    figures = (profile.bandwidth, profile.link, *profile.flops.values(), *shares)
    if "bf16" not in profile.flops or min(figures) <= 0 or min(kernels.launch, kernels.few, profile.memory) < 0:
        raise OutputError(f"{path}: expected figures above 0, and bf16 among flops; found {given!r:.200}")
    return profile


def _known() -> dict[str, GpuProfile]:
    found = msgspec.json.decode(_PROFILES.read_bytes())
    return {
        name: msgspec.convert({**gpu, "name": name, "kernels": found["kernels"]}, GpuProfile)
        for name, gpu in found["gpus"].items()
    }


def expert_times(count_BE: Tensor, expert: ExpertShape, gpu: GpuProfile) -> Tensor:
    """Seconds that each expert adds to its rank.

    Parameters:
        count_BE: tokens that chose each expert, in each batch; any shape
        expert: its size
        gpu: what computes it

    Returns:
        time_BE: as `count_BE`, float64
    """
    tiles_BE = (count_BE / gpu.kernels.tile).ceil().double()
    return (_first_tile(expert, gpu) + (tiles_BE - 1) * _tile(expert, gpu)) * (tiles_BE > 0)


def rank_times(
    count_BE: Tensor, rank_E: Tensor, ep_size: int, tokens_B: Tensor, expert: ExpertShape, gpu: GpuProfile
) -> Tensor:
    """Seconds of each rank for one MoE layer.

    Parameters:
        count_BE: tokens of each batch that chose each expert
        rank_E: the rank of each logical expert
        ep_size: R
        tokens_B: the tokens that each rank is given: all of the batch, unless all-to-all kernels send it only those
            that chose its experts; then [B, R]
        expert: its size
        gpu: what computes it

    Returns:
        time_BR
    """
    import torch

    time_BE = expert_times(count_BE, expert, gpu)
    time_BR = time_BE.new_zeros(len(time_BE), ep_size).index_add_(1, rank_E, time_BE)
    active_BR = torch.zeros_like(time_BR).index_add_(1, rank_E, (count_BE > 0).double())
    slow_BR = (active_BR.square() + gpu.kernels.few**2).sqrt() - active_BR
    time_BR += slow_BR * (active_BR > 0) * _first_tile(expert, gpu)
    tokens_BR = tokens_B if tokens_B.dim() == 2 else tokens_B.unsqueeze(1)
    return time_BR + row_time(expert, gpu) * tokens_BR.double() + gpu.kernels.launch


def _first_tile(expert: ExpertShape, gpu: GpuProfile) -> float:
    """Seconds to read an expert, and to compute its first tile meanwhile."""
    return max(expert.size / (gpu.bandwidth * gpu.kernels.read_share), _tile(expert, gpu))


def _tile(expert: ExpertShape, gpu: GpuProfile) -> float:
    """Seconds to compute a tile of an expert's rows."""
    return gpu.kernels.tile * expert.flops / (flops(gpu, expert.dtype) * gpu.kernels.flops_share)


def row_time(expert: ExpertShape, gpu: GpuProfile) -> float:
    """Seconds that a layer takes for each token that a rank is given, beside its experts."""
    return expert.row_bytes / (gpu.bandwidth * gpu.kernels.rows_share)


def flops(gpu: GpuProfile, dtype: str) -> float:
    """Dense FLOP/s for numbers of `dtype`; those of bf16 if the GPU cannot multiply `dtype`."""
    return gpu.flops.get(dtype, gpu.flops["bf16"])
