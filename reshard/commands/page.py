"""Writes an analysis as an HTML page: the file of `reshard analyze --html`."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.location import Location
from ..execute.destination import refuse_inside
from ..execute.new_file import refuse_existing, write_new_file
from ..traffic.analysis import Analysis
from ..traffic.page import render


def refuse_page(out: str | Path, root: Location) -> None:
    """OutputError if no page may be written to `out`, because it exists or lies in the checkpoint `root`."""
    folders: list[str] = []
    if isinstance(root, Path) and root.is_dir():
        folders = [str(found.relative_to(root)) for found in root.rglob("*") if found.is_dir()]
    refuse_inside(Path(out), root, folders, "--html")
    refuse_existing(Path(out))


def write_page(analysis: Analysis, out: str | Path, command: str = "") -> None:
    """Write the page, which names the `command` that made it.

    Raises OutputError if `out` exists or lies in the checkpoint.
    """
    refuse_page(out, analysis.path)
    write_new_file(Path(out), render(analysis, command))
