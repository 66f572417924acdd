"""A server in this process that answers as the Hugging Face Hub does to a push and to a fetch of small files."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"
TOKEN, OWNER = "hf_" + 30 * "x", "someone"


@dataclass
class Repository:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class FakeHub:
    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    status: int | None = None  # of every answer, to refuse


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve an empty hub within the context."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def hub_client(hub: FakeHub, cache, monkeypatch) -> Iterator[FakeHub]:
    """Point huggingface_hub in this process to `hub`, with an empty cache and a token."""
    from huggingface_hub import constants

    from upstep_fast import network

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "_checked", None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server.hub, urlsplit(self.path).path
        if path == "/":
            return self._send(200, b"")
        if path.startswith("/api/models/"):
            name = path.removeprefix("/api/models/").partition("/revision/")[0]
            if (repository := hub.repositories.get(name)) is None:
                return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            files = [{"rfilename": file} for file in repository.files]
            return self._json({"id": name, "private": repository.private, "sha": SHA, "siblings": files})
        name, _, rest = path.strip("/").partition("/resolve/")
        file = rest.partition("/")[2]
        repository = hub.repositories.get(name)
        if repository is None or file not in repository.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound" if repository else "RepoNotFound"})
        content = repository.files[file]
        etag = hashlib.sha1(content).hexdigest()
        return self._send(200, content, {"X-Repo-Commit": SHA, "ETag": f'"{etag}"'})

    def do_POST(self):
        hub, path = self.server.hub, urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub.status is not None or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "refused"}, hub.status or 401)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
            if name in hub.repositories:
                return self._json({"error": "exists", "url": f"{hub.url}/{name}"}, 409)
            hub.repositories[name] = Repository(
                "private" in (wanted.get("visibility"), wanted.get("private") and "private")
            )
            return self._json({"url": f"{hub.url}/{name}", "name": name})
        name, _, action = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                hub.repositories[name].files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return self._json({"commitUrl": f"{hub.url}/{name}/commit/{SHA}", "commitOid": SHA, "success": True})

    def _json(self, value, status=200):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status, content, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
