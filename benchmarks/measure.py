"""Time, processor time and peak memory of a command, and of nothing else."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# A process counts what its parent held when it forked as its own peak, so a small one stands between.
_BETWEEN = """
import json, resource, subprocess, sys, time
started = time.monotonic()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)
seconds = time.monotonic() - started
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, done.stdout]))
"""
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True)
class Measured:
    """What a command did: `cpu` is user and system seconds, `peak` its largest resident memory in bytes."""

    status: int
    seconds: float
    cpu: float
    peak: int
    stdout: str


def measure(command: Sequence[str | Path]) -> Measured:
    """Run `command` to its end."""
    between = [sys.executable, "-S", "-c", _BETWEEN, *map(str, command)]
    return Measured(*json.loads(subprocess.run(between, stdout=subprocess.PIPE, check=True).stdout))


def cool() -> None:
    """Write everything to disk and empty the page cache. Raises PermissionError for a user who may not."""
    os.sync()
    DROP_CACHES.write_text("3")


def median(values: Iterable[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> str:
    """The median, and from where to where."""
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"
