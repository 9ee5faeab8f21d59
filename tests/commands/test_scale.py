"""All of DeepSeek-R1, as sparse files: 91,991 tensors in 163 files within seconds and a bounded memory.

Seconds of the processor's: what a disk that other tests write to takes besides, `make bench` measures by itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from measure import measure

RESHARD = Path(sys.executable).with_name("reshard")


@pytest.mark.parametrize("command", ["inspect", "dry run"])
def test_the_whole_of_r1_is_read_in_six_seconds_and_300_mb(command: str, r1: Path, tmp_path: Path) -> None:
    arguments = {
        "inspect": ["inspect", r1, "--ep", "8"],
        "dry run": ["zigzag", "--src", r1, "--ep", "8", "--out", tmp_path / "out", "--dry-run"],
    }[command]
    took = measure([RESHARD, *arguments])
    assert took.status == 0
    assert "688.6 GB" in took.stdout
    assert took.cpu <= 6
    assert took.peak <= 300e6


def test_r1_s_gates_are_analyzed_in_two_minutes_and_2_gb(
    r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other take seconds of the processor too
    page = tmp_path / "page.html"
    took = measure([RESHARD, "analyze", r1, "--ep", "8", "--nodes", "2", "--html", page, "--json"])
    assert took.status == 0
    assert took.cpu <= 120
    assert took.peak <= 2e9
    assert page.stat().st_size <= 1e6
    means = {found["strategy"]: found["mean"] for found in json.loads(took.stdout)["candidates"]}
    assert [round(means[name]["ranks"], 1) for name in ("linear", "zigzag")] == [4.0, 5.3]
    assert means["zigzag"]["imbalance"] < means["linear"]["imbalance"]
