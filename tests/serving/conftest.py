"""One `Serving` for a whole run of pytest, shared by its workers."""

from __future__ import annotations

import os

import pytest
from harness import Serving


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Serving:
    """Real vLLM."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # a worker's directory lies in the run's
        directory = directory.parent
    return Serving(directory / "serving")
