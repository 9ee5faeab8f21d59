"""The group of all commands, which is the only place where an error becomes words and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from ..errors import ReshardError
from .reports import error_report, print_json
from .terminal import Context, fail, one_line, write_examples

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # as a shell reports a program that SIGPIPE ended


class Commands(click.Group):
    """Turns an exception from a command into one line, and with --json one object too, and an exit status."""

    context_class = Context

    def __init__(
        self, *arguments: Any, homes: Mapping[str, tuple[str, str]], examples: Sequence[str] = (), **options: Any
    ) -> None:
        """`homes` has the module of each command in this package, and the first line of its help."""
        super().__init__(*arguments, **options)
        self.homes = homes
        self.examples = examples

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        return sorted(self.homes)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command of that name."""
        if cmd_name in self.homes and cmd_name not in self.commands:
            home = import_module(f".{self.homes[cmd_name][0]}", __package__)
            commands = [value for value in vars(home).values() if isinstance(value, click.Command)]
            self.add_command(next(command for command in commands if command.name == cmd_name))
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the first line of each command's help, without importing it."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, first_line) for name, (_, first_line) in sorted(self.homes.items())])

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
            print_json(" ".join(self._names(ctx)), error_report(type(error).__name__, one_line(message), status))

    def _names(self, ctx: click.Context) -> Iterator[str]:
        """The names of the command that the words call."""
        command: click.Command = self
        for word in ctx.obj:
            found = command.get_command(ctx, word) if isinstance(command, click.Group) else None
            if found is None:
                return
            command = found
            yield word

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples of the whole program."""
        write_examples(self.examples, formatter)
