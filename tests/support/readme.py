"""The commands that README shows, as a shell would run them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Command:
    """One line: the variables set in front of it, and its words."""

    variables: dict[str, str]
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        """What the shell starts."""
        return self.words[0]


def commands(text: str) -> list[Command]:
    """All lines of the indented code blocks of a Markdown text, in order, without their comments."""
    found = []
    for line in re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE):
        words = shlex.split(line, comments=True)
        variables = {}
        while re.match(r"[A-Z_]+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        found.append(Command(variables, tuple(words)))
    return found


def readme() -> list[Command]:
    """Those of README."""
    return commands((ROOT / "README.md").read_text())
