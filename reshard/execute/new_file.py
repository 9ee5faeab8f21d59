"""Creates small text files, and never overwrites one."""

from __future__ import annotations

from pathlib import Path

from ..arguments import refuse_url
from ..errors import OutputError


def refuse_existing(out: Path) -> None:
    """OutputError if `out` exists, even as a dangling link, or is a URL."""
    refuse_url(out)
    if out.exists() or out.is_symlink():
        raise OutputError(f"{out}: already exists; remove it, or choose another name")


def write_new_file(out: Path, content: str) -> None:
    """Write `content` as UTF-8 to the new file `out`; a character that UTF-8 cannot hold becomes a question mark.

    Raises OutputError if `out` exists, and OSError, with nothing left behind, if it cannot be written.
    """
    refuse_existing(out)
    try:
        file = out.open("x", encoding="utf-8", errors="replace")  # a file name in `content` need not be Unicode
    except FileExistsError as error:
        raise OutputError(f"{out}: already exists; remove it, or choose another name") from error
    try:
        with file:
            file.write(content)
    except OSError:
        out.unlink()
        raise
