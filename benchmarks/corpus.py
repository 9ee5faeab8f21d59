"""Real text without a network: what a Python installation has of it, by kind, cut into tokens.

Three kinds. *python*: the source of the standard library and of installed packages. *prose*: their docstrings, Python's
own help topics, packages' descriptions, and files of plain text, Markdown and reStructuredText. *c++*: packages'
headers. A `.py` file gives either its docstrings or its source, never both, so that no text is in two kinds. Documents
are taken in the order of a hash of their names, and another part of it keeps a tenth of them out of training.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

KINDS = ("prose", "python", "c++")
MAX_BYTES = 32 << 10  # of one document: many short ones are more like many users than a few long ones
MIN_BYTES = 500
_SUFFIXES = {".py": "python", ".md": "prose", ".rst": "prose", ".txt": "prose"} | dict.fromkeys(
    (".h", ".hpp", ".cuh"), "c++"
)
_NAMES = {"METADATA": "prose"}  # a package's description, in *.dist-info
_PIECE = re.compile(rb" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]+|\n+[ \t]*|\s+")
_QUOTED = re.compile(rb'"""(.*?)"""', re.DOTALL)


@dataclass(frozen=True)
class Document:
    """A text, its kind (one of KINDS), and whether it is kept out of training."""

    kind: str
    held_out: bool
    text: bytes


def read_documents(limit: int) -> list[Document]:
    """Documents of each kind, some `limit` bytes of it or as much as there is."""
    taken = Counter[str]()
    documents, seen = [], set()
    for kind, digest, read in sorted(_candidates(), key=lambda candidate: candidate[1]):
        if taken[kind] >= limit:
            continue
        try:
            text = read(kind)[:MAX_BYTES]
        except OSError:  # a link that leads nowhere
            continue
        content = hashlib.sha256(text).digest()
        if len(text) < MIN_BYTES or content in seen:  # licenses come many times
            continue
        seen.add(content)
        taken[kind] += len(text)
        documents.append(Document(kind, digest[2] % 10 == 0, text))
    return documents


@dataclass(frozen=True)
class _Source:
    """Text that is read when it is wanted: a file's, or given."""

    path: Path | None
    text: bytes = b""

    def __call__(self, kind: str) -> bytes:
        if self.path is None:
            return self.text
        text = self.path.read_bytes()
        return docstrings(text) if kind == "prose" and self.path.suffix == ".py" else text


def _candidates() -> Iterator[tuple[str, bytes, _Source]]:
    """All there is: kind, hash of the name, source."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield "prose", hashlib.sha256(name.encode()).digest(), _Source(None, text.encode())
    for name, path in _files():
        kind = _NAMES.get(path.name) or _SUFFIXES.get(path.suffix)
        if kind is None:
            continue
        digest = hashlib.sha256(name.encode()).digest()
        yield "prose" if kind == "python" and digest[1] % 2 else kind, digest, _Source(path)


def _files() -> Iterator[tuple[str, Path]]:
    """Every file where Python looks for modules, once, and its name below that place."""
    seen = set()
    for root in dict.fromkeys(Path(entry).resolve() for entry in sys.path if entry):
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if Path(folder, name) not in seen and name != "__pycache__"]
            for name in names:
                path = Path(folder, name)
                yield path.relative_to(root).as_posix(), path
        seen.add(root)


def docstrings(source: bytes) -> bytes:
    """A module's triple-quoted strings of more than a line, mostly docstrings: to parse it would take far longer."""
    return b"\n\n".join(text for text in _QUOTED.findall(source) if b"\n" in text)


class Tokenizer:
    """Frequent words and signs are a token each; of all else, each byte is."""

    def __init__(self, texts: Sequence[bytes], size: int) -> None:
        self.size = size
        counts = Counter(piece for text in texts for piece in _PIECE.findall(text) if len(piece) > 1)
        self._ids = {piece: 256 + rank for rank, (piece, _) in enumerate(counts.most_common(size - 256))}

    def encode(self, text: bytes) -> list[int]:
        """The token ids of a text."""
        ids: list[int] = []
        for piece in _PIECE.findall(text):
            known = self._ids.get(piece)
            if known is None:
                ids.extend(piece)
            else:
                ids.append(known)
        return ids
