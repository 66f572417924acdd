"""Access control of the page's server: only the page itself, opened by its address, is answered.

address      http://127.0.0.1:PORT/TOKEN/ with 128 random bits; another path is answered 404
Host         127.0.0.1:PORT or localhost:PORT: a foreign name that resolves to 127.0.0.1 (DNS rebinding) is refused
other sites  Sec-Fetch-Site and Origin: what another site's page asks for is refused, but opening the page itself
answers      a Content-Security-Policy without inline scripts, eval and other hosts; no CORS headers
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_PATH = 300  # bytes
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)


def new_token() -> str:
    """Return a secret for an address."""
    return secrets.token_urlsafe(16)


class Guard:
    """ASGI middleware that refuses what does not come from the page at http://127.0.0.1:port/token/."""

    def __init__(self, app: ASGIApp, token: str, port: int, framed: bool = False):
        """Take the port that the server listens at. framed: other pages may show this one, as a notebook does."""
        self.app, self.token = app, token
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        self.policy = POLICY if framed else f"{POLICY}; frame-ancestors 'none'"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it in one word."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = self.policy
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"  # the address holds the token
                headers["Cross-Origin-Resource-Policy"] = "same-origin"
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        status = self._status(scope, Headers(scope=scope))
        reply = self.app if status is None else PlainTextResponse("refused", status)
        await reply(scope, receive, send_with_headers)

    def _status(self, scope: Scope, headers: Headers) -> int | None:
        """Return the status of a refusal; None for a request of the page."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0] not in self.hosts:
            return 421
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return 405
        path = scope["path"]
        first, _, rest = path.removeprefix("/").partition("/")
        if len(path) > MAX_PATH or not secrets.compare_digest(first.encode(errors="replace"), self.token.encode()):
            return 404
        is_opened = scope["method"] != "POST" and not rest  # the page itself: by a link, a terminal, a notebook
        if not is_opened and not self._is_from_page(headers):
            return 403
        return None

    def _is_from_page(self, headers: Headers) -> bool:
        """Return whether a request's headers name no other site; browsers set them, pages cannot."""
        origins: Iterable[str] = headers.getlist("origin")
        sites = headers.getlist("sec-fetch-site")
        return all(origin.removeprefix("http://") in self.hosts for origin in origins) and all(
            site in ("same-origin", "none") for site in sites
        )
