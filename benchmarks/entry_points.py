"""Plugins for a vLLM beside which they are not installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def announce(site: Path, plugins: Mapping[str, str]) -> None:
    """Make `site` a directory that, on PYTHONPATH, has vLLM load these: by name the function, `module:function`."""
    for name, target in plugins.items():
        info = site / f"{name}-0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
        (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{name} = {target}\n")
