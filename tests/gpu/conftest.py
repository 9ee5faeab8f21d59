"""One `Gpu` for the whole test session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from harness import Gpu


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Gpu:
    """The GPU. If RESHARD_GPU_WORK is set, models are kept in that directory for later test sessions."""
    kept = os.environ.get("RESHARD_GPU_WORK")
    return Gpu(Path(kept) if kept else tmp_path_factory.mktemp("gpu"))
