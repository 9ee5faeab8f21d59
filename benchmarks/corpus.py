"""Real text without a network: the text in a Python installation, by kind, cut into tokens.

There are three kinds. *python*: the source of the standard library and of installed packages. *prose*: their
docstrings, Python's own help topics, packages' descriptions, and files of plain text, Markdown and reStructuredText.
*c++*: packages' headers. A `.py` file gives either its docstrings or its source, never both, so that no text is in two
kinds. A hash of each document's name decides the order, and another part of the hash holds a tenth of the documents out
of training.
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
MAX_BYTES = 32 << 10  # of one document: many short documents resemble many users more than a few long ones do
MIN_BYTES = 500
_SUFFIXES = {".py": "python", ".md": "prose", ".rst": "prose", ".txt": "prose"} | dict.fromkeys(
    (".h", ".hpp", ".cuh"), "c++"
)
_NAMES = {"METADATA": "prose"}  # a package's description, in *.dist-info
_PIECE = re.compile(rb" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]+|\n+[ \t]*|\s+")
_QUOTED = re.compile(rb'"""(.*?)"""', re.DOTALL)


@dataclass(frozen=True)
class Document:
    """A text, its kind (one of KINDS), and whether it is held out of training."""

    kind: str
    held_out: bool
    text: bytes


def read_documents(limit: int) -> list[Document]:
    """Documents of each kind: about `limit` bytes of each, or all if there are fewer."""
    kind_bytes = Counter[str]()
    documents, seen = [], set()
    for kind, digest, read in sorted(_candidates(), key=lambda candidate: candidate[1]):
        if kind_bytes[kind] >= limit:
            continue
        try:
            text = read(kind)[:MAX_BYTES]
        except OSError:  # a broken link
            continue
        content = hashlib.sha256(text).digest()
        if len(text) < MIN_BYTES or content in seen:  # the same licenses lie in many packages
            continue
        seen.add(content)
        kind_bytes[kind] += len(text)
        documents.append(Document(kind, digest[2] % 10 == 0, text))
    return documents


@dataclass(frozen=True)
class _Source:
    """A text that is read on demand: from the file `path`, or else `text` itself."""

    path: Path | None
    text: bytes = b""

    def __call__(self, kind: str) -> bytes:
        if self.path is None:
            return self.text
        text = self.path.read_bytes()
        return docstrings(text) if kind == "prose" and self.path.suffix == ".py" else text


def _candidates() -> Iterator[tuple[str, bytes, _Source]]:
    """Everything that could be a document: kind, hash of the name, source."""
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
    """Every file below `sys.path`, once, with its name relative to that entry."""
    seen = set()
    for root in dict.fromkeys(Path(entry).resolve() for entry in sys.path if entry):
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if Path(folder, name) not in seen and name != "__pycache__"]
            for name in names:
                path = Path(folder, name)
                yield path.relative_to(root).as_posix(), path
        seen.add(root)


def docstrings(source: bytes) -> bytes:
    """A module's triple-quoted strings of more than a line, mostly docstrings; parsing it would take far longer."""
    return b"\n\n".join(text for text in _QUOTED.findall(source) if b"\n" in text)


class Tokenizer:
    """Makes a token of each frequent word or sign, and of each byte of everything else."""

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
