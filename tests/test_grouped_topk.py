"""The router's kernel in Triton's interpreter, against a plain statement of group-limited routing: which experts, in
which order. Bits are for the GPU, where tests/gpu compares them with vLLM's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")
CASES = [  # experts, groups, groups of a token, experts of a token, how a softmax is summed, biased, dtype
    (256, 8, 4, 8, None, True, "float32"),
    (210, 7, 3, 8, None, True, "float32"),
    (512, 8, 4, 8, None, True, "float32"),
    (160, 8, 3, 6, (256, True), False, "bfloat16"),
    (160, 8, 3, 6, (256, False), False, "float32"),
    (256, 8, 4, 8, None, False, "float32"),
    (256, 8, 4, 8, (256, False), True, "float32"),
    (1024, 8, 4, 16, (1024, False), False, "float32"),
    (1024, 8, 4, 16, (256, True), False, "float32"),
    (384, 8, 4, 8, (256, False), True, "float32"),
]


def expected_ids(values: Sequence[float], groups: int, chosen_groups: int, top_k: int, biased: bool) -> list[int]:
    """Logical experts for one token, from the values that experts are compared by; None is never chosen."""
    size = len(values) // groups
    members = [range(group * size, (group + 1) * size) for group in range(groups)]
    best = [sorted((values[expert] for expert in group), reverse=True) for group in members]
    score = [sum(found[:2]) if biased else found[0] for found in best]
    chosen = sorted(range(groups), key=lambda group: (-score[group], group))[:chosen_groups]
    candidates = [expert for group in chosen for expert in members[group]]
    ids = sorted(candidates, key=lambda expert: (-values[expert], expert))[:top_k]
    if biased:
        return ids
    least = min(values[expert] for expert in ids)
    return sorted(ids, key=lambda expert: (values[expert] == least, expert))


def test_the_control_statement_of_ties() -> None:
    assert expected_ids([0, 0, 1, 1, 5, 0, 2, 2], 4, 2, 2, biased=False) == [4, 6]
    assert expected_ids([0, 0, 1, 1, 5, 0, 2, 2], 4, 2, 3, biased=True) == [4, 6, 7]
    assert expected_ids([1, 1, 1, 1, 1, 1, 1, 1], 4, 2, 3, biased=True) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["normal", "ties", "minus infinity"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_chooses_by_logical_groups_and_answers_with_physical_ids(case: tuple[Any, ...], kind: str) -> None:
    """In a process of its own: whether Triton interprets is settled when the kernel is first seen."""
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("interpreted.py"), json.dumps([*case, kind])]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    place, values, ids, weights, scores = json.loads(done.stdout)
    _, groups, chosen_groups, top_k, _, biased, _ = case
    for row, found, weight, score in zip(values, ids, weights, scores, strict=True):
        expected = expected_ids(row, groups, chosen_groups, top_k, biased)
        assert found == [place[expert] for expert in expected]
        assert weight == pytest.approx([score[expert] for expert in expected], rel=1e-2)
