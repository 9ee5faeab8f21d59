"""System calls for copying, one function each: share blocks, reserve space, find holes, lock, drop cached pages.

Nothing here knows about checkpoints. Each function says what it does on a file system without the feature.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

# linux/fs.h: FICLONERANGE takes struct file_clone_range; linux/falloc.h: FS_IOC_RESVSP64 takes struct space_resv. The
# latter is fallocate(2) with FALLOC_FL_KEEP_SIZE. Unlike the C library's posix_fallocate, it never falls back on
# writing zeros.
_FICLONERANGE = 0x4020940D
_FILE_CLONE_RANGE = struct.Struct("=qQQQ")
_FS_IOC_RESVSP64 = 0x4030582A
_SPACE_RESV = struct.Struct("=hh4xqqiI16x")
# linux/fiemap.h: FS_IOC_FIEMAP takes a struct fiemap, which ends in an array of struct fiemap_extent.
_FS_IOC_FIEMAP = 0xC020660B
_FIEMAP = struct.Struct("=QQIIII")
_FIEMAP_EXTENT = struct.Struct("=QQQ16xI12x")
_FIEMAP_EXTENT_LAST, _FIEMAP_EXTENT_UNWRITTEN = 0x1, 0x800
_EXTENTS_AT_ONCE = 128
_UNSUPPORTED = {
    errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EPERM, errno.ETXTBSY, errno.EBADF,
}  # fmt: skip
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK}  # Lustre without flock; NFS without its locks
_NO_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOENT}  # of directories: CIFS, some FUSE; squashfs


def share(source: int, offset: int, target: int, at: int, size: int) -> None:
    """Let `size` bytes at `at` of the file `target` share the disk blocks at `offset` of the file `source`.

    All three numbers must be multiples of the file system's block size. Raises OSError; `is_unsupported` tells whether
    that means that these files cannot share blocks.
    """
    fcntl.ioctl(target, _FICLONERANGE, _FILE_CLONE_RANGE.pack(source, offset, size, at))


def is_unsupported(error: OSError) -> bool:
    """Whether `error` means that the call is not supported for these files, not that it failed."""
    return error.errno in _UNSUPPORTED


def reserve(target: int, size: int) -> None:
    """Reserve `size` bytes of disk, so that the file is in one piece and a full disk is noticed before the copy.

    Raises OSError if there is too little space; does nothing if the file system cannot reserve.
    """
    try:
        fcntl.ioctl(target, _FS_IOC_RESVSP64, _SPACE_RESV.pack(0, os.SEEK_SET, 0, size, 0, 0))
    except OSError as error:
        if not is_unsupported(error):
            raise


def segments(file: int, offset: int, size: int) -> Iterator[tuple[bool, int, int]]:
    """Cut `size` bytes at `offset` into holes and data: (is a hole, offset, size), in order.

    All of it is data if the file system does not report holes.
    """
    end = offset + size
    while offset < end:
        data = _seek(file, offset, os.SEEK_DATA, end)
        if data > offset:
            yield True, offset, data - offset
        hole = _seek(file, data, os.SEEK_HOLE, end) if data < end else end
        if hole > data:
            yield False, data, hole - data
        offset = hole


def reserved(file: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each part of the first `size` bytes that has disk blocks, but was never written (fallocate).

    Such a part counts as data for `segments` once it was read. Nothing if the file system cannot tell.
    """
    start, flags = 0, 0
    while start < size and not flags & _FIEMAP_EXTENT_LAST:
        request = bytearray(_FIEMAP.pack(start, size - start, 0, 0, _EXTENTS_AT_ONCE, 0))
        request += bytes(_EXTENTS_AT_ONCE * _FIEMAP_EXTENT.size)
        try:
            fcntl.ioctl(file, _FS_IOC_FIEMAP, request)
        except OSError as error:
            if is_unsupported(error):
                return
            raise
        count = _FIEMAP.unpack_from(request)[3]
        if not count:
            return
        for number in range(count):
            logical, _, length, flags = _FIEMAP_EXTENT.unpack_from(request, _FIEMAP.size + number * _FIEMAP_EXTENT.size)
            start = logical + length
            if flags & _FIEMAP_EXTENT_UNWRITTEN:
                yield logical, min(start, size)


def _seek(file: int, offset: int, whence: int, end: int) -> int:
    try:
        return min(os.lseek(file, offset, whence), end)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole from here on
            return end
        if is_unsupported(error):
            return offset if whence == os.SEEK_DATA else end
        raise


def lock(file: int, *, shared: bool = False) -> bool:
    """Lock the file until it is closed; False if its file system has no locks. BlockingIOError if another has it."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def sync(file: int) -> bool:
    """Put the file or directory on disk; False if its file system refuses that for such a file."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        return False
    return True


def set_mode(file: int | Path, mode: int) -> None:
    """Set the permission bits of a file or directory; does nothing if the mount decides them, as on FAT."""
    try:
        os.chmod(file, mode)  # noqa: PTH101  an open file has no path
    except OSError as error:
        if not is_unsupported(error):
            raise


def forget(file: int, offset: int, size: int) -> None:
    """Drop a range's cached pages that are on disk, and begin to write those that are not. A file system may refuse."""
    try:
        os.posix_fadvise(file, offset, size, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        if not is_unsupported(error):
            raise
