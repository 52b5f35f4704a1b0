# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the Hub on 127.0.0.1: repositories in memory, requests written down, faults on demand."""

from __future__ import annotations

import base64
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

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

TOKEN = "hf_" + "Aa1" * 11
ENDPOINTS = {
    "create": r"POST /api/repos/create",
    "validate": r"POST /api/validate-yaml",
    "branch": r"POST /api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)",
    "preupload": r"POST /api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)",
    "commit": r"POST /api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)",
    "info": r"GET /api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?",
    "tree": r"GET /api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)",
    "lfs_batch": r"POST /(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch",
    "lfs_upload": r"PUT /lfs/(?P<oid>\w+)",
    "resolve": r"(GET|HEAD) /(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)",
}


@dataclass
class FakeHub:
    """What the server holds.

    `faults` maps an endpoint to what becomes of its next requests, one after the other: a status, `"cut"` (the
    connection closes and nothing has happened) or `"cut after"` (it has happened, but the answer does not arrive).
    """

    url: str = ""
    branches: dict[str, dict[str, list[dict[str, bytes]]]] = field(default_factory=dict)  # files after each commit
    lfs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    visibility: dict[str, str] = field(default_factory=dict)
    faults: dict[str, list[int | str]] = field(default_factory=dict)

    def commits(self, repo: str, revision: str = "main") -> int:
        return len(self.branches.get(repo, {}).get(revision, [{}])) - 1  # the first state is the empty one

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return self.branches[repo][revision][-1]

    def sha(self, repo: str, revision: str) -> str:
        return hashlib.sha1(f"{repo} {revision} {self.commits(repo, revision)}".encode()).hexdigest()

    def branch_of(self, repo: str, revision: str) -> str:
        return next(name for name in self.branches[repo] if revision in (name, self.sha(repo, name)))

    def create(self, body: Any, **_: Any) -> tuple[int, Any]:
        repo = f"{body['organization'] or 'alice'}/{body['name']}"
        if repo in self.branches:
            return 409, {"url": f"{self.url}/{repo}", "error": "You already created this model repo"}
        self.branches[repo] = {"main": [{}]}
        self.visibility[repo] = body.get("visibility", "default")
        return 200, {"url": f"{self.url}/{repo}"}

    def validate(self, **_: Any) -> tuple[int, Any]:
        return 200, {"errors": [], "warnings": []}

    def branch(self, repo: str, revision: str, **_: Any) -> tuple[int, Any]:
        if revision in self.branches[repo]:
            return 409, {"error": "Reference already exists"}
        self.branches[repo][revision] = list(self.branches[repo]["main"])
        return 200, {}

    def info(self, repo: str, revision: str | None, **_: Any) -> tuple[int, Any]:
        siblings = [{"rfilename": name} for name in self.files(repo, revision or "main")]
        return 200, {"id": repo, "sha": self.sha(repo, revision or "main"), "siblings": siblings}

    def tree(self, repo: str, revision: str, **_: Any) -> tuple[int, Any]:
        files = self.files(repo, self.branch_of(repo, revision))
        return 200, [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
        ]

    def preupload(self, body: Any, repo: str, revision: str) -> tuple[int, Any]:
        files = []
        for path in (file["path"] for file in body["files"]):
            mode, there = "lfs" if path.endswith(".safetensors") else "regular", self.files(repo, revision).get(path)
            git = b"" if there is None else b"blob %d\0" % len(there) + there
            oid = hashlib.sha256(there or b"") if mode == "lfs" else hashlib.sha1(git)
            known = None if there is None else oid.hexdigest()
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        return 200, {"files": files}

    def lfs_batch(self, body: Any, **_: Any) -> tuple[int, Any]:
        objects = [dict(one, actions={"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}) for one in body["objects"]]
        return 200, {"transfer": "basic", "objects": objects}

    def lfs_upload(self, body: bytes, oid: str) -> tuple[int, Any]:
        self.lfs[oid] = body
        return 200, {}

    def commit(self, body: list[Any], repo: str, revision: str) -> tuple[int, Any]:
        header = body[0]["value"]
        if header.get("parentCommit") not in (None, self.sha(repo, revision)):
            return 412, {"error": "A commit has happened since. Please refresh and try again."}
        files = dict(self.files(repo, revision))
        for item in body[1:]:
            path, value = item["value"]["path"], item["value"]
            if item["key"] == "deletedFile":
                del files[path]
            else:
                files[path] = (
                    self.lfs[value["oid"]] if item["key"] == "lfsFile" else base64.b64decode(value["content"])
                )
        self.branches[repo][revision].append(files)
        self.messages.append(header["summary"])
        sha = self.sha(repo, revision)
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True}

    def resolve(self, repo: str, revision: str, file: str, **_: Any) -> tuple[int, Any]:
        files = self.files(repo, self.branch_of(repo, revision))
        return (200, files[file]) if file in files else (404, {"error": "Entry not found"})


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def handle_request(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        line = f"{self.command} {self.path.split('?')[0]}"
        name, match = next(((n, m) for n, p in ENDPOINTS.items() if (m := re.fullmatch(p, line))), ("", None))
        if match is None:
            return self.answer(404, {"error": "not in this stand-in"})
        self.hub.requests.append(name)
        self.hub.bodies.append(raw)
        fault = self.hub.faults[name].pop(0) if self.hub.faults.get(name) else None
        if fault == "cut":
            return
        if name not in ("lfs_upload", "validate") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if isinstance(fault, int):
            return self.answer(fault, {"error": f"fault {fault}"})
        body: Any = raw if name == "lfs_upload" else [json.loads(one) for one in raw.splitlines()]
        arguments = {"body": body if name in ("commit", "lfs_upload") else body[0] if body else None}
        status, content = getattr(self.hub, name)(**{**match.groupdict(), **arguments})
        if fault != "cut after":
            self.answer(status, content, self.hub.sha(match["repo"], "main") if name == "resolve" else None)

    def answer(self, status: int, content: Any, sha: str | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        if sha is not None:
            self.send_header("X-Repo-Commit", sha)
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("ETag", f'"{hashlib.sha1(raw).hexdigest()}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that runs until the context ends."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A fake Hub that huggingface_hub talks to, logged in; its retries do not wait."""
    with fake_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(
            "huggingface_hub.hf_api.api.endpoint", running.url
        )  # of its functions, such as file_exists
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # one of an earlier test knows another address
        monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
        close_session()
        yield running
        close_session()
