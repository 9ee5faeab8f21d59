"""A real browser for the tests, where one is installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chromium import PROGRAMS, Page, find_chromium, opened

BROWSER_REQUIRED = "RESHARD_TEST_BROWSER"


@contextmanager
def browser(directory: Path) -> Iterator[Page]:
    """A browser's tab. Where no browser is installed the test is skipped, or fails if told to."""
    program = find_chromium()
    if program is None:
        because = f"a page is looked at in a browser: install one of {', '.join(PROGRAMS)}"
        if os.environ.get(BROWSER_REQUIRED):
            pytest.fail(because)
        pytest.skip(because)
    with opened(program, directory) as page:
        yield page
