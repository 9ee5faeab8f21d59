"""The group of all commands, which is the only place where an error becomes words and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import click

from ..errors import ReshardError
from .render import fail, one_line
from .reports import error_report, print_json
from .terminal import Context, write_examples

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # as a shell reports a program that SIGPIPE ended


class Commands(click.Group):
    """Turns an exception from a command into one line, and with --json one object too, and an exit status."""

    context_class = Context

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.examples = examples

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the words, to tell --json from them even where they are no sound command."""
        ctx.obj = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that the words name."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            self._report(ctx, error, error.format_message(), error.exit_code)
            raise
        except ReshardError as error:
            self._fail(ctx, error, str(error), 1)
        except BrokenPipeError:
            # the reader has left; Python would complain again when it flushes the standard output at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(EXIT_BROKEN_PIPE)
        except OSError as error:
            self._fail(ctx, error, f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
        except KeyboardInterrupt as error:
            resumes = ctx.invoked_subcommand in ("zigzag", "place", "stage", "restore", "upload")
            self._fail(ctx, error, "interrupted" + "; rerun the command to resume" * resumes, EXIT_INTERRUPTED)

    def _fail(self, ctx: click.Context, error: BaseException, message: str, status: int) -> NoReturn:
        self._report(ctx, error, message, status)
        fail(message, status)

    def _report(self, ctx: click.Context, error: BaseException, message: str, status: int) -> None:
        if "--json" in ctx.obj:
            print_json(" ".join(self._names(ctx.obj)), error_report(type(error).__name__, one_line(message), status))

    def _names(self, words: list[str]) -> Iterator[str]:
        """The names of the command that `words` call."""
        command: click.Command = self
        for word in words:
            if not isinstance(command, click.Group) or word not in command.commands:
                return
            command = command.commands[word]
            yield word

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples of the whole program."""
        write_examples(self.examples, formatter)
