"""A model of one layer whose steps are predicted by hand, in numpy and from the figures in gpus.json.

It shares no code with the package.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import reshard.placement

Ids = NDArray[np.int64]
Times = NDArray[np.float64]
RANKS = 8
FACTS = json.loads((Path(__file__).parents[1] / "facts" / "deepseek-r1-layout.json").read_text())["config"]
GPUS = json.loads(Path(reshard.placement.__file__).with_name("gpus.json").read_text())
R1, SMALL = (7168, 2048), (256, 128)  # hidden size and an expert's
BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
TimeOf, Slow = Callable[[Ids], Times], Callable[[int], float]
Busiest = Callable[[Ids, TimeOf, Slow], float]
"""Seconds of the busiest rank, from each expert's tokens, a function from tokens to the seconds that they take, and one
from a rank's active experts to the seconds by which they start slowly.
"""


def build(directory: Path, experts: int, top_k: int, size: tuple[int, int]) -> Path:
    """A model of one layer with experts of R1's kind and `size`, attention and head; its files are holes."""
    hidden, width = size
    block = "model.layers.0"
    shapes: dict[str, tuple[str, list[int]]] = {
        "lm_head.weight": ("BF16", [1024, hidden]),
        f"{block}.self_attn.o_proj.weight": ("F8_E4M3", [hidden, 2 * hidden]),
        f"{block}.mlp.gate.weight": ("BF16", [experts, hidden]),
        f"{block}.mlp.gate.e_score_correction_bias": ("F32", [experts]),
    }
    for expert in range(experts):
        for name, shape in (("gate", [width, hidden]), ("up", [width, hidden]), ("down", [hidden, width])):
            shapes[f"{block}.mlp.experts.{expert}.{name}_proj.weight"] = ("F8_E4M3", shape)
    header, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    directory.mkdir()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    config = FACTS | {"n_routed_experts": experts, "num_experts_per_tok": top_k, "hidden_size": hidden}
    config |= {"num_hidden_layers": 1, "num_nextn_predict_layers": 0, "first_k_dense_replace": 0}
    config |= {"moe_intermediate_size": width}
    config.pop("auto_map")
    (directory / "config.json").write_text(json.dumps(config))
    weight_map = dict.fromkeys(shapes, "model.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def batches(ids: Ids, phase: str, size: int) -> list[Ids]:
    number = len(ids) // size
    if phase == "prefill":
        return [ids[turn * size : (turn + 1) * size] for turn in range(number)]
    return [ids[turn : number * size : number] for turn in range(number)]  # as far apart as they can be


def fixed(order: Ids) -> Busiest:
    """The busiest rank of a placement [E] without copies."""
    rank_of = np.empty(len(order), dtype=np.int64)
    rank_of[order] = np.arange(len(order)) // (len(order) // RANKS)

    def busiest(rows: Ids, time_of: TimeOf, slow: Slow) -> float:
        own = [rows[rank_of == rank] for rank in range(RANKS)]
        return float(max(time_of(mine).sum() + slow(int((mine > 0).sum())) for mine in own))

    return busiest


def seconds(ids: Ids, busiest: Busiest, phase: str, size: int, model: tuple[int, int]) -> float:
    """A step's mean time by the figures in gpus.json: its one MoE layer waits for the slowest rank; then the rest."""
    kernels, gpu = GPUS["kernels"], GPUS["gpus"]["H200"]
    hidden, width = model
    weights, top_k = 3 * hidden * width, ids.shape[1]
    read = weights / (gpu["bandwidth"] * kernels["read_share"])
    tile = 2 * weights * kernels["tile"] / (gpu["flops"]["fp8"] * kernels["flops_share"])
    row = top_k * (12 * width + 4 * hidden) / (gpu["bandwidth"] * kernels["rows_share"])
    experts = 256 if ids.max() >= 64 else 64

    def time_of(rows: Ids) -> Times:
        return np.where(rows == 0, 0, max(read, tile) + (np.ceil(rows / kernels["tile"]) - 1) * tile)

    def slow(active: int) -> float:
        return (math.sqrt(active**2 + kernels["few"] ** 2) - active) * max(read, tile) if active else 0.0

    layer = []
    for batch in batches(ids, phase, size):
        rows = np.bincount(batch.ravel(), minlength=experts)
        layer.append(kernels["launch"] + size * row + busiest(rows, time_of, slow))
    rest_weights = 2 * hidden * hidden, 1024 * hidden + experts * hidden  # in FP8, in BF16
    rest_read = (rest_weights[0] + 2 * rest_weights[1]) / RANKS / (gpu["bandwidth"] * kernels["read_share"])
    rest_flops = 2 * size * sum(rest_weights) / RANKS / (gpu["flops"]["fp8"] * kernels["flops_share"])
    sent = 2 * (12e-6 + 4 * hidden * size * (RANKS - 1) / RANKS / gpu["link"])
    passed = 10 * 2 * hidden * size / (gpu["bandwidth"] * kernels["rows_share"])
    context = 1024 * size * 2 * (512 + 64) / (gpu["bandwidth"] * kernels["read_share"]) if phase == "decode" else 0
    return sum(layer) / len(layer) + 60e-6 + max(rest_read, rest_flops) + sent + passed + context
