"""Closes a loaded model to new weights that would put experts into other experts' slots.

All of vLLM's ways to give a running model new weights call `load_weights` of the model or of a module in it: reloading,
weight transfer, and the calls of trainers through `collective_rpc`. We replace that method in the loaded model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..errors import UnsupportedError

_own_files_are_read: ContextVar[bool] = ContextVar("own_files_are_read", default=False)


@contextmanager
def own_files() -> Iterator[None]:
    """While this lasts, models are given weights that are numbered as their own: `load_weights` works."""
    token = _own_files_are_read.set(True)
    try:
        yield
    finally:
        _own_files_are_read.reset(token)


def own_files_are_read() -> bool:
    """Whether a running model is given such weights now."""
    return _own_files_are_read.get()


def close(model: Any, fault: str) -> None:
    """Make `load_weights` of `model`, and of each module in it, raise UnsupportedError with `fault` from now on."""
    for module in model.modules():
        if callable(getattr(module, "load_weights", None)):
            module.load_weights = _closed(module.load_weights, fault)


def _closed(load: Callable[..., Any], fault: str) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_weights(*args: Any, **kwargs: Any) -> Any:
        if not _own_files_are_read.get():
            raise UnsupportedError(fault)
        return load(*args, **kwargs)

    return load_weights
