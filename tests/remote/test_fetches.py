"""The requests that a store is asked in: everything once, little in vain, few of them, and little memory."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from pathlib import Path

import pytest

from reshard.checkpoint.header import read_header
from reshard.plan.fetches import MAX_FETCH, MAX_UNUSED, fetches
from reshard.plan.files import ExpertIds, Literal, Part, Range, Rows


def scattered(seed: int) -> list[Part]:
    """Ranges of two files in any order, with gaps, and of any size; rows and expert ids among them."""
    chance = random.Random(seed)
    parts: list[Part] = [Part(None, Literal(b"header"))]
    for file in ("a", "b"):
        offset = 0
        for _ in range(chance.randrange(1, 60)):
            offset += chance.choice((0, 0, 0, 1, 100, 5_000, 2 << 20))
            size = chance.choice((1, 12, 10_000, 700_000, 3 << 20, 40 << 20, 120 << 20))
            parts.append(Part(f"{file}{offset}", Range(file, offset, size)))
            offset += size
        parts.append(Part(f"{file}rows", Rows(file, offset, 12, (2, 0, 1))))
        parts.append(Part(f"{file}ids", ExpertIds(file, offset + 12, 80, "I64", (1, 0))))
    chance.shuffle(parts)
    return parts


@pytest.mark.parametrize("seed", range(30))
def test_everything_is_fetched_once_and_little_besides(seed: int) -> None:
    parts = scattered(seed)
    found = fetches(parts)
    needed = sum(part.content.size for part in parts if not isinstance(part.content, Literal))
    assert sum(fetch.used for fetch in found) == needed
    assert needed <= sum(fetch.size for fetch in found) <= needed * (1 + MAX_UNUSED)
    assert all(0 < fetch.used <= fetch.size <= MAX_FETCH for fetch in found)
    for before, after in pairwise(found):
        assert (before.file, before.end) <= (after.file, after.offset)
    for content in (part.content for part in parts):
        if not isinstance(content, Literal):
            covered = sum(
                max(0, min(fetch.end, content.offset + content.size) - max(fetch.offset, content.offset))
                for fetch in found
                if fetch.file == content.file
            )
            assert covered == content.size


def test_an_expert_whose_tensors_lie_together_is_one_request_whatever_their_order() -> None:
    size = 14 << 20
    ranges = [Range("a", expert * 3 * size + number * size, size) for expert in range(20) for number in (2, 0, 1)]
    assert len(fetches(Part(str(found), found) for found in ranges)) == 20
    apart = [Range("a", found.offset * 2, size) for found in ranges]
    assert len(fetches(Part(str(found), found) for found in apart)) == 60


def test_the_scales_of_r1_are_not_asked_for_one_by_one(r1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten of R1's 163 files, what zigzag gives the first of 16 ranks."""
    parts = [
        Part(tensor.name, Range(tensor.file, tensor.offset, tensor.size))
        for path in sorted(r1.glob("model-*.safetensors"))[10:20]
        for tensor in read_header(path).tensors
        if (expert := re.search(r"\.experts\.(\d+)\.", tensor.name)) and int(expert[1]) % 16 == 0
    ]
    weights = sum(not str(part.tensor).endswith("_scale_inv") for part in parts)
    assert len(parts) > 1.9 * weights > 300

    def requests() -> int:
        found = fetches(parts)
        assert sum(fetch.size for fetch in found) <= 1.005 * sum(fetch.used for fetch in found)
        return len(found)

    assert requests() <= 1.15 * weights
    monkeypatch.setattr("reshard.plan.fetches.MAX_UNUSED", 0)  # the control
    assert requests() > 1.9 * weights
