"""Servers of remote files on 127.0.0.1: a web server whose answers a test chooses, and S3 by moto."""

import contextlib
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import ClassVar
from urllib.parse import unquote, urlsplit

from fsspec import AbstractFileSystem

from upstep_fast.data.remote import objects

KEYS = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass
class WebServer:
    """url: without a slash at its end. statuses: of the next answers for a path. cut, slow, without_tags: paths."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    statuses: dict[str, list[int]] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)  # answered with half of their bytes
    endless: set[str] = field(default_factory=set)  # answered without a length, again and again
    silent: set[str] = field(default_factory=set)  # accepted and not answered
    without_tags: bool = False
    requests: Counter[str] = field(default_factory=Counter)  # "200 /a.png"

    def add_folder(self, folder: Path, prefix: str = "/") -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.files[prefix + path.relative_to(folder).as_posix()] = path.read_bytes()


@contextlib.contextmanager
def web_server() -> Iterator[WebServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.web = web = WebServer(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        web, path = self.server.web, unquote(urlsplit(self.path).path)
        if path in web.silent:
            time.sleep(2)
            return
        statuses = web.statuses.get(path, [])
        status = statuses.pop(0) if statuses else 200 if path in web.files else 404
        data = web.files.get(path, b"")
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        if status == 200 and not web.without_tags and self.headers.get("If-None-Match") == tag:
            status = 304
        web.requests[f"{status} {path}"] += 1
        self.send_response(status)
        if not web.without_tags:
            self.send_header("ETag", tag)
        if path in web.endless:
            self.send_header("Connection", "close")
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(1 << 16))
        body = data if status == 200 else b""
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if path in web.cut else body)
        if path in web.cut:
            self.close_connection = True


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Serve an empty S3 within the context; its address. No file system of an earlier server is left."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    objects._file_system.cache_clear()
    S3FileSystem.clear_instance_cache()  # fsspec's own, which knows the arguments and not the environment
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()
        objects._file_system.cache_clear()


def upload(client, bucket: str, folder: Path, prefix: str = "") -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            client.put_object(Bucket=bucket, Key=prefix + path.relative_to(folder).as_posix(), Body=path.read_bytes())


class Hub(BaseHTTPRequestHandler):
    """The answers of the Hugging Face Hub that HfFileSystem needs to read the data set of `server.files`."""

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        path, files = unquote(urlsplit(self.path).path), self.server.files
        if "/resolve/" in path:
            data = files.get(path.split("/resolve/", 1)[1].partition("/")[2])
            if data is None:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            span = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")
            part = data[int(span[0]) : int(span[1]) + 1 if span[1] else None]
            return self.answer(206 if "Range" in self.headers else 200, part, {"ETag": self.entry(path, data)["oid"]})
        if "/tree/" in path:
            top = path.split("/tree/", 1)[1].partition("/")[2]
            start, everything = f"{top}/" if top else "", "recursive=true" in self.path.lower()
            inside = {name: data for name, data in files.items() if name.startswith(start)}
            if top and not inside:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            parents = {parent.as_posix() for name in inside for parent in PurePosixPath(name).parents} - {".", top}
            folders = [{"type": "directory", "path": name, "oid": "1" * 40} for name in sorted(parents)]
            entries = [self.entry(name, data) for name, data in inside.items()] + folders
            return self.answer_json([e for e in entries if everything or "/" not in e["path"][len(start) :]])
        if path.startswith("/api/datasets/me/set"):
            return self.answer_json({"id": "me/set", "sha": "0" * 40, "siblings": []})
        return self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def entry(self, name: str, data: bytes) -> dict:
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def answer_json(self, value) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.server.requests.append(f"{self.command} {status} {self.path}")
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def hub_server(files: dict[str, bytes]) -> Iterator[ThreadingHTTPServer]:
    """Serve a hub with one data set, me/set, within the context."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.requests = files, []
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Store(AbstractFileSystem):
    """A store of fsspec as gcsfs is: generations, and ranges of files. files: {bucket/key: content}."""

    protocol = "gs"
    cachable = False  # codespell:ignore cachable
    files: ClassVar[dict[str, bytes]] = {}
    requests: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("gs://").rstrip("/")

    def ls(self, path: str, detail: bool = True, **kwargs) -> list:
        path = self._strip_protocol(path)
        if path in self.files:
            return [self._entry(path)]
        rest = {name[len(path) + 1 :] for name in self.files if name.startswith(f"{path}/")}
        if not rest:
            raise FileNotFoundError(path)
        found = [self._entry(f"{path}/{name}") for name in sorted(rest) if "/" not in name]
        folders = {name.split("/")[0] for name in rest if "/" in name}
        return found + [{"name": f"{path}/{name}", "size": 0, "type": "directory"} for name in sorted(folders)]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs) -> bytes:
        self.requests.append(f"{path} {start}-{end}")
        return self.files[self._strip_protocol(path)][start:end]

    def _entry(self, path: str) -> dict:
        data = self.files[path]
        return {"name": path, "size": len(data), "type": "file", "generation": hashlib.md5(data).hexdigest()}
