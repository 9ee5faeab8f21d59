"""A server that speaks the part of the Hugging Face Hub's API that its client asks for when it reads a model.

`hub_uploads` has the part that it asks for when it uploads one.

It serves directories as commits of repositories: `/api/models/…` tells the commit and the tree, `/…/resolve/…` sends a
small file or redirects to `/cdn/…` on another host, as the Hub does with large ones, and that honours ranges. It counts
what it sends and notes what it is asked, and a test can have requests fail: with a status, cut short, or with the whole
file for a range.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from hub_uploads import Uploads

SMALL = 1 << 10  # bytes; larger files are redirected
HASHED = 64 << 20  # bytes; a larger file gets an ETag that is made up
_API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)(/(?P<what>revision|tree|commits|xet-write-token)/(?P<revision>[^/]+))?(/.*)?"
)
_FILE = re.compile(r"/(?P<repo>(?!cdn/)[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
_CDN = re.compile(r"/cdn/(?P<repo>[^/]+/[^/]+)/(?P<revision>[^/]+)/(?P<name>.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True)
class Request:
    """What was asked: `path` without its query, `range` as (first, last byte) or None. `number` counts from 0."""

    number: int
    method: str
    path: str
    range: tuple[int, int | None] | None


@dataclass(frozen=True)
class Fault:
    """How a request fails: with a status; after `cut` bytes of its answer; or by ignoring its range."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    whole: bool = False


