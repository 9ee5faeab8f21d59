"""Checks a run's output directory, makes directories, and makes new names survive a power cut."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from ..arguments import refuse_url
from ..checkpoint.location import Location
from ..errors import OutputError
from ..record.manifest import JOURNAL as JOURNAL
from . import syscalls

LOCK = ".reshard-lock"
PARTIAL = ".partial"
SPARE_SPACE = 16 << 20  # bytes that must stay free


def refuse_inside(out: Path, root: Location, directories: Iterable[str], option: str = "--out") -> None:
    """OutputError if `out` is or lies in `root` or one of its `directories`; these may be links. Refuses URLs too."""
    refuse_url(out)
    if not isinstance(root, Path):
        return
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


def check_out(out: Path, *, replace: bool = False) -> None:
    """OutputError unless `out` can be written to, and is absent, empty, holds an unfinished run, or may be replaced."""
    if out.is_symlink() and not out.exists():
        raise OutputError(f"{out}: a dangling link; remove it, or choose another --out")
    if out.exists():
        if not out.is_dir():
            raise OutputError(f"{out}: not a directory; choose another --out")
        if not replace and not (out / JOURNAL).is_file() and any(out.iterdir()):
            raise OutputError(
                f"{out}: not empty, and holds no unfinished run of reshard; choose another --out or empty it"
            )
    nearest = nearest_directory(out)
    if not os.access(nearest, os.W_OK | os.X_OK, effective_ids=True):
        raise OutputError(f"{out}: cannot be written: no permission to write to {nearest}; choose another --out")


def make_directory(directory: Path, most: int | None = 0o777) -> None:
    """Create `directory` and its parents so that they survive a power cut.

    Its permissions are those that umask and `most` both allow, and all for its owner.
    """
    absent = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if absent:
            syscalls.set_mode(directory, directory.stat().st_mode & (0o777 if most is None else most) & 0o777 | 0o700)
    except OSError as error:
        raise OutputError(f"{directory}: cannot be created: {error.strerror}; choose another --out") from error
    for path in absent:
        sync_directory(path.parent)


def sync_directory(directory: Path) -> bool:
    """Make the names in `directory` survive a power cut; False if its file system refuses to.

    That is safe: a file that lost its name is written again when the run is resumed.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return syscalls.sync(fd)
    except OSError as error:
        raise OutputError(f"{directory}: cannot be synced: {error.strerror}; rerun the command to resume") from error
    finally:
        os.close(fd)


def free_space(out: Path) -> int:
    """Free bytes on the file system of `out`, which need not exist yet."""
    return shutil.disk_usage(nearest_directory(out)).free


def allocated(path: Path) -> int:
    """Bytes of disk that the file at `path` takes; 0 if there is none."""
    try:
        return path.lstat().st_blocks * 512
    except OSError:
        return 0
