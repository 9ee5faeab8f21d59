"""What `benchmarks/predicted_steps.py` makes of a record of steps, against times that a plain loop computes."""

from __future__ import annotations

import statistics
from math import ceil
from typing import Any

import pytest
import torch
from lifted_model import R1_EXPERT
from predicted_steps import Predicted, counts, layer_times, predict, summary, table
from step_times import Case, batches

from reshard.placement.permutations import zigzag
from reshard.placement.time_model import read_gpu

EXPERTS, RANKS, LAYERS, VOCABULARY, TOP_K = 16, 4, 3, 60, 4
GPU = read_gpu("H200")
CASES = [Case("decode", "mixed", 8, 3), Case("prefill", "one kind", 1024, 1)]


def chosen() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(LAYERS, VOCABULARY, EXPERTS, generator=generator).topk(TOP_K, dim=2).indices.to(torch.uint8)


def slowest(ids: list[int], layer_VK: torch.Tensor, order: list[int]) -> float:
    """Milliseconds of the slowest rank, by a plain loop over the time model's formula."""
    kernels = GPU.kernels
    tokens_of = dict.fromkeys(range(EXPERTS), 0)
    for token in ids:
        for expert in layer_VK[token].tolist():
            tokens_of[expert] += 1
    read = R1_EXPERT.size / (GPU.bandwidth * kernels.read_share)
    tile = kernels.tile * 6 * 7168 * 2048 / (GPU.flops["fp8"] * kernels.flops_share)
    took = []
    for rank in range(RANKS):
        own = [tokens_of[expert] for expert in order[4 * rank : 4 * rank + 4]]
        took.append(sum(max(read, tile) + (ceil(count / kernels.tile) - 1) * tile for count in own if count))
    rows = len(ids) * R1_EXPERT.row_bytes / (GPU.bandwidth * kernels.rows_share)
    return 1000 * (max(took) + rows + kernels.launch)


def orders() -> dict[str, torch.Tensor]:
    linear = list(range(EXPERTS))
    return {name: torch.tensor([order] * LAYERS) for name, order in (("linear", linear), ("zigzag", zigzag(16, 4)))}


def test_times_of_layers_are_those_of_a_plain_loop() -> None:
    chosen_LVK = chosen()
    for case in CASES:
        made = batches(case, 0, VOCABULARY)
        count_BLE = counts(made, chosen_LVK, EXPERTS)
        for name, order_LE in orders().items():
            times, active, pairs = layer_times(count_BLE, order_LE, RANKS, case.tokens, R1_EXPERT, GPU)
            expected = [
                [slowest(ids, chosen_LVK[layer], order_LE[layer].tolist()) for layer in range(LAYERS)] for ids in made
            ]
            assert times.tolist() == [pytest.approx(row) for row in expected], name
            assert active.max() <= 4
            assert pairs.min() >= case.tokens * TOP_K / RANKS


def record(gain: float) -> dict[str, Any]:
    """Steps that take 5 ms and their layers' time by the model; under zigzag `gain` times what the layers gain less."""
    chosen_LVK, rows = chosen(), []
    for case in CASES:
        for turn in range(4):
            for name in ("linear", "zigzag"):
                took = []
                for ids in batches(case, turn, VOCABULARY):
                    of = {
                        each: sum(slowest(ids, chosen_LVK[layer], order[layer].tolist()) for layer in range(LAYERS))
                        for each, order in orders().items()
                    }
                    took.append(5 + of["linear"] - (gain * (of["linear"] - of[name])))
                rows.append({"case": case.name, "round": turn, "placement": name, "ms": took})
    return {
        "ranks": RANKS,
        "mode": "tp",
        "layers": LAYERS,
        "vocabulary": VOCABULARY,
        "cases": [vars(case) for case in CASES],
        "placements": {"linear": "a", "zigzag": "b"},
        "rows": rows,
    }


def test_steps_that_follow_the_model_are_predicted() -> None:
    both = {"few": chosen(), "many": chosen()}
    found = predict(record(1.0), both, orders(), R1_EXPERT, GPU)
    assert [(one.case, one.placement) for one in found] == [(case.name, "zigzag") for case in CASES]
    for one in found:
        assert one.predicted == pytest.approx(one.measured)
        assert one.error == pytest.approx(0)
    other = predict(record(-50.0), both, orders(), R1_EXPERT, GPU)  # steps that do the contrary, and far more of it
    assert any(abs(one.error) > one.allowed for one in other)
    assert "| no (" in table(other)
    assert "| no (" not in table(found)


def test_few_tokens_of_a_rank_are_routed_by_other_logits() -> None:
    wrong = torch.zeros_like(chosen()) + torch.arange(TOP_K, dtype=torch.uint8)
    decode, prefill = predict(record(1.0), {"few": wrong, "many": chosen()}, orders(), R1_EXPERT, GPU)
    assert decode.predicted != pytest.approx(decode.measured)
    assert prefill.predicted == pytest.approx(prefill.measured)


def test_what_is_allowed_is_a_point_or_the_quartiles() -> None:
    narrow = Predicted("decode 8", "zigzag", [1.01, 1.011, 1.012], [1.02] * 3, 1.0, 1.0)
    assert narrow.allowed == 0.01
    assert narrow.error == pytest.approx(0.009)
    wide = Predicted("decode 8", "zigzag", [1.0, 1.02, 1.08], [1.02] * 3, 1.0, 1.0)
    assert wide.allowed == pytest.approx(statistics.median([1.02, 1.08]) - 1.02)


def test_a_summary_counts_what_no_gain_would_meet_too() -> None:
    met = Predicted("decode 8", "zigzag", [1.03], [1.031], 1.0, 1.0)
    off = Predicted("decode 8", "packing", [1.03], [1.05], 1.0, 1.0)
    small = Predicted("prefill 4096", "zigzag", [1.001], [1.0], 1.0, 1.0)
    assert summary([met, off, small]) == (
        "- decode and prefill: 2 of 3 within, mean error 0.73 points. A prediction of no gain: 1 within, 2.03 points."
    )
    lines = table([met, off, small]).splitlines()
    assert [line.split(":")[0] for line in lines[-3:]] == ["- decode and prefill", "- decode", "- prefill"]
