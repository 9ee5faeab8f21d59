"""One `Gpu` for a whole run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from harness import Gpu


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Gpu:
    """The GPU; models are kept in RESHARD_GPU_WORK, if that is set, from one run to the next."""
    kept = os.environ.get("RESHARD_GPU_WORK")
    return Gpu(Path(kept) if kept else tmp_path_factory.mktemp("gpu"))
