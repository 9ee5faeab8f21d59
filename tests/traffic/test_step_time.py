"""The time that copies take to be chosen, as `analyze` adds it to a step, against what was measured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from reshard.placement.copy_choice import LARGE_BATCH, SMALL_BATCH
from reshard.traffic.step_time import choice_time

MEASURED = Path(__file__).parents[2] / "docs" / "gpu" / "copies-time.json"


@pytest.mark.parametrize("row", json.loads(MEASURED.read_text()), ids=lambda row: str(row["tokens"]))
def test_choosing_copies_takes_what_was_measured_beyond_the_router(row: dict[str, object]) -> None:
    took = row["microseconds"]
    assert isinstance(took, dict)
    more = statistics.median(took["copies"]) - statistics.median(took["router alone"])
    assert 1e6 * choice_time(int(str(row["tokens"]))) == pytest.approx(more, abs=0.15)


def test_ranks_that_route_their_own_tokens_only_map_them_unless_they_have_many() -> None:
    fixed = choice_time(LARGE_BATCH)
    assert choice_time(1) == fixed < choice_time(2)
    assert {choice_time(tokens, same_tokens=False) for tokens in (1, SMALL_BATCH, LARGE_BATCH)} == {fixed}
    assert choice_time(LARGE_BATCH + 1, same_tokens=False) == choice_time(LARGE_BATCH + 1) > fixed
