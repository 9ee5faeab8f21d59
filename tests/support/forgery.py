"""Manifests that were changed and made to agree with themselves again: their digest guards against accidents only."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

MANIFEST = "reshard_manifest.json"


def sign(text: bytes) -> bytes:
    """A manifest in its canonical form with its own digest; what is no manifest any more stays as it is."""
    try:
        tidy = msgspec.json.format(text, indent=1) + b"\n"
    except (msgspec.DecodeError, RecursionError):
        return text
    blank, found = re.subn(rb'(\n "digest": ")[^"]*("\n}\n)\Z', rb"\1\2", tidy)
    digest = blake3(blank).hexdigest().encode()
    return re.sub(rb'(\n "digest": ")("\n}\n)\Z', rb"\g<1>" + digest + rb"\2", blank) if found else tidy


def forge(output: Path, edit: Callable[[Any], object]) -> None:
    """Change the manifest of `output` in place, and sign it."""
    manifest = json.loads((output / MANIFEST).read_bytes())
    edit(manifest)
    (output / MANIFEST).write_bytes(sign(json.dumps(manifest, ensure_ascii=False).encode()))


def record(output: Path, name: str) -> None:
    """Make the manifest of `output` say of the file `name` what it is now; of its tensors it says what it said."""
    data = (output / name).read_bytes()

    def edit(manifest: Any) -> None:
        (entry,) = (entry for entry in manifest["files"] if entry["name"] == name)
        entry |= {"size": len(data), "digest": blake3(data).hexdigest()}
        if name.endswith(".safetensors"):
            entry["header"] = blake3(data[: 8 + int.from_bytes(data[:8], "little")]).hexdigest()

    forge(output, edit)
