"""`reshard` as the tests run it: in this process, through the command line's own front door."""

from __future__ import annotations

from click.testing import CliRunner, Result

from reshard.cli import main


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
