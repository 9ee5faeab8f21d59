"""A script in a process of its own, in which Triton interprets kernels: a line of JSON in, a line of JSON out.

Triton decides whether to interpret when it first sees a kernel, so no process can do both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def asking(script: str) -> Iterator[Callable[[Any], Any]]:
    """A block in which a case can be sent to a script of this folder, and its answer comes back."""
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name(script)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        asked, answers = process.stdin, process.stdout

        def ask(case: Any) -> Any:
            print(json.dumps(case), file=asked, flush=True)
            answer = answers.readline()
            assert answer, "the interpreter exited; see stderr"
            return json.loads(answer)

        yield ask
        asked.close()
        assert process.wait() == 0
