"""What benchmarks report beside their figures: progress, package versions, GPUs, and files of results."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def say(text: str) -> None:
    """Show progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def installed(name: str) -> str:
    """A package's version."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "of unknown version"


def gpus(properties: str) -> list[str] | None:
    """A line for each GPU with these `properties`, as nvidia-smi's --query-gpu names them; None without nvidia-smi."""
    query = ["nvidia-smi", f"--query-gpu={properties}", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()
    except OSError:
        return None


def write_json(path: Path, value: Any) -> None:
    """Replace the file in one step, so that an interrupted job keeps its last results."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(json.dumps(value))
    partial.replace(path)
