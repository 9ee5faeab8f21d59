"""Which pages of a file are in the page cache, so that those may stay that others have brought there."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator

PAGE = mmap.PAGESIZE
_WINDOW = 1 << 26  # bytes asked about at once
_LOWEST_BIT = bytes(value & 1 for value in range(256))  # of mincore's answer, the others mean nothing
_MAP_FAILED = ctypes.c_void_p(-1).value
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_CACHESTAT = 451  # Linux 6.5 and later


def resident(file: int, offset: int, size: int) -> Iterator[tuple[int, int]]:
    """The ranges (start, end) of pages among `size` bytes at `offset` that are in the page cache, in order.

    None if the kernel does not tell: it tells only the file's owner, and who may write to it.
    """
    if os.fstat(file).st_uid != os.geteuid() and not os.access(f"/proc/self/fd/{file}", os.W_OK, effective_ids=True):
        return
    for start in range(offset - offset % PAGE, offset + size, _WINDOW):
        length = min(_WINDOW, offset + size - start)
        if _is_absent(file, start, length):
            continue
        pages = _pages(file, start, length)
        first = pages.find(1)
        while first >= 0:
            end = pages.find(0, first)
            end = len(pages) if end < 0 else end
            yield start + first * PAGE, start + end * PAGE
            first = pages.find(1, end)


def _is_absent(file: int, start: int, size: int) -> bool:
    """Whether no page of the range is in the page cache, which older kernels cannot tell; mincore takes far longer."""
    if sys.platform != "linux":
        return False
    asked, found = (ctypes.c_uint64 * 2)(start, size), (ctypes.c_uint64 * 5)()  # found: cached, dirty and others
    return _LIBC.syscall(_CACHESTAT, file, asked, found, 0) == 0 and found[0] == 0


def _pages(file: int, start: int, size: int) -> bytes:
    """A byte for each page, 1 if it is in the page cache. All 0 if the file cannot be mapped into memory."""
    found = ctypes.create_string_buffer(-(-size // PAGE))
    address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file, start)
    if address not in (None, _MAP_FAILED):
        if _LIBC.mincore(address, size, found):
            found = ctypes.create_string_buffer(len(found))
        _LIBC.munmap(address, size)
    return found.raw.translate(_LOWEST_BIT)
