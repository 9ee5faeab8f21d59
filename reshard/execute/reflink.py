"""Can an output share disk blocks with its source (reflink: XFS, Btrfs)? Found by trying, on a file without a name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..errors import OutputError
from . import syscalls

Reflink = Literal["auto", "always", "never"]
REFLINK: tuple[Reflink, ...] = get_args(Reflink)
LARGEST_BLOCK = 1 << 16  # network file systems call their transfer size a block


@dataclass(frozen=True, slots=True)
class Sharing:
    """Whether blocks are shared: in units of `block_size` bytes, or not at all and `why_not` in words.

    Where it is `required`, a run that cannot share what its plan says ends in an error; else it copies that. Where it
    is `forbidden`, no block may come to be shared.
    """

    block_size: int | None
    why_not: str = ""
    required: bool = False
    forbidden: bool = False


NOTHING_SHARED = Sharing(None, "not asked for")


def find_sharing(root: Path, names: Iterable[str], directories: Iterable[str], out: Path, reflink: Reflink) -> Sharing:
    """Whether a directory `out`, which need not exist yet, can share blocks with the files `names` below `root`.

    `directories` are the folders below `root`. Raises OutputError where `reflink` is "always" and it cannot, and where
    `out` lies in `root`: nothing may be tried there.
    """
    refuse_inside(out, root, directories)
    if reflink == "never":
        return Sharing(None, "--reflink never", forbidden=True)
    largest: dict[int, tuple[int, Path]] = {}
    for path in (root / name for name in names):
        status = path.stat()
        largest[status.st_dev] = max(largest.get(status.st_dev, (0, path)), (status.st_size, path))
    block_size = 0
    for _, path in largest.values():
        found = _try(path, out)
        if isinstance(found, str):
            if reflink == "always":
                raise OutputError(f"{out}: cannot share blocks with {path}: {found}; leave out --reflink always")
            return Sharing(None, found)
        block_size = max(block_size, found)
    return Sharing(block_size, required=reflink == "always")


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


def _try(path: Path, out: Path) -> int | str:
    """The block size in which `out` shares with the file at `path`, or why it cannot."""
    directory = nearest_directory(out)
    try:
        with path.open("rb") as source, tempfile.TemporaryFile(dir=directory) as target:
            block_size = os.fstatvfs(target.fileno()).f_bsize
            if block_size > LARGEST_BLOCK or os.fstat(source.fileno()).st_size < block_size:
                return f"no whole blocks to share: the file system's are of {block_size} bytes"
            syscalls.share(source.fileno(), 0, target.fileno(), 0, block_size)
    except OSError as error:
        return f"{error.strerror}, says the file system"
    return block_size
