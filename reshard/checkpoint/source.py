"""Finds the source that the user names: a directory, a repository in the Hugging Face cache or on the Hub, a bucket."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

from ..arguments import refuse_url
from ..errors import CheckpointError
from .directory import CONFIG, read_json_object
from .files import Files, LocalFiles
from .location import Url
from .remote import STORES, RemoteFiles, in_store
from .weights import indices_among, is_weights

_REPO_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_HF_URL = re.compile(
    rf"hf://(?P<repo_id>{_REPO_ID.pattern})(@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/@]+))?/?", re.DOTALL
)
_RECORDS = Path(".cache", "huggingface", "download")
_CHECKSUM = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")  # a SHA-256 or a Git blob id


@dataclass(frozen=True, slots=True)
class Hub:
    """How to ask the Hugging Face Hub, in the terms of `hf download`.

    `revision` is a branch, tag or commit. With `download`, the whole repository is put into the cache first.
    """

    revision: str | None = None
    token: str | None = None
    download: bool = False


ANY = Hub()


def find_source(src: str | Path, hub: Hub = ANY) -> Files:
    """The files of `src`: a directory, a repository of the Hugging Face Hub (org/name or hf://org/name@revision), or a
    folder of an object store (s3://bucket/folder, gs://…).

    A repository is taken from the Hugging Face cache if that has all of it; otherwise nothing is downloaded, and the
    files are read from the Hub at the commit that the revision has now.
    """
    text = str(src)
    if match := _HF_URL.fullmatch(text):
        return _repository(match["repo_id"], _merge(unquote(match["revision"] or ""), hub, text))
    scheme = text.partition("://")[0]
    if scheme in STORES:
        _refuse_hub_options(text, hub)
        return in_store(text, scheme)
    if scheme == "hf":
        raise CheckpointError(f"{text}: expected hf://organization/name, with @revision behind it if it is not main")
    refuse_url(src, CheckpointError)
    if Path(src).exists() or not _REPO_ID.fullmatch(text):
        _refuse_hub_options(text, hub)
        return LocalFiles(Path(src))
    return _repository(text, hub)


def _merge(revision: str, hub: Hub, src: str) -> Hub:
    """`hub` with the `revision` of the URL, if that has one."""
    if revision and hub.revision not in (None, revision):
        raise CheckpointError(f"{src}: its revision is not that of --revision, {hub.revision}; give one of them")
    return replace(hub, revision=revision or hub.revision)


def _refuse_hub_options(src: str, hub: Hub) -> None:
    if hub != ANY:
        raise CheckpointError(f"{src}: --revision, --token and --download are for repositories of the Hugging Face Hub")


def _repository(repo_id: str, hub: Hub) -> Files:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    where = f"hf://{repo_id}" + (f"@{hub.revision}" if hub.revision else "")
    try:
        if hub.download:
            return LocalFiles(Path(snapshot_download(repo_id, revision=hub.revision, token=hub.token)))
        if (cached := _cached(repo_id, hub.revision)) is not None:
            return LocalFiles(cached)
        commit = HfApi(token=hub.token).model_info(repo_id, revision=hub.revision).sha
    except OfflineModeIsEnabled as error:
        raise CheckpointError(
            f"{where}: not in the Hugging Face cache, or not all of it, and HF_HUB_OFFLINE forbids to ask the Hub; run "
            f"`hf download {repo_id}` first"
        ) from error
    except Exception as error:  # of huggingface_hub, and of the HTTP library that it uses
        said = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{where}: no such directory, not in the Hugging Face cache, and the Hub does not give it: {said:.400}; "
            f"check its name, `hf auth login` or --token, or run `hf download {repo_id}` first"
        ) from error
    return published_files(repo_id, str(commit), hub.token)


def published_files(repo_id: str, commit: str, token: str | None = None) -> RemoteFiles:
    """The files of a repository of the Hub at a commit, read from there whatever the cache has."""
    from huggingface_hub import HfFileSystem

    store = HfFileSystem(token=token, skip_instance_cache=True)
    return RemoteFiles(Url(f"hf://{repo_id}@{commit}"), store, f"{repo_id}@{commit}", repo_id, commit)


def is_repo_id(text: str) -> bool:
    """Whether `text` can name a repository of the Hub, as organization/name."""
    return _REPO_ID.fullmatch(text) is not None


def _cached(repo_id: str, revision: str | None) -> Path | None:
    """The snapshot of a repository in the Hugging Face cache, if all of it is there."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        root = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        snapshots = Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo_id.replace('/', '--')}" / "snapshots"
        found = list(snapshots.iterdir()) if revision is None and snapshots.is_dir() else []
        if len(found) != 1:  # a copy of a cache may lack refs/, which say what `main` is
            return None
        root = found[0]
    return root if _is_whole(root) else None


def _is_whole(root: Path) -> bool:
    """Whether a snapshot has a config and weights, and every file that its indices name."""
    names = [path.name for path in root.iterdir()]
    if CONFIG not in names or not any(map(is_weights, names)):
        return False
    maps = [read_json_object(root / name).get("weight_map") for name in indices_among(names)]
    return all((root / str(file)).exists() for found in maps if isinstance(found, dict) for file in found.values())


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
