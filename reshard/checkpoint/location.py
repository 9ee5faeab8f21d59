"""Where files are, as messages and reports name it: a path or a URL. Both join names with `/`."""

from __future__ import annotations

from pathlib import Path


class Url(str):
    """A URL, such as hf://org/name@commit. A `Path` of it would lose one of its two slashes."""

    __slots__ = ()

    def __truediv__(self, name: str) -> Url:
        """What is called `name` below it."""
        return Url(f"{self}/{name}")

    @property
    def name(self) -> str:
        """Its last part."""
        return self.rpartition("/")[2]

    @property
    def parent(self) -> Url:
        """All but its last part."""
        return Url(self.rpartition("/")[0])

    def absolute(self) -> Url:
        """Itself."""
        return self


Location = Path | Url
