"""Runs cut short from inside, at a chosen point."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from oracle import assert_identical_trees

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


def resumed_after_every_cut(
    whole: Path, out: Path, step: int, write: Callable[..., object], finish: Callable[[Path], int]
) -> list[int]:
    """Cut runs at every `step`th block, and insist that each ends as `whole` did.

    Parameters:
        write: write(out, progress=…, workers=…) begins a run
        finish: takes a run up; how many files it found complete

    Returns what `finish` found after each cut, of which there are at least eight.

    """
    blocks: list[int] = []
    write(out, progress=blocks.append, workers=1)
    shutil.rmtree(out)
    found = []
    for last in range(0, len(blocks), step):
        with pytest.raises(Cut):
            write(out, progress=cut_after(last), workers=1)
        assert not is_loadable(out)
        found.append(finish(out))
        assert_identical_trees(whole, out)
        shutil.rmtree(out)
    assert len(found) >= 8
    assert found == sorted(found)
    return found


def is_loadable(out: Path) -> bool:
    """Whether an engine would find a model there."""
    return (out / "config.json").exists() or (out / "model.safetensors.index.json").exists()
