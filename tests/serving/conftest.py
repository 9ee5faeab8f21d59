"""One `Serving` for the whole pytest session, shared by its workers."""

from __future__ import annotations

import os

import pytest
from harness import Serving


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Serving:
    """Real vLLM, with one directory for all workers."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # a worker's directory lies inside the session's
        directory = directory.parent
    return Serving(directory / "serving")
