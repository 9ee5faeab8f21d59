"""The recommendation of `analyze` on ten traces whose best answer is known, by construction or by counting.

The oracle computes every batch in numpy from the placements themselves and from the figures in gpus.json. It shares no
code with the package.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run_well
from numpy.typing import NDArray
from oracle import zigzag
from safetensors.torch import load_file
from traces import write_trace

import reshard.placement

Ids = NDArray[np.int64]
RANKS, TOKENS = 8, 8192
DATA = Path(__file__).parents[1]
LEARNED = load_file(DATA / "data" / "routing.safetensors")
FACTS = json.loads((DATA / "facts" / "deepseek-r1-layout.json").read_text())["config"]
GPUS = json.loads(Path(reshard.placement.__file__).with_name("gpus.json").read_text())
R1, SMALL = (7168, 2048), (256, 128)  # hidden size and an expert's
BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


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


# Traffic


def liking(weights: Sequence[float], top_k: int = 8) -> Ids:
    """Tokens that choose `top_k` different experts, each with a chance that follows its weight."""
    noise = np.random.default_rng(0).gumbel(size=(TOKENS, len(weights)))
    return np.argsort(-(np.log(weights) + noise), axis=1)[:, :top_k].astype(np.int64)


def even() -> Ids:
    return liking([1.0] * 256)


def two_hot_groups() -> Ids:
    """Linear puts all that is hot on two ranks; zigzag deals it to all."""
    return liking([50.0 if expert < 64 else 1.0 for expert in range(256)])


def every_eighth_hot() -> Ids:
    """Zigzag puts all that is hot on one rank; linear has it everywhere."""
    return liking([50.0 if expert % 8 == 0 else 1.0 for expert in range(256)])


def hot_on_the_first_rank_of_both() -> Ids:
    return liking([50.0 if expert < 32 or expert % 8 == 0 else 1.0 for expert in range(256)])


def busy_group_none_idle() -> Ids:
    """One group has three times the pairs, and at 512 tokens every expert has some."""
    return liking([3.0 if expert < 32 else 1.0 for expert in range(256)])


def learned(layer: int) -> Ids:
    """Recorded: a small model's own routing of text, 64 experts, 6 chosen."""
    return LEARNED["python"][layer].numpy().astype(np.int64)[:TOKENS]


# The oracle


def batches(ids: Ids, phase: str, size: int) -> list[Ids]:
    number = len(ids) // size
    if phase == "prefill":
        return [ids[turn * size : (turn + 1) * size] for turn in range(number)]
    return [ids[turn : number * size : number] for turn in range(number)]  # as far apart as they can be


def seconds(ids: Ids, rank_of: Ids, phase: str, size: int, model: tuple[int, int]) -> float:
    """A step's mean time by the figures in gpus.json: its one MoE layer waits for the slowest rank; then the rest."""
    kernels, gpu = GPUS["kernels"], GPUS["gpus"]["H200"]
    hidden, width = model
    weights, top_k = 3 * hidden * width, ids.shape[1]
    read = weights / (gpu["bandwidth"] * kernels["read_share"])
    tile = 2 * weights * kernels["tile"] / (gpu["flops"]["fp8"] * kernels["flops_share"])
    row = top_k * (12 * width + 4 * hidden) / (gpu["bandwidth"] * kernels["rows_share"])
    layer = []
    for batch in batches(ids, phase, size):
        rows = np.bincount(batch.ravel(), minlength=len(rank_of))
        each = np.where(rows == 0, 0, max(read, tile) + (np.ceil(rows / kernels["tile"]) - 1) * tile)
        layer.append(kernels["launch"] + size * row + max(each[rank_of == rank].sum() for rank in range(RANKS)))
    rest_weights = 2 * hidden * hidden, 1024 * hidden + len(rank_of) * hidden  # in FP8, in BF16
    rest_read = (rest_weights[0] + 2 * rest_weights[1]) / RANKS / (gpu["bandwidth"] * kernels["read_share"])
    rest_flops = 2 * size * sum(rest_weights) / RANKS / (gpu["flops"]["fp8"] * kernels["flops_share"])
    sent = 2 * (12e-6 + 4 * hidden * size * (RANKS - 1) / RANKS / gpu["link"])
    passed = 10 * 2 * hidden * size / (gpu["bandwidth"] * kernels["rows_share"])
    context = 1024 * size * 2 * (512 + 64) / (gpu["bandwidth"] * kernels["read_share"]) if phase == "decode" else 0
    return sum(layer) / len(layer) + 60e-6 + max(rest_read, rest_flops) + sent + passed + context


