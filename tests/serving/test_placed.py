"""Originals served placed by real vLLM on the CPU: RESHARD_PLACEMENT, and not one byte of the checkpoint rewritten.

"Equal" and "close" are as in `test_serving`: two ranks under zigzag do the sums of stock round-robin in the same order;
any other placement does them in another. At EP 1 nothing is summed in another order, so the original's bits come back.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from harness import Serving
from test_serving import (
    Model,
    assert_equal,
    round_robin,
    v2,
    v3,
)

ZIGZAG = {"RESHARD_PLACEMENT": "zigzag"}


def moe_layers(model: Path) -> tuple[list[str], int]:
    """Names of the modules that hold experts, draft layers too, and the number of experts."""
    names = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    experts = [name.split(".experts.") for name in names if ".experts." in name]
    numbers = {int(rest.split(".")[0]) for _, rest in experts}
    return sorted({layer for layer, _ in experts}), len(numbers)


def random_file(serving: Serving, model: Path, ep: int, seed: int = 0, **changes: Any) -> Path:
    """A placement file for `model` with another random order in each layer."""
    layers, num_experts = moe_layers(model)
    chance = random.Random(seed)
    orders = {layer: chance.sample(range(num_experts), num_experts) for layer in layers}
    content = {
        "reshard_placement": 1,
        "strategy": "random",
        "ep_size": ep,
        "model_type": None,
        "num_experts": num_experts,
        "layers": layers,
        "physical_to_logical": orders,
        **changes,
    }
    path = serving.directory / f"{model.name}-random{ep}-{seed}-{len(str(content))}.json"
    path.write_text(json.dumps(content))
    return path


def placed_by(path: Path) -> dict[str, str]:
    return {"RESHARD_PLACEMENT": str(path)}


@pytest.mark.parametrize("model", [v3, v2], ids=["V3", "V2"])
def test_zigzag_of_an_original_equals_stock_round_robin_and_the_log_says_what_was_placed(
    model: Model, serving: Serving
) -> None:
    source = model(serving)
    answer = serving.generate(source, ranks=2, environment=ZIGZAG)
    assert_equal(answer, round_robin(serving, source))
    assert "2 MoE layers are placed: zigzag, digest" in answer.log
    assert "every slot was seen to be filled" in answer.log
