"""What `benchmarks/what_zigzag_buys.py` counts, on routings with known answers; its model's router is `reshard`'s."""

from __future__ import annotations

import pytest
import torch
from small_moe import R1_ROUTING, choose, multiply, sorted_rows
from what_zigzag_buys import Batch, Loads, loads, over_mean, owners, part, placements, speedup, tables

from reshard.model.router import Router, route

EXPERTS, RANKS = 256, 8
OWNER = owners(EXPERTS, RANKS)


def under(placement: str, experts_TK: torch.Tensor) -> Loads:
    return loads(placements(EXPERTS, RANKS)[placement][experts_TK], OWNER)


@pytest.mark.parametrize("placement", ["linear", "zigzag"])
def test_experts_used_equally_load_all_ranks_equally(placement: str) -> None:
    found = under(placement, torch.arange(EXPERTS).view(-1, 8))
    assert found.pairs_R == found.active_R == [32] * RANKS
    assert over_mean(found.pairs_R) == 1


def test_a_hot_group_is_one_rank_under_linear_and_all_ranks_under_zigzag() -> None:
    experts_TK = torch.arange(32, 64).view(-1, 8)  # all of group 1
    linear, zigzag = under("linear", experts_TK), under("zigzag", experts_TK)
    assert linear.pairs_R == linear.active_R == [0, 32, 0, 0, 0, 0, 0, 0]
    assert linear.tokens_R == [0, 4, 0, 0, 0, 0, 0, 0]
    assert over_mean(linear.pairs_R) == RANKS
    assert zigzag.pairs_R == zigzag.active_R == [4] * RANKS
    assert zigzag.tokens_R == [4] * RANKS  # what it costs: each token goes to each rank
    assert over_mean(zigzag.pairs_R) == 1


@pytest.mark.parametrize("placement", ["linear", "zigzag"])
def test_no_placement_helps_against_one_hot_expert(placement: str) -> None:
    found = under(placement, torch.full((10, 1), 77))
    assert sorted(found.pairs_R) == [0] * 7 + [10]
    assert sorted(found.active_R) == [0] * 7 + [1]
    assert over_mean(found.pairs_R) == RANKS


def test_zigzag_gives_expert_e_to_rank_e_mod_ranks() -> None:
    experts_E = torch.arange(EXPERTS)
    assert torch.equal(OWNER[placements(EXPERTS, RANKS)["zigzag"]], experts_E % RANKS)
    assert torch.equal(OWNER[placements(EXPERTS, RANKS)["linear"]], experts_E // 32)


def test_a_rank_gets_its_own_tokens_or_all() -> None:
    experts_TK = torch.tensor([[0, 40], [41, 42], [200, 1]])
    batch = Batch("mixed", "all", 0, experts_TK, torch.ones(3, 2))
    assert part(batch, experts_TK, OWNER, 0, "own").experts_TK.tolist() == [[0, 40], [200, 1]]
    assert part(batch, experts_TK, OWNER, 2, "own").experts_TK.tolist() == []
    assert torch.equal(part(batch, experts_TK, OWNER, 2, "all").experts_TK, experts_TK)


def test_the_slowest_rank_decides() -> None:
    result = {"linear": {"own_us": [10.0, 40.0]}, "zigzag": {"own_us": [20.0, 25.0]}}
    assert speedup(result, "own") == 40 / 25
    assert over_mean(result["linear"]["own_us"]) == 40 / 25


def test_the_table_says_where_zigzag_loses() -> None:
    def result(linear: float, zigzag: float) -> dict[str, object]:
        times = {"own_us": [linear, 1.0], "all_us": [linear, 1.0]}
        counts = {"pairs_R": [3, 1], "active_R": [2, 1], "tokens_R": [2, 2]}
        return {
            "case": "mixed",
            "tokens": 2,
            "linear": times | counts,
            "zigzag": {"own_us": [zigzag, 1.0], "all_us": [1.0, 1.0]} | counts,
            "linear_beside_itself": {"own": 1.0},
        }

    table = tables([result(8, 4), result(8, 8), result(4, 8)])
    assert "| 2 | 1.00 (0.75 to 1.50; 0.50 to 2.00) | 8.00 (6.00 to 8.00; 4.00 to 8.00) | 1 of 3; 0 of 3 |" in table
    assert "| 1.50, 1.50 | 2, 2 | 2.00, 2.00 |" in table


def test_the_small_model_routes_as_reshard_says() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(64, 16, dtype=torch.float64, generator=generator)
    weight_EH = torch.randn(EXPERTS, 16, dtype=torch.float64, generator=generator)
    correction_E = torch.randn(EXPERTS, dtype=torch.float64, generator=generator) / 10
    expected = route(hidden_TH, Router(weight_EH, None, correction_E), R1_ROUTING)
    experts_TK, weights_TK = choose((hidden_TH @ weight_EH.T).sigmoid(), correction_E, R1_ROUTING)
    assert torch.equal(experts_TK, expected.experts_TK)
    assert torch.allclose(weights_TK, expected.weights_TK)
    assert len((experts_TK // 32)[0].unique()) <= R1_ROUTING.topk_group


def test_sorted_rows_meet_their_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    experts_TK = torch.randint(0, 5, (9, 3), generator=generator)  # experts 5 and 6 get nothing
    rows_PA = torch.randn(27, 4, generator=generator)
    weights_EBA = torch.randn(7, 2, 4, generator=generator)
    row_of_TK, ends_E, rows = sorted_rows(experts_TK, 7)
    answers_RB = multiply(rows_PA.new_zeros(rows, 4).index_copy(0, row_of_TK.flatten(), rows_PA), weights_EBA, ends_E)
    expected_PB = torch.einsum("pa,pba->pb", rows_PA, weights_EBA[experts_TK.flatten()])
    assert torch.allclose(answers_RB[row_of_TK.flatten()], expected_PB, atol=1e-6)
    assert (ends_E % 8 == 0).all()
