"""Where tests keep their files: in memory where that is possible, and once for all of them what takes long to make."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import Spec, build

_SHARED_MEMORY = Path("/dev/shm")
_ROOM = 6 << 30  # bytes: several times what all tests together have there at a time


def memory_disk() -> Path | None:
    """A directory whose files lie in memory, None where there is none with room.

    A run flushes each of its files to disk, and a test often makes eighty: on a disk it takes five times as long. What
    real file systems do is tested on real ones, which `filesystems.mounted` makes.
    """
    if not os.access(_SHARED_MEMORY, os.W_OK):
        return None
    found = os.statvfs(_SHARED_MEMORY)
    available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    room = min(found.f_bavail * found.f_frsize, int(available[1]) << 10 if available else 0)
    return _SHARED_MEMORY if room >= _ROOM and not found.f_flag & os.ST_NOEXEC else None


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The directory `name` that `make` fills: by the first test of all processes that asks for it, others wait."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / name).exists():
            make(root / f"{name}.partial")
            (root / f"{name}.partial").rename(root / name)
    return root / name


def checkpoint(factory: pytest.TempPathFactory, spec: Spec) -> Path:
    """The checkpoint that `spec` describes, in a directory `source`, to be read only."""
    name = f"checkpoint-{hashlib.sha256(repr(spec).encode()).hexdigest()[:16]}"
    return made_once(factory, name, lambda directory: build(spec, directory / "source")) / "source"
