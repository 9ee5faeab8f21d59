"""RESHARD_TRACE on a GPU, where routers run in CUDA graphs: compares traces with the routing that vLLM returns."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from harness import GRAPHS, Gpu, together
from test_gpu import v3

Row = tuple[tuple[int, ...], ...]
"""The experts of one token: for each layer, their ids in ascending order."""


def row(by_layer: Any) -> Row:
    return tuple(tuple(sorted(chosen)) for chosen in by_layer)


def recorded(directory: Path) -> Counter[Row]:
    """The rows of the only trace in `directory`, in logical ids."""
    (path,) = directory.glob("*.trace")
    line, _, rows = path.read_bytes().partition(b"\n")
    header = json.loads(line)
    top_k, order = header["top_k"], header["physical_to_logical"] or range(header["num_experts"])
    size = len(header["layers"]) * top_k
    tokens = (rows[first : first + size] for first in range(0, len(rows), size))
    return Counter(
        row([order[expert] for expert in token[at : at + top_k]] for at in range(0, size, top_k)) for token in tokens
    )


def test_a_trace_equals_the_routing_that_vllm_returns_and_has_logical_ids_for_an_output(
    gpu: Gpu, tmp_path: Path
) -> None:
    source = v3(gpu)
    returning = {**GRAPHS, "enable_return_routed_experts": True}
    resharded = gpu.resharded(source, 8)
    traces = {name: {"RESHARD_TRACE": str(tmp_path / name)} for name in ("original", "output")}
    original, output = together(
        lambda: gpu.answer(source, returning, environment=traces["original"]),
        lambda: gpu.answer(resharded, GRAPHS, environment=traces["output"]),
    )
    for answer in (original, output):
        assert answer.status == 0, answer.log[-6000:]
    assert output.tokens == original.tokens
    found = recorded(tmp_path / "original")
    moe = [layer for layer in range(len(original.routed[0][0])) if any(original.routed[0][1][layer])]
    returned = Counter(row(token[layer] for layer in moe) for prompt in original.routed for token in prompt)
    assert found == returned
    assert recorded(tmp_path / "output") == found
    print(f"recorded: {found.total()} tokens of {len(moe)} layers, as vLLM returns them")
