"""What `benchmarks/serve_placed.py` decides without a server: order, logs, report."""

from __future__ import annotations

from typing import Any

import pytest
from serve_placed import parse, plan, report, said, workload_of

PLACED = """\
(Worker_TP0_EP0 pid=1) INFO 11-26 [loading.py:142] 12 MoE layers are placed: zigzag, digest 0123456789ab
(Worker_TP0_EP0 pid=1) INFO 11-26 [fused.py:98] routers: one kernel for float32 logits; it agreed bit for bit
"""


def test_variants_take_turns_and_the_other_begins_in_the_next_repeat() -> None:
    assert plan(2, [64, 512]) == [
        *[(0, 64, "stock"), (0, 64, "placed"), (0, 512, "stock"), (0, 512, "placed")],
        *[(1, 64, "placed"), (1, 64, "stock"), (1, 512, "placed"), (1, 512, "stock")],
    ]


def test_a_server_must_serve_what_it_was_started_for() -> None:
    assert said(PLACED, "placed")[0].startswith("12 MoE layers are placed: zigzag")
    assert said("INFO 8 MoE layers are placed: /some/folder/b.json, digest 515c\n", "placed") == [
        "8 MoE layers are placed: b.json, digest 515c"
    ]
    assert said("INFO nothing\n", "stock") == []
    with pytest.raises(RuntimeError, match="placed: its log does not say that it is placed"):
        said("INFO nothing\n", "placed")
    with pytest.raises(RuntimeError, match="stock: its log says that it is placed"):
        said(PLACED, "stock")


def test_servers_keep_within_half_of_the_memory() -> None:
    workload = workload_of(parse(["serve", "models", "--json", "found.json", "--concurrency", "64"]))
    assert workload.arguments[: 2 * 3] == [
        *["--load-format", "dummy", "--kv-cache-memory-bytes", str(10 << 30), "--gpu-memory-utilization", "0.4"]
    ]
    assert '"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]' in " ".join(workload.arguments)


def test_ratios_are_of_the_same_repeat() -> None:
    def run(variant: str, repeat: int, rate: float) -> dict[str, Any]:
        numbers = {"request_throughput": rate, "mean_ttft_ms": 100.0, "mean_tpot_ms": 10 / rate}
        return {"variant": variant, "repeat": repeat, "concurrency": 64, **numbers}

    runs = [
        run("stock", 0, 1.0),
        run("placed", 0, 1.1),
        run("stock", 1, 2.0),
        run("placed", 1, 2.4),
        run("stock", 2, 9),
    ]
    record = {"machine": {"gpus": ["GPU"], "vllm": "0.26"}, "workload": {}, "runs": runs}
    assert report(record).splitlines()[-1] == (
        "| 64 | 2 | 1.5 (1 to 2) | 100 (100 to 100) | 7.5 (5 to 10) | 1.15 (1.1 to 1.2) | 1 (1 to 1) | "
        "0.8712 (0.8333 to 0.9091) |"
    )
