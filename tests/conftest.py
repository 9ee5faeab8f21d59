"""How long the tests that repeat themselves go on, where tests keep their files, and the one copy of DeepSeek-R1."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import deepseek_r1
import pytest
from scratch import made_once, memory_disk

LONG = "RESHARD_LONG_TESTS"


def pytest_configure(config: pytest.Config) -> None:
    """Let `tmp_path` lie in memory; what PYTEST_DEBUG_TEMPROOT or --basetemp says goes first.

    Not for tests/gpu, which are run by name and have models of 70 GB.
    """
    if "gpu" not in (part for argument in config.args for part in Path(argument).parts) and (found := memory_disk()):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(found))


@pytest.fixture(scope="session")
def rounds() -> Callable[[int, int], int]:
    """rounds(short, long): `short` in `make test`, `long` in `make stress`."""
    return lambda short, long: long if os.environ.get(LONG) else short


@pytest.fixture(scope="session")
def r1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of DeepSeek-R1 as sparse files, its routers filled, to be read only."""

    def make(directory: Path) -> None:
        deepseek_r1.build_sparse(directory)
        deepseek_r1.fill_routers(directory)

    return made_once(tmp_path_factory, "R1", make)
