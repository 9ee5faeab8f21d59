"""Finds out, by a trial, whether an output can share disk blocks with its source (reflinks, on XFS and Btrfs)."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..checkpoint.location import Location
from ..errors import OutputError
from ..plan.sharing import REFLINK, Reflink, Sharing
from . import syscalls
from .destination import nearest_directory, refuse_inside

MAX_BLOCK = 1 << 16  # bytes; network file systems report their transfer size as the block size


def find_sharing(
    root: Location, names: Iterable[str], directories: Iterable[str], out: Path, reflink: Reflink
) -> Sharing:
    """Whether the directory `out`, which need not exist yet, can share blocks with the files `names` below `root`.

    `directories` are the folders below `root`. Raises OutputError if `out` lies in `root`, which is never written to,
    and if `reflink` is "always" but blocks cannot be shared.
    """
    if reflink not in REFLINK:
        raise OutputError(f"{out}: reflink is {reflink!r:.80}, expected one of {', '.join(REFLINK)}")
    refuse_inside(out, root, directories)
    if not isinstance(root, Path):
        if reflink == "always":
            raise OutputError(f"{out}: cannot share blocks with {root}, on no disk here; leave out --reflink always")
        return Sharing(None, "the source is on no disk here")
    if reflink == "never":
        return Sharing(None, "--reflink never")
    largest: dict[int, tuple[int, Path]] = {}
    for path in (root / name for name in names):
        status = path.stat()
        largest[status.st_dev] = max(largest.get(status.st_dev, (0, path)), (status.st_size, path))
    block_size = 0
    for _, path in largest.values():
        result = _try(path, out)
        if isinstance(result, str):
            if reflink == "always":
                raise OutputError(f"{out}: cannot share blocks with {path}: {result}; leave out --reflink always")
            return Sharing(None, result)
        block_size = max(block_size, result)
    return Sharing(block_size, required=reflink == "always")


def _try(path: Path, out: Path) -> int | str:
    """The size of the blocks that `out` can share with the file at `path`, or why it cannot share."""
    directory = nearest_directory(out)
    try:
        with path.open("rb") as source, tempfile.TemporaryFile(dir=directory) as target:
            block_size = os.fstatvfs(target.fileno()).f_bsize
            if block_size > MAX_BLOCK or os.fstat(source.fileno()).st_size < block_size:
                return f"no whole blocks to share: this file system's have {block_size} bytes"
            syscalls.share(source.fileno(), 0, target.fileno(), 0, block_size)
    except OSError as error:
        if syscalls.is_unsupported(error):
            return "this file system has no reflinks" if error.errno != errno.EXDEV else "it is on another file system"
        return f"the file system says: {error.strerror}"
    return block_size
