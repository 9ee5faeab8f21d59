"""Publishes an output on the Hugging Face Hub, with a model card.

    check the output quickly; ask the Hub what the repository has; make the card and the manifest
    in a folder of links to the output's files, three times `upload_folder` of huggingface_hub:
        the manifest and the card: from now on the repository is known to be for this output
        the weights and all other files
        the index and config.json, without which nothing can be loaded

huggingface_hub sends nothing again that is there, so the same call resumes. Two files are the Hub's own: users edit the
card there, and the Hub edits `.gitattributes`. So the manifest that is published does not list them. Where the original
has them, it keeps their bytes, as of any file that is rewritten, and `restore` brings them back.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..arguments import as_path
from ..checkpoint.directory import CONFIG, INDEX
from ..checkpoint.source import is_repo_id, published_files
from ..errors import IntegrityError, OutputError
from ..record.manifest import MANIFEST, FileSummary, Manifest, encode_manifest, pack, read_manifest
from .card import CARD, model_card
from .verify import is_beside, verify

if TYPE_CHECKING:
    from huggingface_hub import HfApi

HUBS_OWN = (CARD, ".gitattributes")
STEPS = ((MANIFEST, CARD), (), (INDEX, CONFIG))  # what is sent first, then, last; () is what is not named
MESSAGE = "Upload with reshard"


@dataclass(frozen=True, slots=True)
class Upload:
    """What is sent where. `revision` is a branch, None for main; `base` is the commit that it is made from if it is
    new, and `exists` says whether the repository is there. `made` has the files that are not the output's own: the
    manifest, and the card unless that is the user's. `files` are all that the repository will have from this run.
    """

    out: Path
    repo_id: str
    revision: str | None
    base: str | None
    exists: bool
    private: bool
    made: Mapping[str, bytes]
    files: tuple[FileSummary, ...]
    notes: tuple[str, ...]
    token: str | None = field(default=None, repr=False)

    @property
    def size(self) -> int:
        """Bytes of `files`."""
        return sum(file.size for file in self.files)

    @property
    def card(self) -> str | None:
        """The text of the card that is made; None if the user's is sent, or the repository's is kept."""
        return self.made[CARD].decode() if CARD in self.made else None


@dataclass(frozen=True, slots=True)
class Uploaded:
    """Where an output is now: its address, and the commit that has all of it. If it was `already_complete`, nothing was
    sent.
    """

    upload: Upload
    url: str
    commit: str
    seconds: float
    already_complete: bool


def plan_upload(
    out: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    private: bool = False,
    base_model: str | None = None,
) -> Upload:
    """Check the output `out` quickly, and decide what is sent to the repository `repo_id`. Sends nothing.

    Parameters:
        out: what `zigzag` or `place` wrote, all of it
        repo_id: org/name; made if it is not there
        revision: a branch, made if it is not there; None for main
        token: for the Hub; None for HF_TOKEN, or that of `hf auth login`
        private: make the repository private
        base_model: org/name of the original; None if the manifest knows it

    Raises:
        IntegrityError: `out` is no output, or not sound
        OutputError: `out` has some ranks only, the Hub refuses, or the repository holds something else

    """
    root = as_path(out, "the output to upload")
    for name in (repo_id, *([] if base_model is None else [base_model])):
        if not is_repo_id(name):
            raise OutputError(f"{name}: expected the name of a repository of the Hugging Face Hub, organization/name")
    manifest = read_manifest(root)
    if manifest.staged_ranks is not None:
        raise OutputError(f"{root}: has the files of some EP ranks only; upload the whole output")
    if problems := verify(root, quick=True).problems:
        raise IntegrityError(f"{problems[0]}; nothing was uploaded")
    there = _ask(repo_id, revision, token, private)
    made = {MANIFEST: encode_manifest(_published(root, manifest))}
    files = {record.name: record.summary for record in manifest.files if record.name not in HUBS_OWN}
    _refuse_other(there, repo_id, token, {*files, MANIFEST}, made[MANIFEST])
    notes: list[str] = []
    if (root / CARD).exists() and CARD not in {record.name for record in manifest.files}:
        notes.append(f"{CARD} of {root} is the model card")
        files[CARD] = FileSummary(CARD, (root / CARD).stat().st_size)
    else:
        card = _card(root, manifest, repo_id, revision, base_model or manifest.source.repo_id, notes).encode()
        if CARD in there.names and published_files(repo_id, there.commit, token).read(CARD) != card:
            notes = [f"{CARD} of the repository is kept; to have a new one, delete it there and upload again"]
        else:
            made[CARD] = card
    files |= {name: FileSummary(name, len(data)) for name, data in made.items()}
    return Upload(
        out=root,
        repo_id=repo_id,
        revision=revision,
        base=there.base,
        exists=there.exists,
        private=private,
        made=made,
        files=tuple(files[name] for name in sorted(files)),
        notes=tuple(notes),
        token=token,
    )


def send_upload(upload: Upload) -> Uploaded:
    """Carry out `upload`. Call it again to resume; OutputError if the Hub does not take something."""
    from huggingface_hub import HfApi

    started = time.monotonic()
    api, where = HfApi(token=upload.token), _address(upload.repo_id, upload.revision)
    try:
        api.create_repo(upload.repo_id, private=upload.private or None, exist_ok=True)
        if upload.revision is not None and (upload.base is not None or not upload.exists):
            api.create_branch(upload.repo_id, branch=upload.revision, revision=upload.base, exist_ok=True)
        before = api.model_info(upload.repo_id, revision=upload.revision).sha
        with tempfile.TemporaryDirectory(prefix="reshard-upload-") as folder:
            _fill(Path(folder), upload)
            for names in STEPS:
                _send(api, Path(folder), upload, names)
        after = api.model_info(upload.repo_id, revision=upload.revision)
    except Exception as error:  # of huggingface_hub, of hf_xet, and of the HTTP library
        raise OutputError(
            f"{where}: not all of {upload.out} was uploaded: {_said(error)}; rerun the command to resume"
        ) from error
    there = {file.rfilename for file in after.siblings or ()}
    if missing := [file.name for file in upload.files if file.name not in there]:
        raise OutputError(f"{where}: does not have {missing[0]}, which was sent; does a .gitignore exclude it?")
    url = f"{api.endpoint}/{upload.repo_id}" + (f"/tree/{upload.revision}" if upload.revision else "")
    return Uploaded(upload, url, str(after.sha), time.monotonic() - started, already_complete=before == after.sha)


def upload(
    out: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    private: bool = False,
    base_model: str | None = None,
) -> Uploaded:
    """Publish the output `out` as `repo_id` on the Hugging Face Hub, with a model card.

    Call it again to resume. Parameters and errors are those of `plan_upload` and `send_upload`.
    """
    return send_upload(
        plan_upload(out, repo_id, revision=revision, token=token, private=private, base_model=base_model)
    )


@dataclass(frozen=True, slots=True)
class _There:
    """What the repository has: the names of its files at `commit`, and the commit that a new branch is made from."""

    names: frozenset[str] = frozenset()
    commit: str = ""
    base: str | None = None
    exists: bool = False


def _ask(repo_id: str, revision: str | None, token: str | None, private: bool) -> _There:
    """Ask the Hub what the branch `revision` has, or a new one would have: what the repository began with."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api, where, base = HfApi(token=token), _address(repo_id, revision), None
    if not (token or get_token()):
        raise OutputError(f"{where}: the Hub takes no files without a token; run `hf auth login`, or give --token")
    try:
        try:
            info = api.model_info(repo_id, revision=revision)
        except RevisionNotFoundError:
            base = api.list_repo_commits(repo_id)[-1].commit_id
            info = api.model_info(repo_id, revision=base)
    except RepositoryNotFoundError:  # the Hub says so too of what the token may not see
        return _There()
    except Exception as error:  # of huggingface_hub and of the HTTP library
        raise OutputError(f"{where}: cannot be looked up: {_said(error)}; check its name, and the token") from error
    if private and not info.private:
        raise OutputError(f"{where}: is public; change that in its settings on the Hub, or leave out --private")
    names = frozenset(file.rfilename for file in info.siblings or ())
    return _There(names, str(info.sha), base, exists=True)


