"""As much of the model hub's protocol as huggingface_hub needs to download a repository, on loopback."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


@dataclass(frozen=True)
class Large:
    """A file that begins with `head` and then has zeros up to `size` bytes, which only exist while they are sent."""

    head: bytes
    size: int

    def __len__(self) -> int:
        return self.size

    def part(self, start: int, stop: int) -> bytes:
        """The bytes `start` to `stop`."""
        return self.head[start:stop].ljust(stop - start, b"\0")


@dataclass
class Repo:
    """Files by name; each revision name stands for a commit and its files."""

    revisions: dict[str, dict[str, bytes | Large]]
    gated: bool = False
    token: str | None = None  # private: who does not send it is told that there is nothing
    card: dict[str, Any] | None = None  # the model card's front matter

    def commit(self, revision: str) -> str | None:
        """The commit a branch, tag or commit name means."""
        commits = {
            name: hashlib.sha1(f"{sorted(files)}{name}".encode()).hexdigest() for name, files in self.revisions.items()
        }
        return revision if revision in commits.values() else commits.get(revision)

    def files(self, commit: str) -> dict[str, bytes | Large]:
        return next(files for name, files in self.revisions.items() if self.commit(name) == commit)


@dataclass
class Request:
    """One request as the server saw it."""

    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class FakeHub:
    """A hub with `repos`; start it with `with hub:`. Faults are set by attributes while it runs."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    status: int | None = None  # answer everything with this status
    cut: dict[str, int] = field(default_factory=dict)  # file name -> how many more of its downloads break off midway
    url: str = ""
    ranges: bool = True  # whether parts of files can be asked for
    sizes: bool = True  # whether accounts have the sizes of files, if they are asked for
    sent: int = 0  # bytes of contents and accounts

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, name: str, folder: Path, **more: Any) -> None:
        """Serves a folder as a repository with one branch, main."""
        files: dict[str, bytes | Large] = {
            p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
        }
        self.repos[name] = Repo({"main": files}, **more)

    def downloaded(self) -> list[str]:
        """Names of the files whose content was asked for, in order."""
        return [m[1] for r in self.requests if r.method == "GET" and (m := re.search(r"/resolve/[^/]+/(.+)", r.path))]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("authorization")
        self.hub.requests.append(Request(self.command, path, self.headers.get("range"), authorization))
        if self.hub.status:
            return self._error(self.hub.status, "")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+)|/tree/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        repo = self.hub.repos.get(match[1]) if match else None
        if repo is None or match is None or (repo.token and authorization != f"Bearer {repo.token}"):
            return self._error(401 if authorization is None else 404, "RepoNotFound")
        if repo.gated and file:
            return self._error(403, "GatedRepo")
        revision = match[2] or (match[3] if api else None) or "main"
        commit = repo.commit(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        files = repo.files(commit)
        if file:
            return self._file(file[3], commit, files)
        if api and api[3]:
            entries = [_tree_entry(name, content) for name, content in files.items()]
            return self._send(200, json.dumps(entries).encode())
        with_sizes = "blobs=" in self.path and self.hub.sizes
        siblings = [{"rfilename": n, **({"size": len(c)} if with_sizes else {})} for n, c in files.items()]
        info = {"id": match[1], "modelId": match[1], "sha": commit, "siblings": siblings}
        if repo.card is not None:
            info["cardData"] = repo.card
        return self._send(200, json.dumps(info).encode())

    def _file(self, name: str, commit: str, files: dict[str, bytes | Large]) -> None:
        if name not in files:
            return self._error(404, "EntryNotFound")
        content = files[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(content)}"', "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return self._send(200, content, headers)
        status, start, stop = 200, 0, len(content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        if wanted and self.hub.ranges:
            status, start = 206, int(wanted[1])
            stop = min(stop, int(wanted[2]) + 1) if wanted[2] else stop
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        part = content.part(start, stop) if isinstance(content, Large) else content[start:stop]
        if self.hub.cut.get(name, 0) > 0:
            self.hub.cut[name] -= 1
            return self._send(status, part, headers, sent=len(part) // 2)
        return self._send(status, part, headers)

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _send(
        self, status: int, body: bytes | Large, headers: dict[str, str] | None = None, sent: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            assert isinstance(body, bytes)
            self.wfile.write(body[:sent])
            self.hub.sent += len(body[:sent])
        if sent is not None:
            self.close_connection = True  # the client was promised more


@contextmanager
def own_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """For a `with`: a hub that huggingface_hub talks to, with a cache of its own, no token, and no pauses between retries."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    proxies = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
    with FakeHub() as hub:
        _http.close_session()  # a client keeps the variables that it was made with
        point_at(hub.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in (*("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"), *proxies, *(name.lower() for name in proxies)):
            monkeypatch.delenv(name, raising=False)
        # Only these modules' sleep, not everyone's.
        no_pause = SimpleNamespace(sleep=lambda seconds: None, time=lambda: 0.0, monotonic=lambda: 0.0)
        monkeypatch.setattr("huggingface_hub.file_download.time", no_pause)
        monkeypatch.setattr("huggingface_hub.utils._http.time", no_pause)
        yield hub
        _http.close_session()


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes huggingface_hub talk to this address."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", url)


def _etag(content: bytes | Large) -> str:
    if isinstance(content, Large):
        return hashlib.sha1(b"large %d\0" % content.size + content.head).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree_entry(name: str, content: bytes | Large) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