def best(
    placed: Mapping[str, Sequence[int]], ids: Ids, mix: str, model: tuple[int, int]
) -> tuple[str, dict[str, float]]:
    """The simplest placement that is within half a percent of the best; linear unless 1 % is saved."""
    experts = len(placed["linear"])
    times: dict[str, list[float]] = {name: [] for name in placed}
    for part in mix.split(";"):
        phase, sizes = part.split(":")
        for size in map(int, sizes.split(",")):
            for name, order in placed.items():
                rank_of = np.empty(experts, dtype=np.int64)
                rank_of[np.array(order)] = np.arange(experts) // (experts // RANKS)
                times[name].append(seconds(ids, rank_of, phase, size, model))
    saved = {
        name: 1 - sum(mine / linear for mine, linear in zip(of, times["linear"], strict=True)) / len(of)
        for name, of in times.items()
    }
    most = max(saved.values())
    return next(name for name in placed if most < 0.01 or saved[name] >= most - 0.005), saved


MIX = "decode:16;prefill:2048"
CASES: dict[str, tuple[Callable[[], Ids], str, tuple[int, int], str | None, str]] = {
    "even": (even, MIX, R1, "linear", "do not bother"),
    "two hot groups": (two_hot_groups, MIX, R1, "zigzag", "serve placed zigzag"),
    "every eighth is hot": (every_eighth_hot, MIX, R1, "linear", "zigzag adds"),
    "hot on the first rank of linear and of zigzag": (
        hot_on_the_first_rank_of_both,
        MIX,
        R1,
        "balanced",
        "placed balanced",
    ),
    "a busy group, prefill": (busy_group_none_idle, "prefill:2048", R1, "zigzag", "serve placed zigzag"),
    "a busy group, decoding 512": (busy_group_none_idle, "decode:512", R1, "linear", "do not bother"),
    "two hot groups of tiny experts": (two_hot_groups, "decode:8", SMALL, "linear", "do not bother"),
    "recorded, one layer": (lambda: learned(0), MIX, R1, None, "serve"),
    "recorded, another layer": (lambda: learned(1), MIX, R1, None, "serve"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_recommendation_is_the_best_answer(case: str, tmp_path: Path) -> None:
    make, mix, model, known, words = CASES[case]
    ids = make()
    experts = 256 if ids.max() >= 64 else 64
    source = build(tmp_path / "source", experts, ids.shape[1], model)
    half, layer = len(ids) // 2, "model.layers.0.mlp"
    whole = write_trace(tmp_path / "whole", {layer: ids.tolist()}, experts)
    first = write_trace(tmp_path / "first", {layer: ids[:half].tolist()}, experts)
    options = ("--batch-mix", mix, "--trace")
    run_well(
        "export",
        source,
        "--to",
        "vllm",
        "--ep",
        RANKS,
        "--strategy",
        "balanced",
        *options,
        first,
        "--out",
        tmp_path / "b.json",
    )
    placed = {
        "linear": range(experts),
        "zigzag": zigzag(experts, RANKS),
        "balanced": json.loads((tmp_path / "b.json").read_text())["physical_to_logical"],
    }
    expected, saved = best(placed, ids[half:], mix, model)
    found = json.loads(run_well("analyze", source, "--ep", RANKS, "--batch", 64, *options, whole, "--json"))
    advice = found["advice"]
    assert known in (None, expected), f"the oracle disagrees with what the trace was made for: {saved}"
    assert advice["strategy"] == expected, f"{advice['why']} {saved}"
    assert advice["saved"] == pytest.approx({name: saved[name] for name in ("zigzag", "balanced")}, abs=1e-4)
    assert words in advice["why"]
    assert advice["commands"] == found["serve"][expected]
    assert ("RESHARD_PLACEMENT" in advice["commands"][-1]) == (expected != "linear")


def test_without_a_trace_it_says_that_it_cannot_know(tmp_path: Path) -> None:
    """The gates favour nobody, and the tenth trace is none."""
    source = build(tmp_path / "source", 64, 6, SMALL)
    with (source / "model.safetensors").open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        begin, end = json.loads(file.read(length))["model.layers.0.mlp.gate.weight"]["data_offsets"]
        file.seek(8 + length + begin)
        file.write(torch.randn((end - begin) // 2).bfloat16().view(torch.uint8).numpy().tobytes())
        file.write(bytes(4 * 64))
    text = run_well("analyze", source, "--ep", RANKS, "--tokens", 256)
    *_, recommendation, command = text.splitlines()
    assert recommendation.startswith("Recommendation: without a trace nobody can know what a placement gains")
    assert command == f"  RESHARD_TRACE=./trace vllm serve {source} --tensor-parallel-size 8 --enable-expert-parallel"
