"""All of DeepSeek-R1, as sparse files: 91,991 tensors in 163 files within seconds and a bounded memory.

Seconds of the processor's: what a disk that other tests write to takes besides, `make bench` measures by itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import deepseek_r1
import pytest
from measure import measure

RESHARD = Path(sys.executable).with_name("reshard")


@pytest.mark.parametrize("command", ["inspect", "dry run"])
def test_the_whole_of_r1_is_read_in_six_seconds_and_300_mb(command: str, tmp_path: Path) -> None:
    source = tmp_path / "R1"
    deepseek_r1.build_sparse(source)
    arguments = {
        "inspect": ["inspect", source, "--ep", "8"],
        "dry run": ["zigzag", "--src", source, "--ep", "8", "--out", tmp_path / "out", "--dry-run"],
    }[command]
    took = measure([RESHARD, *arguments])
    assert took.status == 0
    assert "688.6 GB" in took.stdout
    assert took.cpu <= 6
    assert took.peak <= 300e6
