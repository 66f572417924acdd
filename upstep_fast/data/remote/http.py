"""Downloads from web servers: one request a file, only if it has changed since it was cached.

The sessions are those of fsspec's HTTP file system, whose own downloads neither ask whether a file changed nor limit
its size and time. A server is a stranger: what it declares is not relied on.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from upstep_fast.data.remote import cache
from upstep_fast.data.remote.address import shown
from upstep_fast.data.remote.cache import Version
from upstep_fast.data.remote.reasons import ANSWER, CONNECT, lasting, missing_package, passing, unreachable
from upstep_fast.errors import first_line

SLOW, PATIENCE = 1000, 30.0  # bytes a second that a file must have after this many seconds
CHUNK = 1 << 18  # bytes
_PASSING = {408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524}
_REASONS = {401: "not authorized (401)", 403: "forbidden (403)", 404: "no such file (404)", 410: "removed (410)"}

_answered: set[str] = set()  # servers that gave an answer in this process
_current: set[str] = set()  # addresses whose cached content this process has asked for


def is_first_contact() -> bool:
    """Return whether no server has given an answer in this process: an error may then be that of the network."""
    return not _answered


def has_answered(address: str) -> bool:
    """Return whether the server of an address has given an answer in this process."""
    return _host(address) in _answered


def fetch(address: str, limit: int | None, on_bytes: Callable[[int], None] | None = None) -> Path:
    """Return the path of a file's content in the cache, after asking once in a process whether it has changed.

    limit: bytes; None: as many as the disk has room for. on_bytes: called with the number of bytes that came. Raises
    OSError, as transient ones are, also NoRoomError and UnreachableError.
    """
    known = cache.latest(address)
    if known is not None and address in _current:
        return cache.content_path(address, known)
    with cache.download(address) as file:
        place = Path(file.name).parent
        received = 0

        def write(chunk: bytes) -> None:
            nonlocal received
            if received // (64 * CHUNK) != (received + len(chunk)) // (64 * CHUNK):
                cache.require_room(place)
            received += len(chunk)
            file.write(chunk)
            if on_bytes:
                on_bytes(len(chunk))

        version = _get(address, known, write, limit)
        path = cache.content_path(address, known) if version is known else cache.store(file, address, version)
    _current.add(address)
    return path


def read(address: str, limit: int) -> bytes:
    """Return a file's content without the cache. Raises OSError as `fetch`."""
    chunks: list[bytes] = []
    _get(address, None, chunks.append, limit)
    return b"".join(chunks)


def _get(address: str, known: Version | None, write: Callable[[bytes], Any], limit: int | None) -> Version:
    """Write a file's content and return its version; nothing is written if that is `known`. Raises OSError."""
    try:
        from fsspec.asyn import sync

        files = _file_system(os.getpid())
    except ImportError as error:
        raise missing_package(address) from error
    try:
        return sync(files.loop, _request, files, address, known, write, limit)
    except Exception as error:
        raise _translated(error, address) from error


@functools.cache
def _file_system(process: int) -> Any:
    """Return the file system whose session is used, with the user's settings for fsspec. Raises ImportError."""
    import aiohttp
    import fsspec

    limits = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=CONNECT, sock_read=ANSWER)
    own = {"timeout": limits, "trust_env": True, "auto_decompress": False}
    given = fsspec.config.conf.get("http", {}).get("client_kwargs", {})
    return fsspec.filesystem("http", client_kwargs={**own, **given})


async def _request(
    files: Any, address: str, known: Version | None, write: Callable[[bytes], Any], limit: int | None
) -> Version:
    headers = dict(files.kwargs.get("headers", {})) | {"Accept-Encoding": "identity"}
    if known is not None and known.tag:
        headers["If-None-Match"] = known.tag
    elif known is not None and known.modified:
        headers["If-Modified-Since"] = known.modified
    session = await files.set_session()
    async with session.get(files.encode_url(address), **(files.kwargs | {"headers": headers})) as answer:
        _answered.add(_host(address))
        if answer.status == 304 and known is not None:
            return known
        if answer.status != 200:
            reason = _REASONS.get(answer.status, f"the server answers {answer.status}")
            raise passing(reason) if answer.status in _PASSING else lasting(reason)
        _check_size(answer.content_length or 0, limit)
        size = await _write_content(answer, write, limit)
        return Version(answer.headers.get("ETag", ""), answer.headers.get("Last-Modified", ""), size)


async def _write_content(answer: Any, write: Callable[[bytes], Any], limit: int | None) -> int:
    """Write the content of an answer and return its bytes. Raises OSError above `limit`, or if it comes too slowly."""
    size, start = 0, time.monotonic()
    async for chunk in answer.content.iter_chunked(CHUNK):
        size += len(chunk)
        _check_size(size, limit)
        if (seconds := time.monotonic() - start) > PATIENCE and size < SLOW * seconds:
            raise passing(f"{size} bytes came in {seconds:.0f} s")
        write(chunk)
    return size


def _check_size(size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise lasting(f"more than {limit} bytes, the limit of an image")


def _translated(error: Exception, address: str) -> Exception:
    """Return one of aiohttp's errors as an OSError of one line; ours and those of the disk as they are."""
    import aiohttp

    host = _host(address)
    if isinstance(error, aiohttp.ClientSSLError):
        return lasting(f"{host}: its certificate is refused ({first_line(error)[:120]})")
    if isinstance(error, aiohttp.ClientConnectorError):
        return unreachable(f"no connection to {host} ({error.os_error.strerror or 'its name is not known'})")
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return unreachable(f"no connection to {host} within {CONNECT:.0f} s")
    if isinstance(error, (TimeoutError, aiohttp.ServerTimeoutError)):
        text = f"no answer of {host} within {ANSWER:.0f} s"
        return passing(text) if host in _answered else unreachable(text)
    if isinstance(error, aiohttp.ClientPayloadError):
        return passing("the connection ended before the file")
    if isinstance(error, (aiohttp.TooManyRedirects, aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError)):
        return lasting(f"{type(error).__name__}: the server redirects without end, or to no web address")
    if isinstance(error, (aiohttp.ClientError, ConnectionError)):
        return passing(f"{host}: {shown(first_line(error))[:120]}")
    if isinstance(error, ValueError):  # yarl, for an address that is none
        return lasting(f"not a web address ({first_line(error)[:80]})")
    return error


def _host(address: str) -> str:
    return urlsplit(address).netloc.rpartition("@")[2]
