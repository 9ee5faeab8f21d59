"""Progress: a bar where there is a terminal, now and then a line where there is none, never on standard output."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from checkpoints import Spec, build
from command_line import run

RESHARD = Path(sys.executable).with_name("reshard")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint."""
    build(Spec("deepseek_v3", experts=8, layers=3), tmp_path / "source")
    return tmp_path / "source"


def arguments(command: str, source: Path) -> list[object]:
    """Of a command that takes its time."""
    out = source.with_name("out")
    return {
        "zigzag": ["zigzag", "--src", source, "--ep", 2, "--out", out],
        "analyze": ["analyze", source, "--ep", 2, "--tokens", 64],
    }[command]


@pytest.mark.parametrize(("command", "unit"), [("zigzag", "B/s"), ("analyze", " layers")])
def test_a_log_has_a_line_each_interval_and_results_stay_json(
    command: str, unit: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(*arguments(command, source), "--json")
    assert result.stderr == ""  # 30 seconds have not passed
    json.loads(result.stdout)
    monkeypatch.setattr("reshard.cli.progress.LOG_INTERVAL", 0)
    result = run(*arguments(command, source), "--json", *(["--restart"] if command == "zigzag" else []))
    json.loads(result.stdout)
    lines = result.stderr.splitlines()
    assert len(lines) > 3
    assert all(line.startswith(f"{command}: ") and unit in line and "\r" not in line for line in lines)


def test_a_quiet_run_prints_no_lines(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard.cli.progress.LOG_INTERVAL", 0)
    result = run(*arguments("zigzag", source), "--quiet")
    assert (result.stdout, result.stderr) == ("", "")


def test_a_terminal_has_a_bar_beside_json(source: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with open(ours, "rb", buffering=0) as terminal:  # noqa: PTH123  a descriptor
        command = [RESHARD, *map(str, arguments("zigzag", source)), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=True)
        os.set_blocking(terminal.fileno(), False)
        shown = b"".join(iter(lambda: terminal.read(65536) or b"", b""))
    os.close(theirs)
    assert json.loads(done.stdout)["already_complete"] is False
    assert b"zigzag: 100%" in shown
    assert b"\r" in shown
