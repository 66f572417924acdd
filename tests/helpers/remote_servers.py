"""Servers of remote files on 127.0.0.1: a web server whose answers a test chooses, and S3 by moto."""

import contextlib
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

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
    """Serve an empty S3 within the context; its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def upload(client, bucket: str, folder: Path, prefix: str = "") -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            client.put_object(Bucket=bucket, Key=prefix + path.relative_to(folder).as_posix(), Body=path.read_bytes())
