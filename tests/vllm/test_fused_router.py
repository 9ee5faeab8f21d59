"""The router's kernel may route only after it agreed with vLLM's own router, bit for bit.

Kernel and router are stand-ins here; tests/gpu compares the real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reshard.vllm.fused import TRIAL_ROWS, TRIAL_SINGLE_ROWS, Fused, same_bits, trial_logits

Answer = tuple[torch.Tensor, torch.Tensor]
EXPERTS = 8


def right(logits: torch.Tensor) -> Answer:
    weights, ids = logits.float().softmax(dim=1).topk(2, dim=1)
    return weights, ids.int()


def wrong_by_one_bit(logits: torch.Tensor) -> Answer:
    weights, ids = right(logits)
    weights[-1, -1] = weights[-1, -1].nextafter(torch.tensor(2.0))
    return weights, ids


def wrong_if_infinite(logits: torch.Tensor) -> Answer:
    weights, ids = right(logits)
    return weights.where(logits.isfinite().all(dim=1, keepdim=True), weights + 1), ids


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Callable[[torch.Tensor], Answer]]]:
    """Stand-ins for the kernel, by name; the name stands in for the `Choice`."""
    kernels = {"right": right, "wrong by one bit": wrong_by_one_bit, "wrong if infinite": wrong_if_infinite}

    def grouped_topk(logits: torch.Tensor, bias: Any, place: Any, choice: str, logical: bool) -> Answer:
        return kernels[choice](logits)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    logger = SimpleNamespace(info_once=lambda *words: None, warning_once=lambda *words: None)
    module = SimpleNamespace(init_logger=lambda name: logger)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(logger=module))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "vllm.logger", module)  # type: ignore[arg-type]
    stand_in = SimpleNamespace(grouped_topk=grouped_topk)
    monkeypatch.setitem(sys.modules, "reshard.vllm.grouped_topk", stand_in)  # type: ignore[arg-type]
    yield kernels


def counting_router() -> tuple[Callable[[torch.Tensor], Answer], list[int]]:
    """A stand-in for vLLM's own router, and a list of how many rows it routed in each call."""
    asked: list[int] = []

    def router(logits: torch.Tensor) -> Answer:
        asked.append(len(logits))
        return right(logits)

    return router, asked


def fused(*choices: str) -> Fused:
    return Fused(choices, torch.arange(EXPERTS), "a layer")  # type: ignore[arg-type]


@pytest.mark.usefixtures("kernel")
def test_a_kernel_that_agrees_routes_from_then_on() -> None:
    router, asked = counting_router()
    one = fused("right")
    one.route(torch.randn(5, EXPERTS), None, router)
    assert asked == [5, TRIAL_ROWS], "the batch itself, then the random rows"
    one.route(torch.randn(3, EXPERTS), None, router)
    assert asked == [5, TRIAL_ROWS], "now the kernel routes alone"


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("wrong", ["wrong by one bit", "wrong if infinite"])
def test_a_kernel_that_differs_anywhere_never_routes(wrong: str, rows: int) -> None:
    router, asked = counting_router()
    one, logits = fused(wrong), torch.randn(rows, EXPERTS)
    for _ in range(3):
        weights, _ = one.route(logits, None, router)
        assert torch.equal(weights, right(logits)[0])
    trials = [1] * TRIAL_SINGLE_ROWS if rows == 1 else [TRIAL_ROWS]
    assert asked == [rows, *trials, rows, rows, rows], "for the trial, and then in every call"


@pytest.mark.usefixtures("kernel")
def test_the_first_choice_that_agrees_is_used() -> None:
    one = fused("wrong by one bit", "right")
    one.route(torch.randn(5, EXPERTS), None, right)
    assert list(one.agreed.values()) == ["right"]


@pytest.mark.usefixtures("kernel")
def test_each_dtype_is_tried_separately_and_so_is_a_single_token() -> None:
    router, asked = counting_router()
    one = fused("right")
    for logits in (torch.randn(5, EXPERTS), torch.randn(5, EXPERTS).bfloat16(), torch.randn(1, EXPERTS)):
        asked.clear()
        one.route(logits, None, router)
        assert len(asked) > 1, "tried"
        asked.clear()
        one.route(logits, None, router)
        assert not asked, "the kernel routes alone"


@pytest.mark.usefixtures("kernel")
def test_nothing_is_tried_while_a_cuda_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    router, asked = counting_router()
    one, capturing = fused("right"), [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    one.route(torch.randn(5, EXPERTS), None, router)
    assert asked == [5]
    assert not one.agreed
    capturing[0] = False
    one.route(torch.randn(5, EXPERTS), None, router)
    assert list(one.agreed.values()) == ["right"]


@pytest.mark.usefixtures("kernel")
def test_an_empty_batch_decides_nothing() -> None:
    one = fused("wrong by one bit")
    one.route(torch.randn(0, EXPERTS), None, right)
    assert not one.agreed


def test_trial_logits_have_ties_and_infinities_and_the_given_dtype() -> None:
    (trial,) = trial_logits(torch.zeros(3, 64, dtype=torch.bfloat16))
    assert trial.shape == (TRIAL_ROWS, 64)
    assert trial.dtype == torch.bfloat16
    assert abs(trial.isneginf().any(dim=1).sum() - TRIAL_ROWS / 3) < 1
    assert abs(sum(len(row.unique()) < 16 for row in trial) - TRIAL_ROWS / 3) < 1
    singles = trial_logits(torch.zeros(1, 64))
    assert [row.shape for row in singles] == [(1, 64)] * TRIAL_SINGLE_ROWS
    assert sum(bool(row.isneginf().any()) for row in singles) == TRIAL_SINGLE_ROWS // 3
    before = torch.get_rng_state()
    trial_logits(trial)
    assert torch.equal(torch.get_rng_state(), before), "the random state that vLLM uses is unchanged"


def test_answers_are_compared_bit_by_bit_except_nan() -> None:
    ids = torch.tensor([[1, 2]], dtype=torch.int32)
    zero, minus_zero, nan = (torch.tensor([[value, 1.0]]) for value in (0.0, -0.0, float("nan")))
    assert same_bits((zero, ids), (zero.clone(), ids.long()))
    other_nan = torch.tensor([[-float("nan"), 1.0]])
    assert not torch.equal(nan.view(torch.int32), other_nan.view(torch.int32))
    assert same_bits((nan, ids), (other_nan, ids))
    assert not same_bits((zero, ids), (minus_zero, ids))
    assert not same_bits((zero, ids), (nan, ids))
    assert not same_bits((zero, ids), (zero, ids.flip(1)))
    assert not same_bits((zero, ids), (zero.double(), ids))
