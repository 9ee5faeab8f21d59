"""How lines reach a terminal: broken at words, with commands left whole, and coloured as `hf` colours its own.

Errors are red and notes yellow; in help, headings are underlined and names bold. A pipe or a file gets each line as it
is, without colours. NO_COLOR turns colours off (https://no-color.org).
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import click

ERROR = "reshard: error:"
MAX_LINE = 1600  # characters of an error message
DEFAULT_WIDTH = 80  # of a terminal that does not say how wide it is
_COLOURS: dict[str, dict[str, Any]] = {
    ERROR: {"fg": "red", "bold": True},
    "problem:": {"fg": "red", "bold": True},
    "note:": {"fg": "yellow"},
}


class Whole(str):
    """A line that ends in a command to copy. It is never broken."""

    __slots__ = ()


def paint(text: str, **style: Any) -> str:
    """`text` in a colour or style of `click.style`."""
    return text if os.environ.get("NO_COLOR") else click.style(text, **style)


def echo(lines: Iterable[str], *, err: bool = False) -> None:
    """Print `lines` on the standard output, or with `err` on the standard error."""
    stream = sys.stderr if err else sys.stdout
    width = None
    if stream is not None and stream.isatty():  # it is None where the caller has closed it
        width = os.get_terminal_size(stream.fileno()).columns or DEFAULT_WIDTH
    for line in lines:
        parts = [line] if width is None else break_line(line, width)
        click.echo("\n".join([_colour(parts[0]), *parts[1:]]), err=err)


def fail(message: str, status: int) -> NoReturn:
    """Print `message` as one printable line of bounded length, whatever names it quotes, and exit."""
    echo([f"{ERROR} {one_line(message)}"], err=True)
    sys.exit(status)


def one_line(message: str) -> str:
    """`message` as one printable line of at most about MAX_LINE characters."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in " ".join(message.split()))
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE // 2]} […] {line[-MAX_LINE // 2 :]}"


def break_line(line: str, width: int) -> list[str]:
    """`line` broken at spaces into lines of at most `width` characters, unless it is `Whole`.

    The other lines are indented to the last column of the first: to where its last gap of two spaces or more ends.
    """
    if isinstance(line, Whole) or len(line) <= width:
        return [line]
    indent = len(line) - len(line.lstrip()) + 2
    columns = [gap.end() for gap in re.finditer(r"(?<=\S) {2,}", line)]
    hang = " " * (columns[-1] if columns and columns[-1] <= width // 2 else indent)
    return textwrap.wrap(line, width, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False)


def _colour(line: str) -> str:
    for start, style in _COLOURS.items():
        if line.startswith(start):
            return paint(start, **style) + line[len(start) :]
    return line


class _Formatter(click.HelpFormatter):
    def write_heading(self, heading: str) -> None:
        self.write(f"{'':>{self.current_indent}}{paint(f'{heading}:', underline=True)}\n")

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl([(paint(name, bold=True), what) for name, what in rows], col_max, col_spacing)


class Context(click.Context):
    """Formats help."""

    formatter_class = _Formatter


class Command(click.Command):
    """A command whose help ends with `examples`, each a line that works in a shell."""

    context_class = Context

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        write_examples(self.examples, formatter)


def write_examples(examples: Iterable[str], formatter: click.HelpFormatter) -> None:
    """Write the section of help that has examples."""
    with formatter.section("Examples"):
        for example in examples:
            formatter.write(f"{'':>{formatter.current_indent}}$ {example}\n")
