"""Checks of what callers pass, before anything is written: paths everywhere, and values from Python."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path

from .errors import OutputError, ReshardError

MIN_FILE_SIZE = 1000  # bytes; anything less is a size whose unit was forgotten, as in 5 for 5GB

_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,12})?)\s*(?:([KMGT])(i?)B?|B)?", re.IGNORECASE)
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)", re.DOTALL)  # a Path has one slash left of two


def refuse_url(given: str | Path, error: type[ReshardError] = OutputError) -> None:
    """Raise `error` if `given` is a URL, such as s3://bucket/R1: a path of that name would be a folder `s3:` here."""
    if match := _URL.fullmatch(str(given)):
        scheme, rest = match.groups()
        raise error(
            f"{scheme}://{rest}: {scheme}:// is not supported; give a path, on a mounted file system if it is "
            f"remote (and an absolute one for a local folder named {scheme}:)"
        )


def as_path(given: str | Path, what: str) -> Path:
    """`given` as a Path; OutputError unless it is text or a path."""
    if not isinstance(given, (str, os.PathLike)):
        raise OutputError(f"{what} must be a path, found {given!r:.80}")
    return Path(given)


def absolute(given: str | Path) -> str | Path:
    """`given` as an absolute path if it is a path, for processes that have other working directories."""
    return Path(given).absolute() if Path(given).exists() else given


def parse_size(given: int | str, what: str) -> int:
    """`given` in bytes: a number of bytes, or text such as 5GB (G is 10^9), 0.5G or 4GiB (Gi is 2^30).

    OutputError if it is neither, or less than MIN_FILE_SIZE.
    """
    size: object = given
    if isinstance(given, str) and (match := _SIZE.fullmatch(given.strip())):
        number, unit, binary = match.groups()
        size = int(Decimal(number) * (1024 if binary else 1000) ** (" KMGT".index((unit or " ").upper())))
    if type(size) is not int:
        raise OutputError(f"{what} must be a size such as 5GB, 0.5GB, 500MB or 4GiB, found {given!r:.80}")
    if size < MIN_FILE_SIZE:
        raise OutputError(f"{what} must be at least 1KB, found {given!r:.80}, which is {size} bytes; write it like 5GB")
    return size


def check_whole(value: object, what: str, least: int = 1) -> None:
    """OutputError unless `value` is an int of at least `least`: a manifest holds no other numbers, numpy's included."""
    if type(value) is not int or value < least:
        raise OutputError(f"{what} must be an int of at least {least}, found {value!r:.80}")


def check_one_of(value: object, choices: Iterable[object], what: str) -> None:
    """OutputError unless `value` is one of `choices`."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise OutputError(f"{what} must be one of {', '.join(map(str, choices))}, found {value!r:.80}")
