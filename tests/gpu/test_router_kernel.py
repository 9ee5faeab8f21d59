"""Compares the router's kernel with "permute, vLLM's own router, permute back", bit by bit, over millions of rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),  # PyTorch and vLLM run in this process and emit warnings
]

ROWS = 1 << 16
ROUNDS = 4
SINGLE_ROWS = 1000
SIZES = [  # experts, groups, groups per token, experts per token
    (256, 8, 4, 8),  # DeepSeek-V3 and R1
    (160, 8, 3, 6),
    (64, 8, 4, 8),
    (210, 7, 3, 8),
    (252, 6, 3, 8),
    (384, 8, 4, 8),
    (512, 8, 4, 8),
    (1024, 8, 4, 16),
    (1024, 32, 4, 10),
    (384, 1, 1, 8),  # Kimi-K2
    (160, 1, 1, 8),  # GLM-4.5
    (128, 1, 1, 6),
    (256, 1, 1, 8),
    (512, 1, 1, 8),
    (600, 1, 1, 16),
]
SIZES_WITH_PYTORCH = [(256, 8, 4, 8), (160, 8, 3, 6), (384, 8, 4, 8), (512, 8, 4, 8), (1024, 8, 4, 16)]


def normal(shape: tuple[int, int]) -> Any:
    return torch.randn(shape, device="cuda")


def wide(shape: tuple[int, int]) -> Any:
    return 30 * torch.randn(shape, device="cuda")


def ties(shape: tuple[int, int]) -> Any:
    return torch.randn(shape, device="cuda").round() / 2


def flat(shape: tuple[int, int]) -> Any:
    return torch.randn((shape[0], 1), device="cuda").expand(shape).contiguous()


def infinite(shape: tuple[int, int]) -> Any:
    logits = torch.randn(shape, device="cuda")
    logits[torch.rand(shape, device="cuda") < 0.3] = float("-inf")
    logits[torch.rand(shape, device="cuda") < 0.05] = float("inf")
    return logits


def minus_infinite(shape: tuple[int, int]) -> Any:
    logits = torch.randn(shape, device="cuda")
    logits[torch.rand(shape, device="cuda") < 0.3] = float("-inf")
    return logits


def mostly_infinite(shape: tuple[int, int]) -> Any:
    logits = torch.randn(shape, device="cuda")
    logits[torch.rand(shape, device="cuda") < 0.99] = float("-inf")
    return logits


KINDS: list[Callable[[tuple[int, int]], Any]] = [normal, wide, ties, flat, infinite, mostly_infinite]


def stock(logits: Any, bias: Any, choice: Any, scoring: str) -> tuple[Any, Any]:
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import grouped_topk

    return grouped_topk(
        hidden_states=logits,
        gating_output=logits,
        topk=choice.top_k,
        renormalize=choice.renormalize,
        num_expert_group=choice.n_group,
        topk_group=choice.topk_group,
        scoring_func=scoring,
        routed_scaling_factor=choice.scale,
        e_score_correction_bias=bias,
    )


def random_place(num_experts: int) -> Any:
    """A random physical id for each logical expert, int32 [E]."""
    return torch.tensor(random.sample(range(num_experts), num_experts), device="cuda", dtype=torch.int32)


def differing(logits: Any, bias: Any, place: Any, choice: Any, scoring: str) -> tuple[int, int]:
    """In how many rows the kernel's ids and weights differ from vLLM's: (ids, weights); logits in logical order."""
    from reshard.vllm.grouped_topk import grouped_topk

    expected_weights, expected_ids = stock(logits, bias, choice, scoring)
    physical = torch.empty_like(logits)
    physical[:, place.long()] = logits
    physical_bias = None
    if bias is not None:
        physical_bias = torch.empty_like(bias)
        physical_bias[place.long()] = bias
    weights, ids = grouped_topk(physical, physical_bias, place, choice)
    nan = weights.isnan() & expected_weights.isnan()
    same_weights = (weights.view(torch.int32) == expected_weights.view(torch.int32)) | nan
    same_ids = place[expected_ids.long()] == ids
    return int((~same_ids.all(1)).sum()), int((~same_weights.all(1)).sum())


def cases() -> Iterator[Any]:
    for scoring, biased in (("sigmoid", True), ("softmax", True), ("sigmoid", False), ("softmax", False)):
        for sizes in SIZES:
            if (scoring, biased) != ("sigmoid", True) and sizes not in SIZES_WITH_PYTORCH:
                continue
            for dtype in (torch.float32, torch.bfloat16):
                name = f"{scoring}-{'bias' if biased else 'no bias'}-{sizes}-{str(dtype).removeprefix('torch.')}"
                yield pytest.param(scoring, biased, *sizes, dtype, id=name)


@pytest.mark.parametrize(("scoring", "biased", "experts", "groups", "chosen_groups", "top_k", "dtype"), list(cases()))
def test_the_kernel_equals_vllms_own_router_to_the_last_bit(
    scoring: str, biased: bool, experts: int, groups: int, chosen_groups: int, top_k: int, dtype: Any
) -> None:
    compare(scoring, biased, experts, groups, chosen_groups, top_k, dtype)


@pytest.mark.parametrize("experts", [384, 1024])
def test_the_kernel_equals_a_router_that_pytorch_compiled_for_fewer_experts_first(experts: int) -> None:
    from reshard.vllm.grouped_topk import Choice

    stock(normal((ROWS, 256)), None, Choice(256, 8, 4, 8, False, 1.0, biased=False), "softmax")
    torch._dynamo.reset()  # the compiled code stays in PyTorch's cache
    compare("softmax", False, experts, 8, 4, 8, torch.float32)


@pytest.mark.parametrize(
    ("scoring", "biased", "experts", "top_k"), [("softmax", False, 160, 6), ("sigmoid", True, 256, 8)]
)
def test_the_kernel_equals_the_router_that_pytorch_compiles_for_single_tokens(
    scoring: str, biased: bool, experts: int, top_k: int
) -> None:
    from reshard.vllm.grouped_topk import Choice, ways_to_sum

    bias, place = (torch.zeros(experts, device="cuda") if biased else None), random_place(experts)
    ways = ways_to_sum(experts) if scoring == "softmax" else [None]
    for _ in range(SINGLE_ROWS):
        logits = normal((1, experts))
        choices = {way: Choice(experts, 8, 3, top_k, False, 1.0, way, biased) for way in ways}
        found = {way: differing(logits, bias, place, choice, scoring) for way, choice in choices.items()}
        ways = [way for way in ways if found[way] == (0, 0)]
        assert ways, found
    print(f"same bits in {SINGLE_ROWS} rows, one at a time; order of summing: {ways}")


@pytest.fixture(autouse=True)
def _compiled_afresh() -> Iterator[None]:
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()  # after too many compilations PyTorch stops compiling a function, and its bits change
    with fresh_cache():
        yield


def compare(scoring: str, biased: bool, experts: int, groups: int, chosen_groups: int, top_k: int, dtype: Any) -> None:
    """Compare millions of rows of all kinds; one order of summing must fit all rows of one compiled router."""
    from reshard.vllm.grouped_topk import Choice, ways_to_sum

    torch.manual_seed(experts + groups)
    rows = 0
    for renormalize, scale in ((True, 2.5), (False, 1.0), (False, 16.0)) if biased else ((False, 1.0), (False, 16.0)):
        ways = ways_to_sum(experts) if scoring == "softmax" else [None]
        for kind in KINDS:
            if scoring == "softmax" and kind in (infinite, mostly_infinite):
                kind = minus_infinite  # others make a whole row NaN, from which vLLM's choice is random
            for number in range(ROUNDS if biased and scoring == "sigmoid" else 1):
                bias = (torch.randn(experts, device="cuda") / 20).to(dtype) if biased else None
                if number % 2 and kind in (ties, flat) and bias is not None:
                    bias.zero_()
                logits = kind((ROWS, experts)).to(dtype)
                place = random_place(experts)
                found = {}
                for way in ways:
                    choice = Choice(experts, groups, chosen_groups, top_k, renormalize, scale, way, biased)
                    found[way] = differing(logits, bias, place, choice, scoring)
                ways = [way for way in ways if found[way] == (0, 0)]
                assert ways, f"{kind.__name__}: (ids, weights) that differ in {ROWS} rows, by order of summing: {found}"
                rows += ROWS
        print(f"same bits in {rows} rows; order of summing: {ways}")


def test_the_control_another_placement_or_changed_logits_would_be_seen() -> None:
    from reshard.vllm.grouped_topk import Choice, grouped_topk

    choice = Choice(256, 8, 4, 8, True, 2.5)
    logits, bias = normal((ROWS, 256)), torch.zeros(256, device="cuda")
    place = random_place(256)
    weights, ids = grouped_topk(logits, bias, place, choice)
    other_weights, other_ids = grouped_topk(logits, bias, random_place(256), choice)
    assert int((ids != other_ids).any(1).sum()) > ROWS // 2
    nudged, _ = grouped_topk(logits * (1 + 2**-20), bias, place, choice)
    assert int((weights != nudged).any(1).sum()) > ROWS // 2
    assert int((weights != other_weights).any(1).sum()) > ROWS // 2


def test_a_replayed_cuda_graph_routes_its_current_input() -> None:
    from reshard.vllm.grouped_topk import Choice, grouped_topk

    choice = Choice(256, 8, 4, 8, True, 2.5)
    logits, bias, place = normal((64, 256)), torch.zeros(256, device="cuda"), random_place(256)
    grouped_topk(logits, bias, place, choice)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, ids = grouped_topk(logits, bias, place, choice)
    for _ in range(20):
        logits.copy_(normal((64, 256)))
        graph.replay()
        expected_weights, expected_ids = grouped_topk(logits, bias, place, choice)
        assert torch.equal(ids, expected_ids)
        assert torch.equal(weights, expected_weights)


def test_a_kernel_that_differs_from_the_router_is_not_used() -> None:
    from dataclasses import replace

    from reshard.vllm.fused import Fused
    from reshard.vllm.grouped_topk import Choice

    choice = Choice(256, 8, 4, 8, True, 2.5)
    place, bias = random_place(256), torch.zeros(256, device="cuda")
    calls = []

    def router(logits: Any) -> tuple[Any, Any]:
        calls.append(len(logits))
        weights, ids = stock(logits.index_select(1, place), bias.index_select(0, place), choice, "sigmoid")
        return weights, place[ids.long()].to(ids.dtype)

    for right in (True, False):
        fused = Fused((choice if right else replace(choice, topk_group=3),), place, "a layer")
        for logits in (normal((512, 256)), normal((8, 256)).bfloat16(), normal((1, 256))):
            calls.clear()
            fused.route(logits, bias, router)
            assert len(calls) > 1, "tried, for each dtype and for one token"
            calls.clear()
            weights, ids = fused.route(logits, bias, router)
            assert calls == ([] if right else [len(logits)])
            expected_weights, expected_ids = router(logits)
            assert torch.equal(weights, expected_weights)
            assert torch.equal(ids, expected_ids)
