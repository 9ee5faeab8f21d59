"""The directory that a run writes to: may it be written, is there room, and do new names in it survive a power cut."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from ..errors import OutputError

JOURNAL = ".reshard-journal"
PARTIAL = ".partial"
SPARE_SPACE = 16 << 20  # bytes that stay free


def refuse_inside(out: Path, root: Path, directories: Iterable[str], option: str = "--out") -> None:
    """OutputError where `out` is `root` or lies in it; one of its `directories` may be a link to somewhere else."""
    resolved = out.resolve()
    for folder in ("", *directories):
        if resolved.is_relative_to((root / folder).resolve()):
            raise OutputError(
                f"{out}: is {root / folder} or lies in it; choose another {option}: the source is never written to"
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
        raise OutputError(f"{out}: not empty, and no unfinished run of reshard; choose another --out or empty it")


def make_directory(directory: Path) -> None:
    """Make `directory` and those above it, so that they last a power loss."""
    absent = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in absent:
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` last a power loss."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def free_space(out: Path) -> int:
    """Bytes free where `out` is or would be."""
    return shutil.disk_usage(nearest_directory(out)).free
