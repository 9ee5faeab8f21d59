"""Changing a module of vLLM once, whether it is imported already or later: nothing is imported for the sake of it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Install = Callable[[ModuleType], None]


def when_imported(name: str, install: Install) -> None:
    """Call `install` with the module `name`: now if it is there, else as soon as it has been imported."""
    if name in sys.modules:
        install(sys.modules[name])
    elif not any(isinstance(finder, _Finder) and finder.waits_for(name, install) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, install))


def replace_once(owner: object, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `wrap(old)` in the place of the function `name` of a module or class, unless that was done before.

    Several may wrap the same function, each once. `wrap` keeps what stands in `old.__dict__`, as functools.wraps does.
    """
    old = getattr(owner, name)
    done = getattr(old, "replaced_by_reshard", ())
    if (who := f"{wrap.__module__}.{wrap.__qualname__}") not in done:
        new = wrap(old)
        new.replaced_by_reshard = (*done, who)  # type: ignore[attr-defined]
        setattr(owner, name, new)


def replace_if_there(owner: object, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """The same, and nothing where there is no such function: another vLLM goes on, and is refused where it matters."""
    if callable(getattr(owner, name, None)):
        replace_once(owner, name, wrap)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, install: Install) -> None:
        self._name = name
        self._install = install

    def waits_for(self, name: str, install: Install) -> bool:
        return (self._name, self._install) == (name, install)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._install)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, install: Install) -> None:
        self._loader = loader
        self._install = install

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._install(module)