def _refuse_other(there: _There, repo_id: str, token: str | None, ours: set[str], manifest: bytes) -> None:
    """OutputError if the repository has files that are not of this output: an engine might load both."""
    where = f"hf://{repo_id}"
    others = [name for name in sorted(there.names) if not is_beside(name)]
    strangers = [name for name in others if name not in ours] if MANIFEST in there.names else others
    if strangers:
        raise OutputError(
            f"{where}: has {strangers[0]} already, which is not of this output; choose another name, or a new branch "
            "by --revision"
        )
    if others and published_files(repo_id, there.commit, token).read(MANIFEST) != manifest:
        raise OutputError(f"{where}: has another output already; choose another name, or a new branch by --revision")


def _published(root: Path, manifest: Manifest) -> Manifest:
    """The manifest that is sent: without the Hub's own files, and without the path of the original on this machine."""
    source = manifest.source
    listed = {record.name for record in manifest.files}
    files = [
        msgspec.structs.replace(file, content=pack((root / file.name).read_bytes()))
        if file.name in HUBS_OWN and file.name in listed and file.content is None
        else file
        for file in source.files
    ]
    path = source.path if source.path.startswith("hf://") else source.path.rstrip("/").rpartition("/")[2]
    return msgspec.structs.replace(
        manifest,
        source=msgspec.structs.replace(source, path=path, files=files),
        files=[record for record in manifest.files if record.name not in HUBS_OWN],
    )


def _card(
    root: Path, manifest: Manifest, repo_id: str, revision: str | None, base_model: str | None, notes: list[str]
) -> str:
    """The card that is made. Adds to `notes` what the user can do better."""
    original = (root / CARD).read_text(errors="replace") if (root / CARD).exists() else ""
    if base_model is None:
        notes.append("the card does not name the original, whose repository is not known; name it by --base-model")
    try:
        return model_card(manifest, repo_id, revision, base_model, original)
    except Exception as error:  # of PyYAML, which is huggingface_hub's
        notes.append(f"{root / CARD}: its metadata cannot be read, and is kept as text: {_said(error)}")
        return model_card(manifest, repo_id, revision, base_model, f"\n```\n{original}\n```\n")


def _fill(folder: Path, upload: Upload) -> None:
    """Make `folder` what the repository will be: links to the output's files, and those that are made."""
    for file in upload.files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.name in upload.made:
            path.write_bytes(upload.made[file.name])
        else:
            path.symlink_to((upload.out / file.name).absolute())


def _send(api: HfApi, folder: Path, upload: Upload, names: tuple[str, ...]) -> None:
    named = [name for step in STEPS for name in step]
    api.upload_folder(
        repo_id=upload.repo_id,
        folder_path=folder,
        revision=upload.revision,
        commit_message=MESSAGE,
        allow_patterns=list(names) or None,
        ignore_patterns=None if names else named,
    )


def _address(repo_id: str, revision: str | None) -> str:
    return f"hf://{repo_id}" + (f"@{revision}" if revision else "")


def _said(error: Exception) -> str:
    causes = [error, *([error.__cause__] if error.__cause__ is not None else [])]
    return f"{': '.join(' '.join(str(one).split()) or type(one).__name__ for one in causes):.400}"
