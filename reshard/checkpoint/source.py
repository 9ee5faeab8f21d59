"""Finds the source that the user names: a directory, or a repository in the Hugging Face cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..arguments import refuse_url
from ..errors import CheckpointError

_REPO_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Identity:
    """The repository and revision that a checkpoint came from; None if its directory does not tell."""

    repo_id: str | None
    revision: str | None


def find_source(src: str | Path) -> Path:
    """The directory of `src`: a path as it is, a repository id's snapshot in the cache. Downloads nothing."""
    refuse_url(src, CheckpointError)
    if Path(src).exists() or not _REPO_ID.fullmatch(str(src)):
        return Path(src)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(src), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{src}: no such directory, and no such repository in the Hugging Face cache; run `hf download {src}` first"
        ) from error


def identify(root: Path) -> Identity:
    """The repository and revision of `root`, as far as a Hugging Face cache or download recorded them."""
    folder = root.absolute()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return Identity(folder.parent.parent.name.removeprefix("models--").replace("--", "/"), folder.name)
    record = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    if record.is_file():
        commit = record.read_text(errors="replace").partition("\n")[0]
        return Identity(None, commit if _COMMIT.fullmatch(commit) else None)
    return Identity(None, None)