class Hub:
    """The server's repositories, `{"org/name": {"main": commit}}` and `{commit: directory}`, and what it has seen."""

    SMALL = SMALL

    def __init__(self, store: Path) -> None:
        self.uploads = Uploads(self, store)
        self.branches: dict[str, dict[str, str]] = {}
        self.commits: dict[str, Path] = {}
        self.token: str | None = None  # only who has it may read
        self.xet = False  # whether files are said to be stored by Xet
        self.fault: Callable[[Request], Fault | None] = lambda request: None
        self.requests: list[Request] = []
        self.sent = 0  # bytes of files
        self.waited: list[float] = []  # seconds that the client would have slept before it tried again
        self.url = ""
        self._lock = threading.Lock()
        self._etags: dict[Path, str] = {}

    def add(self, repo: str, directory: Path, commit: str = "1" * 40, branch: str = "main") -> str:
        """Let `branch` be a commit that consists of the files in `directory`."""
        self.commits[commit] = directory
        self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def clear(self) -> None:
        """Forget what was asked and sent."""
        self.requests.clear()
        self.sent = 0
        self.waited.clear()

    def seen(self, request: Request) -> Request:
        """Note a request, and number it."""
        with self._lock:
            numbered = Request(len(self.requests), request.method, request.path, request.range)
            self.requests.append(numbered)
        return numbered

    def count(self, sent: int) -> None:
        """Note how much of a file was sent."""
        with self._lock:
            self.sent += sent

    def commit(self, repo: str, revision: str) -> str | None:
        """The commit that a revision of the repository is."""
        branches = self.branches.get(repo, {})
        return branches.get(revision) or (revision if revision in self.commits else None)

    def forget_etags(self) -> None:
        """Look at the files again: a test has changed one."""
        self._etags.clear()

    def etag(self, path: Path) -> str:
        """The Git blob id of a small file, the SHA-256 of a large one."""
        if path not in self._etags:
            size = path.stat().st_size
            data = path.read_bytes() if size <= HASHED else str(path).encode()
            blob = hashlib.sha1(b"blob %d\0" % size + data, usedforsecurity=False)
            self._etags[path] = (blob if size <= SMALL else hashlib.sha256(data)).hexdigest()
        return self._etags[path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the client's acknowledgement of its headers
    hub: Hub

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        fault = self.hub.fault(self.hub.seen(Request(0, self.command, path, None)))
        if fault is not None and fault.status is not None:
            self._send(fault.status, b"{}", fault.headers)
        elif (
            self.hub.token is not None
            and not path.startswith("/lfs/")  # an address that has its own signature
            and self.headers.get("Authorization") != f"Bearer {self.hub.token}"
        ):
            self._send(401, b"{}", {} if path.startswith("/api/repos/") else {"X-Error-Code": "RepoNotFound"})
        else:
            self._answer_with(*self.hub.uploads.answer(path, body))

    do_PUT = do_POST  # noqa: N815

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):  # chunked, as files are sent whose size the client does not ask
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        found = _RANGE.fullmatch(self.headers.get("Range", ""))
        wanted = (int(found[1]), int(found[2]) if found[2] else None) if found else None
        request = self.hub.seen(Request(0, self.command, path, wanted))
        fault = self.hub.fault(request)
        try:
            if fault is not None and fault.status is not None:
                self._send(fault.status, b"{}", fault.headers)
            elif self.hub.token is not None and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
                if not path.startswith("/cdn/"):
                    self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
                else:
                    self._route(path, wanted, fault)
            else:
                self._route(path, wanted, fault)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _route(self, path: str, wanted: tuple[int, int | None] | None, fault: Fault | None) -> None:
        if match := _API.fullmatch(path):
            self._api(match["repo"], match["what"], match["revision"] or "main")
        elif match := _FILE.fullmatch(path):
            self._resolve(match["repo"], match["revision"], match["name"], wanted, fault)
        elif match := _CDN.fullmatch(path):
            self._file(self.hub.commits[match["revision"]] / match["name"], wanted, fault, {})
        else:
            self._send(404, b"{}", {})

    def _api(self, repo: str, what: str | None, revision: str) -> None:
        if repo not in self.hub.branches:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        commit = self.hub.commit(repo, revision)
        if commit is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        root = self.hub.commits[commit]
        if what in ("commits", "xet-write-token"):
            self._answer_with(*(self.hub.uploads.commits(repo) if what == "commits" else self.hub.uploads.token()))
            return
        if what != "tree":
            siblings = [{"rfilename": name} for name in _names(root)]
            self._json({"id": repo, "sha": commit, "private": repo in self.hub.uploads.private, "siblings": siblings})
            return
        folders = {str(folder) for name in _names(root) for folder in Path(name).parents} - {"."}
        tree: list[dict[str, object]] = [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": name} for name in sorted(folders)
        ]
        for name in _names(root):
            size, etag = (root / name).stat().st_size, self.hub.etag(root / name)
            entry: dict[str, object] = {"type": "file", "oid": etag[:40], "size": size, "path": name}
            if size > SMALL:
                entry["lfs"] = {"oid": etag, "size": size, "pointerSize": 130}
                entry |= {"xetHash": etag} if self.hub.xet else {}
            tree.append(entry)
        self._json(tree)

    def _resolve(
        self, repo: str, revision: str, name: str, wanted: tuple[int, int | None] | None, fault: Fault | None
    ) -> None:
        commit = self.hub.commit(repo, revision)
        path = self.hub.commits[commit] / name if commit else None
        if path is None or not path.is_file():
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound" if commit else "RevisionNotFound"})
            return
        size, etag = path.stat().st_size, self.hub.etag(path)
        headers = {"X-Repo-Commit": commit or "", "ETag": f'"{etag}"'}
        if size <= SMALL:
            self._file(path, wanted, fault, headers)
            return
        headers |= {"X-Linked-Size": str(size), "X-Linked-ETag": f'"{etag}"'}
        if self.hub.xet:
            headers |= {"X-Xet-Hash": etag, "X-Xet-Refresh-Route": f"/api/models/{repo}/xet-read-token/{commit}"}
        cdn = self.hub.url.replace("127.0.0.1", "localhost")
        self._send(302, b"", {**headers, "Location": f"{cdn}/cdn/{repo}/{commit}/{name}"})

    def _file(
        self, path: Path, wanted: tuple[int, int | None] | None, fault: Fault | None, headers: dict[str, str]
    ) -> None:
        size = path.stat().st_size
        first, last, status = 0, size - 1, 200
        if wanted is not None and not (fault and fault.whole):
            first, last, status = wanted[0], min(size - 1, size - 1 if wanted[1] is None else wanted[1]), 206
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{size}"}
        count = last + 1 - first
        self.send_response(status)
        for key, value in {"Accept-Ranges": "bytes", **headers, "Content-Length": str(count)}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.flush()
        if self.command == "HEAD":
            return
        left = count if fault is None or fault.cut is None else min(count, fault.cut)
        with path.open("rb") as file:
            while left and (sent := os.sendfile(self.connection.fileno(), file.fileno(), first, left)):
                first, left = first + sent, left - sent
                self.hub.count(sent)
        if fault is not None and fault.cut is not None:
            self.close_connection = True

    def _answer_with(self, status: int, value: object, headers: dict[str, str]) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


def _names(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@contextmanager
def serving(cache: Path) -> Iterator[Hub]:
    """A block in which the Hub's client in this process asks this server, and has `cache` as its cache.

    What is uploaded is kept beside that.
    """
    hub = Hub(cache.with_name("hub-store"))
    handler = type("Handler", (_Handler,), {"hub": hub})
    with _Server(("127.0.0.1", 0), handler) as server, pytest.MonkeyPatch.context() as patch:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        patch.setenv("HF_XET_CACHE", str(cache.with_name("xet-cache")))
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=hub.waited.append, time=time.time))
        try:
            yield hub
        finally:
            server.shutdown()
