"""What the operating system does for a copy, a function each: share blocks, reserve room, find holes, forget pages.

Nothing here knows of checkpoints. Where a file system does not have one of these, its function says so.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator

# linux/fs.h: FICLONERANGE takes struct file_clone_range; linux/falloc.h: FS_IOC_RESVSP64 takes struct space_resv. The
# latter is fallocate(2) with FALLOC_FL_KEEP_SIZE, without the writes by which the C library stands in for it.
_FICLONERANGE = 0x4020940D
_FILE_CLONE_RANGE = struct.Struct("=qQQQ")
_FS_IOC_RESVSP64 = 0x4030582A
_SPACE_RESV = struct.Struct("=hh4xqqiI16x")
_CANNOT = {
    errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EPERM, errno.ETXTBSY, errno.EBADF,
}  # fmt: skip


def share(source: int, offset: int, target: int, at: int, size: int) -> None:
    """Make `size` bytes at `at` of the file `target` the same disk blocks as those at `offset` of the file `source`.

    All three are multiples of the file system's block size. Raises OSError; `is_unsupported` tells whether that is the
    file system's way to say no.
    """
    fcntl.ioctl(target, _FICLONERANGE, _FILE_CLONE_RANGE.pack(source, offset, size, at))


def is_unsupported(error: OSError) -> bool:
    """Whether `error` says that these files cannot have what was asked, rather than that something went wrong."""
    return error.errno in _CANNOT


def reserve(target: int, size: int) -> None:
    """Set room for `size` bytes aside, so that the file lies in one piece and a full disk shows before the copy.

    Raises OSError where there is no room; does nothing where the file system has no such thing.
    """
    try:
        fcntl.ioctl(target, _FS_IOC_RESVSP64, _SPACE_RESV.pack(0, os.SEEK_SET, 0, size, 0, 0))
    except OSError as error:
        if not is_unsupported(error):
            raise


def segments(file: int, offset: int, size: int) -> Iterator[tuple[bool, int, int]]:
    """The `size` bytes at `offset` as (is a hole, offset, size), in order. Without holes, or no word of them: data."""
    end = offset + size
    while offset < end:
        data = _seek(file, offset, os.SEEK_DATA, end)
        if data > offset:
            yield True, offset, data - offset
        hole = _seek(file, data, os.SEEK_HOLE, end) if data < end else end
        if hole > data:
            yield False, data, hole - data
        offset = hole


def _seek(file: int, offset: int, what: int, end: int) -> int:
    try:
        return min(os.lseek(file, offset, what), end)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole from here on
            return end
        if is_unsupported(error):
            return offset if what == os.SEEK_DATA else end
        raise


def forget(file: int, offset: int, size: int) -> None:
    """Let go of the cached pages of a range that are on disk, and begin to write those that are not."""
    os.posix_fadvise(file, offset, size, os.POSIX_FADV_DONTNEED)
