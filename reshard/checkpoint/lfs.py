"""Git LFS pointers: what a clone without `git lfs` has in the place of a large file."""

from __future__ import annotations

from ..errors import CheckpointError
from .location import Location

MAX_POINTER_SIZE = 1024  # bytes, by Git LFS's specification
_BEGINNING = b"version https://git-lfs.github.com/spec/"


def is_pointer(data: bytes) -> bool:
    """Whether a file that begins with `data` is a pointer."""
    return data.startswith(_BEGINNING)


def refuse_pointer(data: bytes, path: Location) -> None:
    """CheckpointError if the file at `path`, which begins with `data`, is a pointer."""
    if is_pointer(data):
        raise CheckpointError(
            f"{path}: a Git LFS pointer, not the file that it stands for; run `git lfs pull` in its repository, or "
            "download the checkpoint with `hf download`"
        )
