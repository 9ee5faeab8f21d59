"""For all tests: where they keep their files, how many threads they take, how long they go on, one DeepSeek-R1."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import deepseek_r1
import pytest
import torch
from scratch import made_once, memory_disk

LONG = "RESHARD_LONG_TESTS"


def on_gpu(config: pytest.Config) -> bool:
    """Whether tests/gpu is run, which is done by name; its models take 70 GB, its references all processors."""
    return "gpu" in (part for argument in config.args for part in Path(argument).parts)


def pytest_configure(config: pytest.Config) -> None:
    """Let `tmp_path` lie in memory; what PYTEST_DEBUG_TEMPROOT or --basetemp says goes first."""
    if not on_gpu(config) and (found := memory_disk()):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(found))


@pytest.fixture(scope="session", autouse=True)
def one_thread(request: pytest.FixtureRequest) -> None:
    """Let torch compute in one thread: every processor has a worker of its own, and threads that wait for each other
    made the search for a balanced placement ten times slower.
    """
    if not on_gpu(request.config):
        torch.set_num_threads(1)


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
