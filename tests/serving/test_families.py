"""Families beyond DeepSeek's, served by real vLLM on the CPU: rewritten outputs, and originals with a placement.

"Equal" and "close" mean the same as in `test_serving`. Ling is laid out as it is published: its config's class comes
with the checkpoint. Qwen2-MoE has several files and no index, so vLLM loads all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import SHIM_ONLY, Serving
from test_placed import ZIGZAG, by, random_file
from test_serving import assert_answered, assert_close, assert_equal, largest_difference

PLAIN: dict[str, Any] = {"attention_backend": "CPU_ATTN"}
LING: dict[str, Any] = {**PLAIN, "trust_remote_code": True}
GROUP_LIMITED: dict[str, dict[str, Any]] = {"ling": LING, "axk1": {}}  # A.X-K1 has latent attention, the default


def ling(serving: Serving) -> Path:
    """16 experts in 4 groups, sigmoid scores with a bias."""
    return serving.model("ling")


@pytest.mark.parametrize("kind", GROUP_LIMITED)
def test_a_group_limited_family_rewritten_and_placed_equals_stock_round_robin(kind: str, serving: Serving) -> None:
    source, options = serving.model(kind), GROUP_LIMITED[kind]
    stock = serving.generate(source, ranks=2, placement="round_robin", plugins=SHIM_ONLY, **options)
    assert "Expert placement strategy: round_robin" in stock.log
    assert_equal(serving.generate(serving.resharded(source, 2), ranks=2, **options), stock)
    placed = serving.generate(source, ranks=2, environment=ZIGZAG, **options)
    assert_equal(placed, stock)
    assert "2 MoE layers are placed" in placed.log


def test_ling_2_with_other_orders_rewritten_equals_the_original(serving: Serving) -> None:
    answer = serving.generate(serving.placed(ling(serving), 2), **LING)
    assert_equal(answer, serving.generate(ling(serving), plugins=SHIM_ONLY, **LING))


def test_ling_2_rewritten_is_refused_without_the_plugin(serving: Serving) -> None:
    answer = serving.generate(serving.resharded(ling(serving), 2), ranks=2, plugins=SHIM_ONLY, **LING)
    assert answer.status != 0
    assert "reshard_bailing_moe" in answer.log


def test_the_control_ling_2_whose_router_ignores_the_placement_gives_other_tokens(serving: Serving) -> None:
    source = ling(serving)
    environment = {**by(random_file(serving, source, 1)), "ROUTER_FORGETS": "1"}
    wrong = serving.generate(source, environment=environment, **LING)
    right = serving.generate(source, plugins=SHIM_ONLY, **LING)
    assert_answered(wrong)
    assert wrong.tokens != right.tokens
    assert largest_difference(wrong, right) > 0.1


# vLLM's CPU build chooses ERNIE's experts without its bias, from the original too.
OTHERS = pytest.mark.parametrize("kind", ["afmoe", "hy_v3", "qwen2_moe", "ernie4_5_moe"])


@OTHERS
def test_a_family_without_groups_is_served_rewritten_and_placed(kind: str, serving: Serving) -> None:
    source = serving.model(kind)
    original = serving.generate(source, plugins=SHIM_ONLY, **PLAIN)
    rewritten = serving.generate(serving.placed(source, 2), ranks=2, plugins=SHIM_ONLY, **PLAIN)
    assert_close(rewritten, original)
    environment = by(random_file(serving, source, 2))
    assert_close(serving.generate(source, ranks=2, environment=environment, **PLAIN), original)


@OTHERS
def test_the_control_a_family_whose_router_ignores_the_placement_answers_otherwise(kind: str, serving: Serving) -> None:
    source = serving.model(kind)
    environment = {**by(random_file(serving, source, 2)), "ROUTER_FORGETS": "1"}
    wrong = serving.generate(source, ranks=2, environment=environment, **PLAIN)
    assert_answered(wrong)
    assert largest_difference(wrong, serving.generate(source, plugins=SHIM_ONLY, **PLAIN)) > 0.1
