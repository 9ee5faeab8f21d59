"""A caller's mypy finds what is misspelled or in the wrong place, because every parameter is spelled out and typed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RIGHT = """
from pathlib import Path
from reshard import FromFile, TraceInfo, place, restore, stage, trace_info, verify, zigzag

zigzag("R1", "R1-zz", ep_size=8, layout="source", max_shard_size="0.5GB", workers=2, restart=True)
zigzag(Path("R1"), Path("R1-zz"), 8, max_shard_size=5_000_000_000, reflink="never", allow_holes=True)
place("R1", "R1-mine", FromFile(8, "map.json"), check_source=True)
stage("R1-zz", Path("node0"), range(4), reflink="auto")
restore("R1-zz", "R1-again", progress=print)
sound: bool = verify("R1-zz", "R1", quick=False).ok
info: TraceInfo = trace_info("trace")
"""
WRONG = (
    'zigzag("R1", "R1-zz", 8, layuot="source")',
    'zigzag("R1", "R1-zz", 8, layout="sources")',
    'zigzag("R1", 8, "R1-zz")',
    'zigzag("R1", "R1-zz", 8, max_shard_size=0.5)',
    'place("R1", "R1-mine", "zigzag")',
    'stage("R1-zz", [0, 1], "node0")',
    'stage("R1-zz", "node0", [0, 1], reflnk="auto")',
    'restore("R1-zz", "R1-again", layout="source")',
    'verify("R1-zz", "R1", quik=True)',
    'verify("R1-zz").okay',
)


def test_mypy_finds_each_mistake_and_none_where_there_is_none(tmp_path: Path) -> None:
    file = tmp_path / "caller.py"
    file.write_text("\n".join([RIGHT, *WRONG]) + "\n")
    command = [sys.executable, "-m", "mypy", file]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    found = {int(line) for line in re.findall(r"caller\.py:(\d+): error", said)}
    first = len(RIGHT.splitlines()) + 2
    assert found == set(range(first, first + len(WRONG))), said
