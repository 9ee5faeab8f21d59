"""Originals served with copies of experts by real vLLM on the CPU.

vLLM has its EPLB for GPUs only. Here it runs on the CPU all the same: `cpu_experts_shim` answers for the GPU, and
Triton's interpreter runs the kernels that choose copies. Loading, moving experts, routers and EPLB's steps are vLLM's
own. With copies, ranks sum in another order than without, so answers are close to the original's, not equal.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from copies_oracle import random_copies
from harness import HERE, ROOT, Result, Serving
from test_placed import by, moe_layers, random_file
from test_serving import assert_answered, assert_close, v3

EXPERTS, RANKS, SPARE = 16, 2, 2
ON_CPU = {"EPLB_ON_CPU": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": f"{HERE / 'shim'}:{ROOT}"}
STEPS = {"window_size": 4, "step_interval": 4, "use_async": False, "communicator": "torch_gloo"}
EPLB: dict[str, Any] = {"enable_eplb": True, "eplb_config": {**STEPS, "num_redundant_experts": RANKS * SPARE}}


def copies(serving: Serving, model: Path) -> Path:
    """A placement file with copies, other ones in each layer."""
    layers, _ = moe_layers(model)
    orders = {layer: random_copies(random.Random(layer), EXPERTS, RANKS, SPARE, 2) for layer in layers}
    return random_file(serving, model, RANKS, "copies", physical_to_logical=orders)


def served(serving: Serving, environment: dict[str, str] | None = None, **llm: Any) -> Result:
    """What the model answers with copies; short, as the interpreter is slow."""
    more = {**by(copies(serving, v3(serving))), **ON_CPU, **(environment or {})}
    return serving.generate(v3(serving), ranks=RANKS, environment=more, max_tokens=8, **{**EPLB, **llm})


def original(serving: Serving) -> Result:
    return serving.generate(v3(serving), ranks=RANKS, max_tokens=8)


def test_answers_are_close_to_the_originals_and_experts_stay(serving: Serving) -> None:
    answer = served(serving)
    assert_close(answer, original(serving))
    assert re.search(r"EPLB starts from the placement .* in 2 MoE layers, 4 redundant experts", answer.log)
    assert "EPLB does not move experts while it serves" in answer.log
    assert not re.search(r"Rearranged experts\s+in", answer.log)


def test_where_eplb_rearranges_answers_stay_close(serving: Serving) -> None:
    answer = served(serving, additional_config={"reshard": {"rearrange": True}})
    assert_close(answer, original(serving))
    assert re.search(r"Rearranged experts\s+in", answer.log)


def test_the_control_routers_that_choose_among_other_copies_answer_as_another_model(serving: Serving) -> None:
    spoilt, expected = served(serving, {"COPIES_OF_OTHERS": "1"}), original(serving)
    assert_answered(spoilt)
    found, wanted = ([token for prompt in answer.tokens for token in prompt] for answer in (spoilt, expected))
    assert sum(a == b for a, b in zip(found, wanted, strict=True)) < len(wanted) // 2


@pytest.mark.parametrize("redundant", [0, 2])
def test_copies_without_room_for_them_are_refused_with_the_option_to_give(redundant: int, serving: Serving) -> None:
    refused = served(serving, eplb_config={**STEPS, "num_redundant_experts": redundant})
    assert refused.status != 0
    option = r"--eplb-config '\{\"num_redundant_experts\": 4\}'"
    assert re.search(rf"it has 4 copies, and vLLM has room for {redundant}; give {option}", refused.log)


def test_the_log_says_that_redundant_experts_move_an_outputs_experts_and_answers_stay_close(serving: Serving) -> None:
    """A rank then has more slots than its files have experts, and nothing said so."""
    output = serving.resharded(v3(serving), RANKS)
    answer = serving.generate(output, ranks=RANKS, environment=ON_CPU, max_tokens=8, **EPLB)
    assert_close(answer, original(serving))
    assert "4 redundant experts: answers are right, but each rank has more slots" in answer.log
