"""Make vLLM load plugins that are not installed as packages."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def announce(site: Path, plugins: Mapping[str, str]) -> None:
    """Make `site` a directory that makes vLLM load `plugins` if it is on PYTHONPATH.

    Parameters:
        plugins: `module:function` by the plugin's name
    """
    for name, target in plugins.items():
        info = site / f"{name}-0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
        (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{name} = {target}\n")


def python_path(*folders: Path) -> str:
    """A PYTHONPATH of `folders`, then of this process's own PYTHONPATH."""
    return ":".join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
