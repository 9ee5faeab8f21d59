"""Checks a run's output directory (may it be written, is there space), and makes new names survive a power cut."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from ..arguments import refuse_url
from ..errors import OutputError
from ..record.manifest import JOURNAL as JOURNAL

PARTIAL = ".partial"
SPARE_SPACE = 16 << 20  # bytes that must stay free


def refuse_inside(out: Path, root: Path, directories: Iterable[str], option: str = "--out") -> None:
    """OutputError if `out` is or lies in `root` or one of its `directories`; these may be links. Refuses URLs too."""
    refuse_url(out)
    resolved = out.resolve()
    for folder in ("", *directories):
        if resolved.is_relative_to((root / folder).resolve()):
            raise OutputError(
                f"{out}: is {root / folder} or inside it; choose another {option}: the source is never written to"
            )


def nearest_directory(out: Path) -> Path:
    """`out`, or the directory nearest above it that exists."""
    directory = out.absolute()
    while not directory.is_dir():
        directory = directory.parent
    return directory


def check_out(out: Path) -> None:
    """OutputError unless `out` is absent, empty, or holds an unfinished run."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise OutputError(f"{out}: not a directory; choose another --out")
    if any(out.iterdir()) and not (out / JOURNAL).is_file():
        raise OutputError(f"{out}: not empty, and holds no unfinished run of reshard; choose another --out or empty it")


def make_directory(directory: Path) -> None:
    """Create `directory` and its parents so that they survive a power cut."""
    absent = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in absent:
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` survive a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def free_space(out: Path) -> int:
    """Free bytes on the file system of `out`, which need not exist yet."""
    return shutil.disk_usage(nearest_directory(out)).free
