"""The plugin's kernels in Triton's interpreter, compared with plain implementations.

The router's tests check which experts are chosen, and in which order. tests/gpu compares bits with vLLM's own router.
"""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from copies_oracle import least_busiest, random_copies
from triton_process import asking

pytest.importorskip("triton", reason="Triton is for Linux")
CASES = [  # experts, groups, groups per token, experts per token, order of summing a softmax, biased, dtype
    (256, 8, 4, 8, None, True, "float32"),
    (210, 7, 3, 8, None, True, "float32"),
    (512, 8, 4, 8, None, True, "float32"),
    (160, 8, 3, 6, (256, 2, True), False, "bfloat16"),
    (160, 8, 3, 6, (128, 2, False), False, "float32"),
    (256, 8, 4, 8, None, False, "float32"),
    (256, 8, 4, 8, (256, 2, False), True, "float32"),
    (1024, 8, 4, 16, (1024, 8, False), False, "float32"),
    (1024, 8, 4, 16, (256, 2, True), False, "float32"),
    (384, 8, 4, 8, (512, 4, False), True, "float32"),
    (256, 1, 1, 8, None, True, "float32"),  # one group: no choice of groups
    (384, 1, 1, 8, None, True, "float32"),
    (160, 1, 1, 8, None, True, "float32"),
    (600, 1, 1, 8, None, True, "float32"),
]


def expected_ids(values: Sequence[float], groups: int, chosen_groups: int, top_k: int, biased: bool) -> list[int]:
    """The logical experts of one token, from the values by which experts are compared."""
    size = len(values) // groups
    members = [range(group * size, (group + 1) * size) for group in range(groups)]
    best = [sorted((values[expert] for expert in group), reverse=True) for group in members]
    score = [sum(found[:2]) if biased else found[0] for found in best]
    chosen = sorted(range(groups), key=lambda group: (-score[group], group))[:chosen_groups]
    candidates = [expert for group in chosen for expert in members[group]]
    ids = sorted(candidates, key=lambda expert: (-values[expert], expert))[:top_k]
    if biased:
        return ids
    lowest = min(values[expert] for expert in ids)
    return sorted(ids, key=lambda expert: (values[expert] == lowest, expert))


def test_the_control_breaks_ties_by_the_lower_id() -> None:
    assert expected_ids([0, 0, 1, 1, 5, 0, 2, 2], 4, 2, 2, biased=False) == [4, 6]
    assert expected_ids([0, 0, 1, 1, 5, 0, 2, 2], 4, 2, 3, biased=True) == [4, 6, 7]
    assert expected_ids([1, 1, 1, 1, 1, 1, 1, 1], 4, 2, 3, biased=True) == [0, 1, 2]


Ask = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Ask]:
    """Answers of Triton's interpreter: the name of a function in `support/interpreted.py`, and its arguments."""
    with asking("interpreted.py") as ask:
        yield lambda *case: ask(case)


