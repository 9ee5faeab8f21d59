"""What `benchmarks/predicted_steps.py` makes of a record of steps, against times that a plain loop computes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import product
from math import ceil, hypot
from typing import Any

import pytest
import torch
from lifted_model import R1_EXPERT
from predicted_steps import Predicted, groups, layer_times, mapping_time, predict, slot_counts, summary, table
from step_times import Case, batches

from reshard.placement.permutations import zigzag
from reshard.placement.time_model import read_gpu

EXPERTS, RANKS, LAYERS, VOCABULARY, TOP_K = 16, 4, 3, 60, 4
GPU = read_gpu("H200")
CASES = [Case("decode", "mixed", 8, 3), Case("prefill", "one kind", 1024, 1)]
COPIES = [0, 1, 2, 3, 4, 8, 4, 5, 6, 7, 0, 12, 8, 9, 10, 11, 12, 4, 12, 13, 14, 15, 8, 0]  # two spare slots a rank


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
        slow = hypot(sum(map(bool, own)), kernels.few) - sum(map(bool, own)) if any(own) else 0
        further = sum((ceil(count / kernels.tile) - 1) * tile for count in own if count)
        took.append((sum(map(bool, own)) + slow) * max(read, tile) + further)
    rows = len(ids) * R1_EXPERT.row_bytes / (GPU.bandwidth * kernels.rows_share)
    return 1000 * (max(took) + rows + kernels.launch)


def orders() -> dict[str, torch.Tensor]:
    linear = list(range(EXPERTS))
    return {name: torch.tensor([order] * LAYERS) for name, order in (("linear", linear), ("zigzag", zigzag(16, 4)))}


def test_times_of_layers_are_those_of_a_plain_loop() -> None:
    chosen_LVK = chosen()
    for case in CASES:
        made = batches(case, 0, VOCABULARY)
        chosen_LBTK = chosen_LVK[:, torch.tensor(made)]
        for name, order_LE in orders().items():
            times, active, pairs = layer_times(chosen_LBTK, order_LE, RANKS, "without copies", 1, R1_EXPERT, GPU)
            expected = [
                [slowest(ids, chosen_LVK[layer], order_LE[layer].tolist()) for layer in range(LAYERS)] for ids in made
            ]
            assert times.tolist() == [pytest.approx(row) for row in expected], name
            assert active.max() <= 4
            assert pairs.min() >= case.tokens * TOP_K / RANKS


def ways_to_serve(active: set[int]) -> Iterator[dict[int, int]]:
    """Every choice of a slot of COPIES for each active expert."""
    slots = [[slot for slot, held in enumerate(COPIES) if held == expert] for expert in sorted(active)]
    return (dict(zip(sorted(active), chosen, strict=True)) for chosen in product(*slots))


def busiest(slots: set[int]) -> int:
    return max(sum(slot // 6 == rank for slot in slots) for rank in range(RANKS))


def test_copies_of_a_small_batch_leave_the_busiest_rank_what_the_best_of_all_choices_leaves() -> None:
    ids_BTK = chosen()[0][torch.tensor(batches(CASES[0], 0, VOCABULARY))][:, :4]
    chosen_BP = slot_counts(ids_BTK, COPIES, RANKS, "with copies", 1)
    position_BP = slot_counts(ids_BTK, COPIES, RANKS, "by position", 1)
    best, found, by_position = [], [], []
    for ids_TK, chosen_P, position_P in zip(ids_BTK, chosen_BP, position_BP, strict=True):
        active = set(ids_TK.flatten().tolist())
        best.append(min(busiest(set(served.values())) for served in ways_to_serve(active)))
        found.append(busiest({slot for slot, tokens in enumerate(chosen_P.tolist()) if tokens}))
        by_position.append(busiest({slot for slot, tokens in enumerate(position_P.tolist()) if tokens}))
        of_expert = dict.fromkeys(range(EXPERTS), 0)
        for slot, tokens in enumerate(chosen_P.tolist()):
            of_expert[COPIES[slot]] += tokens
        assert of_expert == {expert: ids_TK.flatten().tolist().count(expert) for expert in range(EXPERTS)}
        assert (chosen_P > 0).sum() == len(active), "one copy serves an expert"
    assert found == best
    assert sum(by_position) > sum(best), "a control: vLLM's choice is another"


@pytest.mark.parametrize("parts", [1, 4])
def test_by_position_each_rank_counts_its_own_tokens(parts: int) -> None:
    ids_BTK = chosen()[0][torch.tensor(batches(CASES[0], 0, VOCABULARY))]
    for ids_TK, found_P in zip(
        ids_BTK.tolist(), slot_counts(ids_BTK, COPIES, RANKS, "by position", parts), strict=True
    ):
        expected = [0] * len(COPIES)
        for token, ids_K in enumerate(ids_TK):
            for expert in ids_K:
                slots = [slot for slot, held in enumerate(COPIES) if held == expert]
                expected[slots[token % (8 // parts) * 2654435769 % 2**32 % len(slots)]] += 1
        assert found_P.tolist() == expected


def test_ranks_that_route_their_own_tokens_use_fixed_copies_unless_they_have_many() -> None:
    """Two ranks with a part of the batch each."""
    few_BTK = chosen()[0][torch.tensor(batches(CASES[0], 0, VOCABULARY))]
    used_BP = slot_counts(few_BTK, COPIES, RANKS, "with copies", 2) > 0
    slots_of_0 = used_BP[:, [slot for slot, held in enumerate(COPIES) if held == 0]].any(dim=0)
    assert slots_of_0.sum() == 1, "the same copy in all batches"
    # expert 0 is on ranks 0, 1 and 3; the first rank's tokens make rank 0 busy, the second's ranks 1 and 3
    first, second = [[0, 1, 2, 3]] * 1025, [[0, 5, 6, 13]] * 1025
    many_P = slot_counts(torch.tensor([first + second]), COPIES, RANKS, "with copies", 2)[0]
    slots = {slot // 6: int(many_P[slot]) for slot, held in enumerate(COPIES) if held == 0 and many_P[slot]}
    assert slots in ({1: 1025, 0: 1025}, {3: 1025, 0: 1025}), "each makes its own pairs even"


def test_mapping_ids_takes_what_was_measured() -> None:
    microseconds = {
        ("without copies", 8, 1): 0,  # the router's kernel maps them
        ("without copies", 1, 1): 1.3,
        ("by position", 8, 1): 2.0,
        ("with copies", 8, 1): 4.0,
        ("with copies", 128, 1): 4.64,
        ("with copies", 8, 4): 1.7,
        ("with copies", 512, 1): 1.7,
        ("with copies", 2048, 1): 29.3,
        ("with copies", 8192, 4): 30.7,
    }
    for (way, tokens, parts), expected in microseconds.items():
        assert 1000 * mapping_time(way, tokens, parts) == pytest.approx(expected, abs=0.1)  # type: ignore[arg-type]


def test_steps_with_copies_that_follow_the_model_are_predicted() -> None:
    """Steps of 5 ms and what the best choice leaves, and the choice of copies on top of it; prefill maps only."""
    both = orders() | {"copies-2": torch.tensor([COPIES] * LAYERS)}
    chosen_LVK, rows = chosen(), []
    for case in CASES:
        made = batches(case, 0, VOCABULARY)
        chosen_LBTK = chosen_LVK[:, torch.tensor(made)]
        took = {
            name: layer_times(chosen_LBTK, both[name], RANKS, way, 1, R1_EXPERT, GPU).times.sum(dim=1)
            for name, way in (("linear", "without copies"), ("copies-2", "with copies"))
        }
        cost = LAYERS * 1e-3 * (4.04 if case.tokens == 8 else 1.7)
        rows += [
            {"case": case.name, "round": 0, "placement": name, "ms": (5 + ms + cost * (name == "copies-2")).tolist()}
            for name, ms in took.items()
        ]
    given = record(1.0) | {"placements": dict.fromkeys(("linear", "copies-2"), "a"), "rows": rows}
    found = predict(given, {"few": chosen_LVK, "many": chosen_LVK}, both, R1_EXPERT, GPU)
    assert [one.way for one in found] == ["with copies"] * 2
    for one in found:
        assert one.predicted == pytest.approx(one.measured)
        assert one.predicted_at_no_cost[0] > one.predicted[0]
        assert one.mean_active <= one.active <= one.base_active + 0.4
    assert found[0].cost == pytest.approx(LAYERS * 4.04e-3 * 3 / sum(rows[0]["ms"]))


def test_ranks_that_scatter_make_layers_longer_where_they_have_equally_much_to_do() -> None:
    """The expected maximum of four normal values is 1.029 standard deviations above their mean."""
    even = torch.arange(EXPERTS).repeat(200, 1).view(200, 4, 4)[None]  # all experts, once
    uneven = torch.arange(4).repeat(200, 4).view(200, 4, 4)[None]  # only those of one rank
    order_LE = torch.arange(EXPERTS)[None]
    for chosen_LBTK, deviations in ((even, 1.029), (uneven, 0.0)):
        arguments = (chosen_LBTK, order_LE, RANKS, "without copies", 1, R1_EXPERT, GPU)
        none, some = (layer_times(*arguments, scatter).times.mean().item() for scatter in (0.0, 0.05))  # type: ignore[arg-type]
        assert some / none == pytest.approx(1 + deviations * 0.05, abs=0.002)
        assert none == pytest.approx(layer_times(*arguments).times.mean().item())  # type: ignore[arg-type]


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


def made(case: str, placement: str, measured: list[float], predicted: list[float], way: str = "without copies") -> Any:
    return Predicted(case, placement, way, measured, predicted, predicted, 0.0, 1.0, 1.0, 1.0, 1.0)  # type: ignore[arg-type]


def test_what_is_allowed_is_a_point_or_the_quartiles() -> None:
    narrow = made("decode 8", "zigzag", [1.01, 1.011, 1.012], [1.02] * 3)
    assert narrow.allowed == 0.01
    assert narrow.error == pytest.approx(0.009)
    wide = made("decode 8", "zigzag", [1.0, 1.02, 1.08], [1.02] * 3)
    assert wide.allowed == pytest.approx(statistics.median([1.02, 1.08]) - 1.02)


def test_a_summary_counts_what_no_gain_would_meet_too() -> None:
    met = made("decode 8", "zigzag", [1.03], [1.031])
    off = made("decode 8", "packing", [1.03], [1.05])
    small = made("prefill 4096", "zigzag", [1.001], [1.0])
    assert summary("all", [met, off, small]) == (
        "- all: 2 of 3 within, mean error 0.73 points; measured gains are 0.70 of predicted ones (correlation 0.93). "
        "A prediction of no gain: 1 within, 2.03 points."
    )
    lines = table([met, off, small]).splitlines()
    assert [line.split(":")[0] for line in lines[-3:]] == ["- all", "- decode", "- prefill"]


def test_copies_are_counted_apart_and_unsteady_steps_left_out_of_that() -> None:
    found = [
        made("decode 8", "zigzag", [1.03], [1.03]),
        made("decode 8", "copies-2", [1.05], [1.05], "with copies"),
        made("prefill 1024", "zigzag", [0.9, 1.0, 1.1], [1.0]),
        made("prefill 8192", "zigzag", [1.0], [1.0]),
        made("prefill 8192", "copies-2, by position", [1.0], [1.0], "by position"),
    ]
    assert {name: len(group) for name, group in groups(found).items()} == {
        **{"all": 5, "decode": 2, "decode, without copies": 1, "decode, with copies": 1, "prefill": 3},
        **{"prefill, steady": 2, "prefill, steady, without copies": 1, "prefill, steady, by position": 1},
    }
