"""Real vLLM with a draft model in another directory: target and draft each follow their own contract, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import SHIM_ONLY, Result, Serving
from test_serving import MTP, assert_equal

# A target and a draft: whether each is an output.
PAIRS = {"target": (True, False), "draft": (False, True)}


def with_mtp(serving: Serving) -> Path:
    """16 experts in 4 groups, and a draft layer."""
    return serving.model("deepseek_v3", mtp=True)


def draft_of(serving: Serving) -> Path:
    """The same weights, routed by other groups: 2 of which a token may use 1."""
    return serving.edited(with_mtp(serving), "draft", lambda config: {**config, "n_group": 2, "topk_group": 1})


def answer(target: Path, draft: Path, serving: Serving, **more: Any) -> Result:
    return serving.generate(target, speculative_config={**MTP, "model": str(draft)}, **more)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_draft_in_another_directory_answers_and_is_accepted_as_beside_the_originals(
    pair: str, serving: Serving
) -> None:
    """The draft got its target's contract: a start with other groups was refused, or drafts were worse."""
    sources = with_mtp(serving), draft_of(serving)
    expected = answer(*sources, serving, plugins=SHIM_ONLY)
    models = [
        serving.resharded(model, 2) if is_output else model
        for model, is_output in zip(sources, PAIRS[pair], strict=True)
    ]
    found = answer(models[0], models[1], serving)
    assert_equal(found, expected)
    assert found.accepted_drafts == expected.accepted_drafts > 0
