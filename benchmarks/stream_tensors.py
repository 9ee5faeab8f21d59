"""Another way in which people convert checkpoints today: load and write one tensor after the other, file by file.

Usage: stream_tensors.py SRC EP OUT
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

DTYPE_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}


def main() -> None:
    """Convert SRC."""
    src, ep, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    out.mkdir(parents=True)
    experts = 256
    order = [expert for rank in range(ep) for expert in range(rank, experts, ep)]
    for path in sorted(src.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened, (out / path.name).open("wb") as target:
            entries: dict[str, Any] = {}
            end = 0
            for name in opened.keys():  # noqa: SIM118  not a dictionary
                part = opened.get_slice(name)
                size = DTYPE_BYTES[part.get_dtype()]
                for length in part.get_shape():
                    size *= length
                entries[renamed(name, order)] = {
                    "dtype": part.get_dtype(),
                    "shape": part.get_shape(),
                    "data_offsets": [end, end + size],
                }
                end += size
            header = json.dumps(entries).encode()
            target.write(struct.pack("<Q", len(header)) + header)
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                if re.search(r"\.gate\.(weight|e_score_correction_bias)$", name):
                    tensor = tensor[order].contiguous()
                target.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    for path in src.glob("*.json"):
        shutil.copy(path, out)


def renamed(name: str, order: list[int]) -> str:
    """The tensor's name after renumbering."""
    found = re.fullmatch(r"(.*\.experts\.)(\d+)(\..*)", name)
    return f"{found[1]}{order.index(int(found[2]))}{found[3]}" if found else name


if __name__ == "__main__":
    main()
