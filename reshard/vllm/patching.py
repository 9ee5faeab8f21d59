"""Replaces functions of vLLM, each only once, however often the plugin is registered in a process."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def replace_once(owner: object, name: str, wrap: Wrap) -> None:
    """Replace the function `name` of a module or class by `wrap(function)`, unless this `wrap` already did.

    A class method stays one: `wrap` gets its function, which takes the class.
    """
    found = inspect.getattr_static(owner, name)
    of_class = isinstance(found, classmethod)
    old = found.__func__ if of_class else getattr(owner, name)
    key = f"{wrap.__module__}.{wrap.__qualname__}"
    done = getattr(old, "replaced_by_reshard", ())
    if key not in done:
        new = wrap(old)
        new.replaced_by_reshard = (*done, key)  # type: ignore[attr-defined]
        setattr(owner, name, classmethod(new) if of_class else new)


def replace_if_there(owner: object, name: str, wrap: Wrap) -> None:
    """Call `replace_once` if the function exists. If it does not, `support` reports that once it matters."""
    if callable(getattr(owner, name, None)):
        replace_once(owner, name, wrap)
