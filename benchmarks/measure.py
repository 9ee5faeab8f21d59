"""Time and peak memory of a command, and of nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# A process counts what its parent held when it forked as its own peak, so a small one stands between.
_BETWEEN = """
import json, resource, subprocess, sys, time
started = time.monotonic()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, time.monotonic() - started, used.ru_maxrss * 1024, done.stdout]))
"""


@dataclass(frozen=True)
class Measured:
    """What a command did: `peak` is its largest resident memory in bytes."""

    status: int
    seconds: float
    peak: int
    stdout: str


def measure(command: Sequence[str | Path]) -> Measured:
    """Run `command` to its end."""
    between = [sys.executable, "-S", "-c", _BETWEEN, *map(str, command)]
    return Measured(*json.loads(subprocess.run(between, stdout=subprocess.PIPE, check=True).stdout))
