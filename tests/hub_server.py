"""The part of the Hugging Face hub's HTTP interface that downloading and uploading a model use, on loopback, out of
directories and into them.

What it has to answer: https://huggingface.co/docs/hub/api
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants

_INFO = re.compile(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?")
_TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/?]+)")
_UPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/?]+)")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """A model: directories by commit, commits by branch or tag, and how the hub refuses it (status, error code)."""

    commits: dict[str, Path] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    refusal: tuple[int, str] | None = None

    def commit(self, directory: Path, branch: str = "main") -> str:
        """Add a commit that holds the files of a directory, and move a branch to it; returns the commit."""
        name = hashlib.sha1(f"{directory}{len(self.commits)}".encode()).hexdigest()
        self.commits[name], self.refs[branch] = directory, name
        return name


def files_of(directory: Path) -> dict[str, bytes]:
    """The content of every file in a directory and its folders, by name."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@dataclass
class Hub:
    """A hub that is being served.

    Attributes:
        address: its URL.
        repositories: by "OWNER/NAME".
        asked: every request so far, as "METHOD path".
        tokens: what came with them as authorization.
        storage: folder for what is uploaded.
    """

    address: str
    storage: Path
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)

    @property
    def files(self) -> set[str]:
        """The names of all files that were sent."""
        gets = [re.fullmatch(rf"GET {_FILE.pattern}", line) for line in self.asked]
        return {match[3] for match in gets if match is not None}


@contextmanager
def serving(storage: Path = Path("nowhere")) -> Iterator[Hub]:
    """Serve a hub from a thread until the block ends; what is uploaded goes into folders of ``storage``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_port}", storage)
    server.hub = hub  # type: ignore[attr-defined]
    thread = Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def use_hub(address: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Let this process use a hub, with a cache in ``home``; returns the variables that do it for another process."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        """Make a repository, say how files are to be sent, and take a commit of them."""
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path, sent = self.path.partition("?")[0], self.rfile.read(int(self.headers["Content-Length"]))
        hub.asked.append(f"POST {path}")
        if path == "/api/validate-yaml":
            return self._reply({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            made = json.loads(sent)
            name = f"{made['organization']}/{made['name']}"
            hub.repositories.setdefault(name, Repository())
            if not hub.repositories[name].commits:
                (hub.storage / name / "0").mkdir(parents=True)
                hub.repositories[name].commit(hub.storage / name / "0")
            return self._reply({"url": f"{hub.address}/{name}", "name": name})
        match = _UPLOAD.fullmatch(path)
        if match is None or match[1] not in hub.repositories:
            return self._refuse(404, "RepoNotFound")
        repository = hub.repositories[match[1]]
        if match[2] == "preupload":
            asked = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(sent)["files"]
            ]
            return self._reply({"files": asked})
        directory = hub.storage / match[1] / str(len(repository.commits))
        shutil.copytree(repository.commits[repository.refs[match[3]]], directory)
        for line in map(json.loads, sent.splitlines()):
            file = directory / line["value"].get("path", "")
            if line["key"] == "deletedFile":
                file.unlink()
            elif line["key"] == "file":
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(line["value"]["content"]))
            else:
                assert line["key"] == "header", line["key"]
        commit = repository.commit(directory, match[3])
        return self._reply({"commitUrl": f"{hub.address}/{match[1]}/commit/{commit}", "commitOid": commit})

    def _reply(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, True)

    def _answer(self, body: bool) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = self.path.partition("?")[0]
        if path.startswith("/api/agent-"):  # of no model: huggingface_hub's own statistics
            return self._refuse(404, "NotFound")
        hub.tokens.add(self.headers.get("Authorization"))
        hub.asked.append(f"{self.command} {path}")
        match = _TREE.fullmatch(path) or _FILE.fullmatch(path) or _INFO.fullmatch(path)
        repository = hub.repositories.get(match[1]) if match else None
        if match is None or repository is None:
            return self._refuse(404, "RepoNotFound")
        if repository.refusal is not None:
            return self._refuse(*repository.refusal)
        revision = match[2] or "main"
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return self._refuse(404, "RevisionNotFound")
        directory = repository.commits[commit]
        files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
        if match.re is _FILE:
            if match[3] not in files:
                return self._refuse(404, "EntryNotFound")
            data = files[match[3]].read_bytes()
            return self._send(200, data, {"X-Repo-Commit": commit, "ETag": f'"{_blob(data)}"'}, body)
        if match.re is _TREE:
            listed = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _blob(path.read_bytes())}
                for name, path in files.items()
            ]
            return self._send(200, json.dumps(listed).encode(), {"Content-Type": "application/json"}, body)
        info = {"id": match[1], "modelId": match[1], "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        return self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code}, self.command == "GET")

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _blob(data: bytes) -> str:
    """The hash that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
