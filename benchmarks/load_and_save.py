"""One way in which people convert checkpoints today: load every file whole, rename in memory, save by rank.

DeepSeek-V3's inference/convert.py does it this way, with safetensors.torch. Usage: load_and_save.py SRC EP OUT
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    """Convert SRC."""
    src, ep, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    out.mkdir(parents=True)
    ranks: list[dict[str, torch.Tensor]] = [{} for _ in range(ep)]
    shared: dict[str, torch.Tensor] = {}
    for path in sorted(src.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            experts = 256
            if found := re.fullmatch(r"(.*\.experts\.)(\d+)(\..*)", name):
                rank, slot = int(found[2]) % ep, int(found[2]) // ep
                ranks[rank][f"{found[1]}{rank * experts // ep + slot}{found[3]}"] = tensor
            elif re.search(r"\.gate\.(weight|e_score_correction_bias)$", name):
                order = [expert for rank in range(ep) for expert in range(rank, experts, ep)]
                shared[name] = tensor[order].contiguous()
            else:
                shared[name] = tensor
    save_file(shared, out / "shared.safetensors")
    for rank, tensors in enumerate(ranks):
        save_file(tensors, out / f"rank{rank}.safetensors")
    for path in src.glob("*.json"):
        shutil.copy(path, out)


if __name__ == "__main__":
    main()
