"""The page's server, run in a thread: by the command until Ctrl-C, by a notebook until it is closed."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import webbrowser
from dataclasses import dataclass
from html import escape
from typing import Any

import uvicorn

from upstep_fast.config.explore import ExploreConfig
from upstep_fast.errors import ConfigError, RunFailedError
from upstep_fast.evaluation.feature_model import FeatureModel
from upstep_fast.explorer.gallery import Gallery, gallery_of_model, gallery_of_run
from upstep_fast.explorer.guard import new_token
from upstep_fast.explorer.server import make_app
from upstep_fast.runtime.terminal import print_line

HOST = "127.0.0.1"  # this machine only: the page shows the user's images
START_SECONDS = 20
HEIGHT = 760  # pixels in a notebook

forever = threading.Event()  # never set: a signal ends the command


@dataclass(frozen=True, eq=False)
class Explorer:
    """A running page: `url`, and `close()`. A notebook shows it as a frame."""

    url: str
    gallery: Gallery
    server: uvicorn.Server
    height: int = HEIGHT

    def close(self) -> None:
        """Stop the server and the computation of maps."""
        self.server.should_exit = True
        self.gallery.close()

    def __repr__(self) -> str:
        """Return the page's address."""
        return f"Explorer({self.url})"

    def _repr_html_(self) -> str:
        style = f"width: 100%; height: {self.height}px; border: 1px solid #8884; border-radius: 8px"
        return f'<iframe src="{escape(self.url)}" title="upstep-fast explore" style="{style}"></iframe>'


def listen(port: int) -> socket.socket:
    """Return a socket that listens at 127.0.0.1:port; 0: any free one. Raises ConfigError."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if os.name != "nt":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigError(f"port: cannot listen at {HOST}:{port}: {error.strerror}; give another port, or 0") from error
    return listener


def start(gallery: Gallery, listener: socket.socket, framed: bool = False, height: int = HEIGHT) -> Explorer:
    """Return the running page of a gallery. framed: other pages, as a notebook, may show it. Raises RunFailedError."""
    port, token = listener.getsockname()[1], new_token()
    app = make_app(gallery, token, port, framed)
    # h11: the same answers with and without uvicorn's extras; access_log: addresses hold the token
    options: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False, "http": "h11"}
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", ws="none", **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True, name="explore: server")
    thread.start()
    end = time.monotonic() + START_SECONDS
    while not server.started:
        if not thread.is_alive() or time.monotonic() > end:
            raise RunFailedError(f"explore: the server at {HOST}:{port} did not start; give another --port")
        time.sleep(0.02)
    return Explorer(f"http://{HOST}:{port}/{token}/", gallery, server, height)


def serve(config: ExploreConfig) -> None:
    """Serve the page of a run until Ctrl-C. Raises UpstepError before it serves."""
    listener = listen(config.port)  # before minutes of embedding
    try:
        page = start(gallery_of_run(config), listener)
    except BaseException:
        listener.close()
        raise
    try:
        print_line(f"explore: {page.url}  ({len(page.gallery):,} images; Ctrl-C ends it)")
        sys.stdout.flush()
        if config.browser and has_display():
            webbrowser.open(page.url)
        forever.wait()
    except KeyboardInterrupt:  # the way to end it
        return
    finally:
        page.close()


def has_display() -> bool:
    """Return whether a browser would be seen."""
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def show(config: ExploreConfig, model: FeatureModel | None, height: int) -> Explorer:
    """Return the running page of a run, or of the images of a model, that a notebook may show. Raises UpstepError."""
    listener = listen(config.port)
    try:
        gallery = gallery_of_run(config) if model is None else gallery_of_model(model, config.data, config)
        return start(gallery, listener, framed=True, height=height)
    except BaseException:
        listener.close()
        raise
