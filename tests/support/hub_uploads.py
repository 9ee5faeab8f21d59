"""The part of the Hugging Face Hub's API that its client asks for when it uploads, for the server of `hub_server`.

A repository begins with a commit that has `.gitattributes`, as on the Hub. Large files arrive by LFS: a batch of
SHA-256s is asked for, and those that the store lacks are put there. Or they arrive by Xet: `hf_xet` is told to use a
folder of this machine as its store, and does there what it does with the Hub's, chunks and deduplication included. A
commit names the files that it changes, and large ones by their SHA-256.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    from hub_server import Hub

_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = {
    "create": re.compile(r"/api/repos/create"),
    "validate": re.compile(r"/api/validate-yaml"),
    "branch": re.compile(rf"/api/models/{_REPO}/branch/(?P<revision>.+)"),
    "preupload": re.compile(rf"/api/models/{_REPO}/preupload/(?P<revision>.+)"),
    "commit": re.compile(rf"/api/models/{_REPO}/commit/(?P<revision>.+)"),
    "batch": re.compile(rf"/{_REPO}\.git/info/lfs/objects/batch"),
    "put": re.compile(r"/lfs/(?P<oid>[0-9a-f]{64})"),
}
Answer = tuple[int, Any, dict[str, str]]  # status, JSON, headers


def _files_in(shard: Path) -> Iterator[tuple[str, str]]:
    """SHA-256 and Xet's own hash of each file that one of Xet's shards describes, in entries of 48 bytes.

    A file has a header, with its hash and the number of its entries, and these, perhaps twice; its SHA-256 is in the
    last one.
    """
    data, at = shard.read_bytes(), 48
    while data[at : at + 32] != b"\xff" * 32:
        found = data[at : at + 32]
        flags, count = struct.unpack_from("<II", data, at + 32)
        at += 48 * (1 + count * (2 if flags >> 31 else 1))
        if flags >> 30 & 1:
            yield _hex(data[at : at + 32]), _hex(found)
            at += 48


def _hex(data: bytes) -> str:
    """A hash of four little-endian words."""
    return "".join(data[start : start + 8][::-1].hex() for start in range(0, 32, 8))


class Uploads:
    """What was uploaded to a `Hub`, below the folder `store`, which is made when something is."""

    def __init__(self, hub: Hub, store: Path) -> None:
        self.hub = hub
        self.store = store
        self.private: set[str] = set()
        self.history: dict[str, list[str]] = {}  # of each repository that was made here: its commits, first to last
        self.received = 0  # bytes of large files that arrived by LFS
        self.ignored: set[str] = set()  # files that the Hub will not take, as a .gitignore would say

    @property
    def xet(self) -> Path:
        """The folder that `hf_xet` takes for the Hub's store."""
        return self.store / "xet"

    @property
    def xet_received(self) -> int:
        """Bytes of the blocks that arrived by Xet."""
        return sum(path.stat().st_size for path in self.xet.glob("xet/xorbs/xorbs/default.*") if path.is_file())

    def answer(self, path: str, body: bytes) -> Answer:
        """What the server says to a POST or PUT."""
        for what, route in _ROUTES.items():
            if match := route.fullmatch(path):
                answer: Answer = getattr(self, f"_{what}")(match, body)
                return answer
        return 404, {}, {}

    def token(self) -> Answer:
        """Where hf_xet finds its store."""
        self.xet.mkdir(parents=True, exist_ok=True)
        return 200, {"casUrl": f"local://{self.xet}", "accessToken": "x", "exp": int(time.time()) + 3600}, {}

    def commits(self, repo: str) -> Answer:
        """The commits of a repository, last to first."""
        found = [
            {"id": commit, "authors": [], "date": "2026-01-01T00:00:00.000Z", "title": "", "message": ""}
            for commit in reversed(self.history.get(repo, [self.hub.branches[repo]["main"]]))
        ]
        return 200, found, {}

    def _create(self, match: re.Match[str], body: bytes) -> Answer:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{repo}"}
        if repo in self.hub.branches:
            return 409, {"error": "You already created this model repo", **url}, {}
        if asked.get("visibility") == "private" or asked.get("private"):
            self.private.add(repo)
        first = self.store / "empty"
        first.mkdir(parents=True, exist_ok=True)
        (first / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        self._add(repo, "main", first, b"initial commit")
        return 200, url, {}

    def _validate(self, match: re.Match[str], body: bytes) -> Answer:
        text = json.loads(body)["content"]
        if not re.match(r"---\n(.*\n)*?---\n", text):
            return 400, {"errors": [{"message": "no metadata"}], "warnings": []}, {}
        return 200, {"errors": [], "warnings": []}, {}

    def _branch(self, match: re.Match[str], body: bytes) -> Answer:
        repo, branch = match["repo"], unquote(match["revision"])
        if branch in self.hub.branches[repo]:
            return 409, {"error": "there"}, {}
        start = json.loads(body).get("startingPoint") or "main"
        self.hub.branches[repo][branch] = str(self.hub.commit(repo, start))
        return 200, {}, {}

    def _preupload(self, match: re.Match[str], body: bytes) -> Answer:
        commit = self.hub.commit(match["repo"], unquote(match["revision"]))
        if commit is None:
            return 404, {}, {"X-Error-Code": "RevisionNotFound"}
        root, files = self.hub.commits[commit], []
        for file in json.loads(body)["files"]:
            there = root / file["path"]
            files.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] > self.hub.SMALL else "regular",
                    "shouldIgnore": file["path"] in self.ignored,
                    "oid": self.hub.etag(there) if there.is_file() else None,
                }
            )
        return 200, {"files": files}, {}

    def _batch(self, match: re.Match[str], body: bytes) -> Answer:
        objects = []
        for wanted in json.loads(body)["objects"]:
            put = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            objects.append(wanted if self._object(wanted["oid"]).exists() else {**wanted, "actions": put})
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _put(self, match: re.Match[str], body: bytes) -> Answer:
        self.received += len(body)
        if hashlib.sha256(body).hexdigest() != match["oid"]:
            return 400, {"error": "other bytes than announced"}, {}
        self._object(match["oid"]).parent.mkdir(parents=True, exist_ok=True)
        self._object(match["oid"]).write_bytes(body)
        return 200, {}, {}

    def _commit(self, match: re.Match[str], body: bytes) -> Answer:
        repo, branch = match["repo"], unquote(match["revision"])
        parent = self.hub.branches[repo].get(branch)
        if parent is None:
            return 404, {}, {"X-Error-Code": "RevisionNotFound"}
        root = self.store / "commits" / f"{len(self.hub.commits)}"
        shutil.copytree(self.hub.commits[parent], root)
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "header":
                continue
            path, value = root / item["value"]["path"], item["value"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if item["key"] == "file":
                path.write_bytes(base64.b64decode(value["content"]))
            elif self._object(value["oid"]).exists():
                shutil.copy(self._object(value["oid"]), path)
            elif not self._take_from_xet(value["oid"], value["size"], path):
                return 400, {"error": f"{value['path']} was never uploaded"}, {}
        commit = self._add(repo, branch, root, body)
        return 200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit}, {}

    def _take_from_xet(self, oid: str, size: int, path: Path) -> bool:
        """Put a file together from the blocks that hf_xet has stored; False if it is not there."""
        import hf_xet
        from huggingface_hub.utils._xet import get_xet_session

        hashes = {sha: found for shard in self.xet.glob("xet/xorbs/shards/*.mdb") for sha, found in _files_in(shard)}
        if oid not in hashes:
            return False
        with get_xet_session().new_file_download_group(endpoint=f"local://{self.xet}") as group:
            group.start_download_file(hf_xet.XetFileInfo(hashes[oid], size), str(path))
        return hashlib.sha256(path.read_bytes()).hexdigest() == oid

    def _object(self, oid: str) -> Path:
        return self.store / "lfs" / oid

    def _add(self, repo: str, branch: str, root: Path, what: bytes) -> str:
        commits = self.history.setdefault(repo, [])
        commit = hashlib.sha1(repr((repo, branch, len(commits))).encode() + what, usedforsecurity=False).hexdigest()
        commits.append(commit)
        return self.hub.add(repo, root, commit, branch)
