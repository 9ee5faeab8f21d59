"""Progress bars: on a terminal only, and on standard error."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from ..execute.fill import Progress


@contextmanager
def bar(what: str, total: int, silent: bool) -> Iterator[Progress]:
    """Show a progress bar in bytes on a terminal, and nothing elsewhere."""
    from tqdm import tqdm

    with tqdm(
        desc=what, total=total, unit="B", unit_scale=True, disable=True if silent else None, file=sys.stderr
    ) as shown:

        def progress(done: int) -> None:
            shown.update(done)

        yield progress


def layer_bar(silent: bool) -> Callable[[Sequence[str]], Iterable[str]]:
    """A function that wraps layers in a progress bar on a terminal, as tqdm does."""
    from tqdm import tqdm

    return functools.partial(tqdm, desc="balance", unit=" layers", disable=True if silent else None, file=sys.stderr)
