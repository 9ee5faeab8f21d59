"""Families beyond DeepSeek's, served by real vLLM on the CPU: rewritten outputs, and originals with a placement.

"Equal" and "close" mean the same as in `test_serving`. Ling 2.0 is group-limited, and laid out as it is published: its
config's class comes with the checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import SHIM_ONLY, Result, Serving
from test_placed import ZIGZAG, by, random_file
from test_serving import assert_answered, assert_close, assert_equal, largest_difference

LING: dict[str, Any] = {"trust_remote_code": True, "attention_backend": "CPU_ATTN"}
PLAIN: dict[str, Any] = {"attention_backend": "CPU_ATTN"}


def ling(serving: Serving) -> Path:
    """16 experts in 4 groups, sigmoid scores with a bias."""
    return serving.model("ling")


def stock(serving: Serving) -> Result:
    """The answer of stock vLLM from Ling on two ranks, under its own zigzag placement."""
    answer = serving.generate(ling(serving), ranks=2, placement="round_robin", plugins=SHIM_ONLY, **LING)
    assert "Expert placement strategy: round_robin" in answer.log
    return answer


def test_ling_2_rewritten_equals_stock_round_robin(serving: Serving) -> None:
    answer = serving.generate(serving.resharded(ling(serving), 2), ranks=2, **LING)
    assert_equal(answer, stock(serving))


def test_ling_2_placed_equals_stock_round_robin(serving: Serving) -> None:
    answer = serving.generate(ling(serving), ranks=2, environment=ZIGZAG, **LING)
    assert_equal(answer, stock(serving))
    assert "2 MoE layers are placed" in answer.log


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
