"""Checks of what callers pass, before anything is written: paths everywhere, and values from Python."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from .errors import OutputError, ReshardError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)", re.DOTALL)  # a Path has one slash left of two


def refuse_url(given: str | Path, error: type[ReshardError] = OutputError) -> None:
    """Raise `error` if `given` is a URL, such as s3://bucket/R1: a path of that name would be a folder `s3:` here."""
    if match := _URL.fullmatch(str(given)):
        scheme, rest = match.groups()
        raise error(
            f"{scheme}://{rest}: {scheme}:// is not supported; give a path, on a mounted file system if it is "
            f"remote (and an absolute one for a local folder named {scheme}:)"
        )


def check_whole(value: object, what: str, least: int = 1) -> None:
    """OutputError unless `value` is an int of at least `least`: a manifest holds no other numbers, numpy's included."""
    if type(value) is not int or value < least:
        raise OutputError(f"{what} must be an int of at least {least}, found {value!r:.80}")


def check_one_of(value: object, choices: Iterable[object], what: str) -> None:
    """OutputError unless `value` is one of `choices`."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise OutputError(f"{what} must be one of {', '.join(map(str, choices))}, found {value!r:.80}")
