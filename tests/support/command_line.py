"""`reshard` as the tests run it: in this process, through the command line's own front door."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from click.testing import CliRunner, Result

from reshard.cli.main import main


def run(*arguments: object) -> Result:
    """Run a command; an exception that no user should see fails the test."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run_well(*arguments: object) -> str:
    """Run a command, expect exit status 0, and return what it printed."""
    result = run(*arguments)
    assert result.exit_code == 0, f"reshard {' '.join(map(str, arguments))}: {result.output}"
    return result.output


class Endless(BaseException):
    """No part of the package can take this for an error of its own."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Fail instead of hanging, on a named pipe for example."""

    def expire(*_: object) -> None:
        raise Endless(f"no answer after {seconds} seconds")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def slowly(seconds: float, *arguments: object) -> list[str]:
    """A command that runs `reshard` in a process of its own, and rests after each file that it writes.

    So it can be interrupted before its end, however busy the machine is, and also where the tests themselves run in the
    background of a shell, which has its children ignore SIGINT.
    """
    script = (
        "import signal, sys, time, reshard.execute.run\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from reshard.cli.main import main\n"
        "write_file = reshard.execute.run.write_file\n"
        "def write_and_rest(*arguments):\n"
        "    record = write_file(*arguments)\n"
        "    time.sleep(float(sys.argv[1]))\n"
        "    return record\n"
        "reshard.execute.run.write_file = write_and_rest\n"
        "main(sys.argv[2:])\n"
    )
    return [sys.executable, "-c", script, str(seconds), *map(str, arguments)]
