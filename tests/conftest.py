"""How long the tests that repeat themselves go on."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

LONG = "RESHARD_LONG_TESTS"


@pytest.fixture(scope="session")
def rounds() -> Callable[[int, int], int]:
    """rounds(short, long): `short` in `make test`, `long` in `make stress`."""
    return lambda short, long: long if os.environ.get(LONG) else short
