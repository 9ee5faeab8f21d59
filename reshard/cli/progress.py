"""Progress on standard error: a bar on a terminal, and in a log a line every `LOG_INTERVAL` seconds."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from ..execute.fill import Progress

LOG_INTERVAL = 30.0  # seconds
_LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} left, {rate_fmt}"
_LINE_WITHOUT_TOTAL = "{desc}: {n_fmt}, {elapsed} elapsed, {rate_fmt}"


class _Log:
    """Prints how far something is, in a line of its own, when `LOG_INTERVAL` seconds have passed since the last one."""

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        self._what = what
        self._total = total
        self._unit = unit
        self._done = 0
        self._started = self._printed = time.monotonic()

    def update(self, done: int) -> None:
        """Count `done` more."""
        from tqdm import tqdm

        self._done += done
        now = time.monotonic()
        if now - self._printed < LOG_INTERVAL:
            return
        self._printed = now
        line = tqdm.format_meter(
            self._done,
            cast(float, self._total),  # None is allowed, though tqdm's types say no
            now - self._started,
            prefix=self._what,
            unit=self._unit,
            unit_scale=self._unit == "B",
            bar_format=_LINE if self._total else _LINE_WITHOUT_TOTAL,
        )
        print(line, file=sys.stderr, flush=True)


@contextmanager
def bar(what: str, total: int | None, quiet: bool, unit: str = "B") -> Iterator[Progress]:
    """Show progress unless `quiet`; yields what is called with the number of bytes, or of another unit, just done."""
    from tqdm import tqdm

    if quiet:
        yield lambda done: None
    elif not sys.stderr.isatty():
        yield _Log(what, total, unit).update
    else:
        with tqdm(desc=what, total=total, unit=unit, unit_scale=unit == "B", file=sys.stderr) as shown:

            def progress(done: int) -> None:
                shown.update(done)

            yield progress


def layer_bar(quiet: bool) -> Callable[[Sequence[str]], Iterable[str]]:
    """A function that shows progress through the layers that it is given, unless `quiet`."""
    return functools.partial(_through, quiet)


def _through(quiet: bool, layers: Sequence[str]) -> Iterator[str]:
    with bar("balance", len(layers), quiet, " layers") as progress:
        for layer in layers:
            yield layer
            progress(1)