@pytest.mark.parametrize("kind", ["normal", "ties", "minus infinity"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_chooses_by_logical_groups_and_answers_with_physical_ids(
    case: tuple[Any, ...], kind: str, interpreted: Ask
) -> None:
    place, values, ids, weights, scores = interpreted("route", *case, kind)
    _, groups, chosen_groups, top_k, _, biased, _ = case
    for row, found, weight, score in zip(values, ids, weights, scores, strict=True):
        expected = expected_ids(row, groups, chosen_groups, top_k, biased)
        assert found == [place[expert] for expert in expected]
        assert weight == pytest.approx([score[expert] for expert in expected], rel=1e-2)


def added(numbers: Sequence[float]) -> float:
    """The sum in float32, adding one number after the other."""
    total = 0.0
    for number in numbers:
        (total,) = struct.unpack("f", struct.pack("f", total + number))
    return total


def in_order(numbers: Sequence[float], block: int, warps: int, side_by_side: bool) -> float:
    """The sum in the order that `Summing` describes; lanes and warps are added in pairs, as by `shfl.bfly`."""
    lanes = 32 * warps
    blocks = [added(numbers[at::block]) for at in range(block)]
    of_lane = [blocks[n * (block // lanes) : (n + 1) * (block // lanes)] for n in range(lanes)]
    sums = [added(of_lane[n] if side_by_side else blocks[n::lanes]) for n in range(lanes)]
    for width in (32, warps):
        while width > 1:
            width //= 2
            sums = [
                added([sums[at + n], sums[at + n + width]])
                for at in range(0, len(sums), 2 * width)
                for n in range(width)
            ]
    return sums[0]


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize(("size", "block", "warps"), [(256, 256, 2), (256, 128, 2), (1024, 1024, 8), (1024, 256, 4)])
def test_a_softmax_is_summed_in_the_requested_order(
    size: int, block: int, warps: int, side_by_side: bool, interpreted: Ask
) -> None:
    rows, totals = sums(interpreted, size, block, warps, side_by_side)
    assert totals == [in_order(row, block, warps, side_by_side) for row in rows]


def test_the_control_each_order_gives_different_sums(interpreted: Ask) -> None:
    rows, _ = sums(interpreted, 1024, 1024, 8, False)
    orders = [(1024, 8, False), (1024, 8, True), (512, 8, False), (256, 2, False)]
    assert len({tuple(in_order(row, *order) for row in rows) for order in orders}) == len(orders)


def sums(interpreted: Ask, *case: Any) -> tuple[list[list[float]], list[float]]:
    rows, totals = interpreted("sum", *case)
    return [list(map(float.fromhex, row)) for row in rows], list(map(float.fromhex, totals))


@pytest.mark.parametrize("case", [(1, 8, 256, "int32"), (100, 6, 160, "int64"), (0, 8, 16, "int32")], ids=str)
def test_logical_ids_are_mapped_and_padding_is_unchanged(case: tuple[Any, ...], interpreted: Ask) -> None:
    ids, place, mapped = interpreted("map", *case)
    assert mapped == [[place[expert] if expert >= 0 else expert for expert in row] for row in ids]


COPIES = [  # experts, ranks, spare slots on each rank, copies of an expert at most, tokens, experts per token
    (256, 8, 8, 2, 8, 8),
    (256, 8, 8, 2, 64, 8),
    (64, 8, 4, 5, 16, 4),
    (60, 6, 5, 3, 9, 4),
    (16, 2, 6, 2, 5, 2),
    (64, 4, 0, 1, 4, 8),
    (256, 8, 20, 2, 32, 8),
    (128, 16, 4, 3, 7, 6),
]


def drawn(case: tuple[int, ...]) -> tuple[list[int], list[tuple[list[list[int]], int | None, str]]]:
    """A placement with copies, and two batches: chosen ids with one of no expert, how many rows are tokens, a dtype."""
    experts, ranks, spare, most, tokens, top_k = case
    draw = random.Random(tokens)
    placement = random_copies(draw, experts, ranks, spare, most)
    batches = []
    for dtype, real in (("int32", None), ("int64", tokens - 3)):
        rows = [draw.sample(range(experts), top_k) for _ in range(tokens)]
        rows[0][0] = -1
        batches.append((rows, real, dtype))
    return placement, batches


@pytest.mark.parametrize("case", COPIES, ids=str)
def test_of_each_active_expert_one_copy_serves_the_whole_batch(case: tuple[int, ...], interpreted: Ask) -> None:
    experts, ranks, spare, _, tokens, top_k = case
    placement, batches = drawn(case)
    slots = len(placement) // ranks
    for rows, real, dtype in batches:
        mapped, chosen, load = interpreted("copies", placement, experts, ranks, rows, real, dtype)
        for row, found in zip(rows, mapped, strict=True):
            assert [placement[slot] if slot >= 0 else slot for slot in found] == row
            assert found == [chosen[expert] if expert >= 0 else expert for expert in row]
        counted = [slot for found in mapped[:real] for slot in found if slot >= 0]
        assert load == [counted.count(slot) for slot in range(len(placement))]
        used = set(counted)
        assert len({placement[slot] for slot in used}) == len(used)  # no expert is served twice
        if spare and tokens * top_k > 2 * experts:
            loads = [sum(slot // slots == rank for slot in used) for rank in range(ranks)]
            assert max(loads) - min(loads) <= 1


@pytest.mark.parametrize("weight", ["BY_TIME", "BY_PAIRS"])
@pytest.mark.parametrize("case", [*COPIES, (16, 4, 2, 3, 400, 3)], ids=str)
def test_a_large_batch_has_one_copy_of_each_expert_so_that_ranks_have_as_much_to_do(
    case: tuple[int, ...], weight: str, interpreted: Ask
) -> None:
    experts, ranks, _, _, tokens, _ = case
    placement, batches = drawn(case)
    slots = len(placement) // ranks
    for rows, real, dtype in batches:
        mapped, every, chosen, chosen_by_all, load = interpreted(
            "weight", placement, experts, ranks, rows, real, dtype, weight
        )
        for kernel, pure in ((mapped, chosen), (every, chosen_by_all)):
            assert kernel == [[pure[expert] if expert >= 0 else expert for expert in row] for row in rows]
        assert [[placement[slot] if slot >= 0 else slot for slot in found] for found in mapped] == rows
        counted = [slot for found in mapped[:real] for slot in found if slot >= 0]
        assert load == [counted.count(slot) for slot in range(len(placement))]
        if tokens == 400:
            tokens_of = Counter(placement[slot] for slot in counted)
            uses = {expert: work(count, weight) for expert, count in tokens_of.items()}
            busy = [
                sum(uses[placement[slot]] for slot in set(counted) if slot // slots == rank) for rank in range(ranks)
            ]
            assert max(busy) <= 1.05 * least_busiest(uses, placement, ranks)


def work(tokens: int, weight: str) -> int:
    """What an expert adds to its rank: its tokens, or 8 for its first 64 of them and 5 for each further 64."""
    return tokens if weight == "BY_PAIRS" else 8 + 5 * ((tokens - 1) // 64)
