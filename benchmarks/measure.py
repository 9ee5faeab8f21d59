"""Time, processor time and peak memory of one command, and what a list of such figures is reported as."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# A forked process counts its parent's memory towards its own peak, so a small process starts the command.
_STARTER = """
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
    """What a command took: `cpu` is user and system seconds, `peak` its maximum resident memory in bytes."""

    status: int
    seconds: float
    cpu: float
    peak: int
    stdout: str


def measure(command: Sequence[str | Path]) -> Measured:
    """Run `command` until it exits."""
    starter = [sys.executable, "-S", "-c", _STARTER, *map(str, command)]
    return Measured(*json.loads(subprocess.run(starter, stdout=subprocess.PIPE, check=True).stdout))


def cool() -> None:
    """Write everything to disk and empty the page cache. Raises PermissionError unless the user is root."""
    os.sync()
    DROP_CACHES.write_text("3")


def median(values: Iterable[float]) -> float:
    """The median."""
    return statistics.median(values)


def spread(values: Sequence[float], show: Callable[[float], str] = "{:.3g}".format) -> str:
    """The median (minimum to maximum), each number as `show` writes it."""
    middle, low, high = map(show, (median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"
