"""Runs cut short from inside, at a chosen point."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import reshard.execute.run
from reshard.plan.files import OutputFile
from reshard.record.manifest import FileRecord


class Cut(BaseException):
    """What stops a run from inside, as Ctrl-C would."""


def cut_after(blocks: int) -> Callable[[int], None]:
    """A progress callback that stops the run at its nth block."""
    left = blocks

    def progress(written: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Cut

    return progress


@contextmanager
def cut_before(name: str) -> Iterator[None]:
    """A block in which a run must be cut as it comes to write the file `name`."""
    write_file = reshard.execute.run.write_file

    def write_all_but_it(file: OutputFile, *rest: Any) -> FileRecord:
        if file.name == name:
            raise Cut
        return write_file(file, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        patch.setattr(reshard.execute.run, "write_file", write_all_but_it)
        yield


def is_loadable(out: Path) -> bool:
    """Whether an engine would find a model there."""
    return (out / "config.json").exists() or (out / "model.safetensors.index.json").exists()
