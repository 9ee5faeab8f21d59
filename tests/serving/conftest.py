"""One `Serving` for the whole pytest session, shared by its workers."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from harness import Serving


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Real vLLM, with one directory for all workers."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # a worker's directory lies inside the session's
        directory = directory.parent
    serving = Serving(directory / "serving")
    yield serving
    serving.close()
