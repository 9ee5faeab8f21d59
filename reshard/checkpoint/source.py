"""Finds the source that the user names: a directory, or a repository in the Hugging Face cache."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..arguments import refuse_url
from ..errors import CheckpointError

_REPO_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_RECORDS = Path(".cache", "huggingface", "download")
_CHECKSUM = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")  # a SHA-256 or a Git blob id
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


def find_checksums(root: Path, names: Iterable[str]) -> dict[str, str]:
    """The checksums that the files `names` below `root` were downloaded by, as far as the downloader recorded them.

    The Hugging Face cache has each file as a link to a blob with that name; a download to a folder has a record of it.
    """
    found = {name: _name_of_blob(root / name) or _recorded(root, name) for name in names}
    return {name: checksum for name, checksum in found.items() if checksum is not None}


def _name_of_blob(path: Path) -> str | None:
    while path.is_symlink():
        path = path.parent / path.readlink()
        if path.parent.name == "blobs" and _CHECKSUM.fullmatch(path.name):
            return path.name
    return None


def _recorded(root: Path, name: str) -> str | None:
    record = root / _RECORDS / f"{name}.metadata"
    if not record.is_file():
        return None
    etag = record.read_text(errors="replace").splitlines()[1:2]
    return etag[0] if etag and _CHECKSUM.fullmatch(etag[0]) else None


def identify(root: Path) -> Identity:
    """The repository and revision of `root`, as far as a Hugging Face cache or download recorded them."""
    folder = root.absolute()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return Identity(folder.parent.parent.name.removeprefix("models--").replace("--", "/"), folder.name)
    record = folder / _RECORDS / "config.json.metadata"
    if record.is_file():
        commit = record.read_text(errors="replace").partition("\n")[0]
        return Identity(None, commit if _COMMIT.fullmatch(commit) else None)
    return Identity(None, None)
