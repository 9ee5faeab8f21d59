"""Real file systems in a file, mounted through a loop device: to share blocks on, to fill up, to break."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MOUNTS_REQUIRED = "RESHARD_TEST_MOUNTS"
MKFS = {
    "xfs": ["mkfs.xfs", "-q"],
    "btrfs": ["mkfs.btrfs", "-q"],
    "ext4": ["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal"],
    "ext4-journal": ["mkfs.ext4", "-q", "-m", "0"],
}
_SHUTDOWN = 0x8004587D  # XFS_IOC_GOINGDOWN and EXT4_IOC_SHUTDOWN
_NO_LOG_FLUSH = 2


class Mounted:
    """A file system at `path`, in the image file `image`."""

    def __init__(self, kind: str, image: Path, path: Path) -> None:
        self.kind = kind
        self.image = image
        self.path = path

    def mount(self) -> None:
        """Make it visible at `path`."""
        subprocess.run(["mount", "-o", "loop", self.image, self.path], check=True)

    def unmount(self) -> None:
        """Take it away; what was not on disk of a dead one is gone."""
        subprocess.run(["umount", self.path], check=True)
        deadline = time.monotonic() + 30
        while subprocess.run(["losetup", "-j", self.image], check=True, capture_output=True).stdout:
            # a process that was started meanwhile may hold it for a moment; mounted again, it would still be dead
            assert time.monotonic() < deadline, f"{self.image} is still in use"
            time.sleep(0.05)

    def used(self) -> int:
        """Bytes taken, when all that was written is on disk and all that was removed is gone."""
        before = -1
        while True:
            subprocess.run(["sync", "-f", self.path], check=True)
            found = os.statvfs(self.path)
            used = (found.f_blocks - found.f_bfree) * found.f_frsize
            if used == before:
                return used
            before = used
            time.sleep(0.2)  # XFS lets go of removed files later

    def cut_power(self) -> None:
        """From now on nothing reaches the disk, and every call fails: what lies there is what a power cut leaves."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(fd)


@contextmanager
def mounted(kind: str, directory: Path, megabytes: int) -> Iterator[Mounted]:
    """A new file system of a `kind` of MKFS. Where there can be none, the test is skipped, or fails if told to."""
    command = MKFS[kind]
    missing = [
        what for what, there in (("root", os.geteuid() == 0), (command[0], shutil.which(command[0]))) if not there
    ]
    if missing:
        because = f"mounting {kind} takes {' and '.join(missing)}"
        if os.environ.get(MOUNTS_REQUIRED):
            pytest.fail(because)
        pytest.skip(because)
    image, path = directory / f"{kind}.img", directory / kind
    path.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    subprocess.run([*command, image], check=True, stderr=subprocess.DEVNULL)
    found = Mounted(kind, image, path)
    found.mount()
    try:
        yield found
    finally:
        found.unmount()
        image.unlink()
