"""Listings of and downloads from object stores by fsspec: S3 (s3fs), Google Cloud (gcsfs), the Hugging Face Hub.

Credentials and endpoints are those that these packages find: environment, profiles, fsspec's configuration files.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from upstep_fast.data.remote import cache
from upstep_fast.data.remote.address import OBJECTS, protocol_of, shown
from upstep_fast.data.remote.cache import Version
from upstep_fast.data.remote.reasons import (
    CONNECT,
    RefusedError,
    UnreachableError,
    chain,
    lasting,
    missing_package,
    passing,
    refused,
    unreachable,
    within,
)
from upstep_fast.errors import DataError, first_line

FIRST_ANSWER = 9.0  # seconds
BLOCK = 32 << 20  # bytes of a request
PAGE = 1000  # objects of a page of a listing, the most that S3 gives
_READ = 20.0  # seconds between two parts of an answer
_TAGS = ("ETag", "etag", "generation", "blob_id", "md5Hash")
_TIMES = ("LastModified", "last_modified", "mtime", "updated")
# errors of botocore, httpx, aiohttp and Python for a server that is not there
_UNREACHABLE = {"EndpointConnectionError", "ConnectTimeoutError", "ConnectTimeout", "ConnectError", "gaierror"}
_UNREACHABLE |= {"ClientConnectorError", "ClientConnectorDNSError", "ConnectionRefusedError"}
_CHANGED = "changed since it was listed; repeat the command"


def file_system(address: str) -> Any:
    """Return fsspec's file system of an address. Raises OSError, DataError if its package is not installed."""
    if protocol_of(address) not in OBJECTS:
        raise lasting("a list names no files in zip files; give the zip file itself")
    try:
        return _file_system(protocol_of(address), os.getpid())
    except ImportError as error:
        raise missing_package(address) from error
    except Exception as error:  # gcsfs looks for credentials here
        raise translated(error) from error


@functools.cache  # of file systems that are not async, the hub's, fsspec's own cache has one for each thread
def _file_system(protocol: str, process: int) -> Any:
    import fsspec

    if protocol not in ("s3", "s3a"):
        return fsspec.filesystem(protocol, use_listings_cache=False)
    limits = {"connect_timeout": CONNECT, "read_timeout": _READ, "retries": {"max_attempts": 1}}
    given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    files = fsspec.filesystem("s3", config_kwargs={**limits, **given}, use_listings_cache=False)
    files.retries = 2  # of five, as reading is retried here
    return files


def facts(address: str) -> Version | None:
    """Return the version of a file; None for a folder. Raises OSError, DataError if it cannot be asked for."""
    files = file_system(address)
    _require_hub(address)
    try:
        info = within(FIRST_ANSWER, lambda: files.info(address), shown(address))
    except Exception as error:
        raise translated(error) from error
    return None if info["type"] == "directory" else _version(info)


def _require_hub(address: str) -> None:
    """Raise UnreachableError if the address is of the hub, which does not answer; its library would try for long."""
    if protocol_of(address) == "hf":
        from upstep_fast import network

        if reason := network.unreachable():
            raise unreachable(f"no connection to the hub ({reason}); check the network, or HF_ENDPOINT")


def listed(address: str) -> Iterator[tuple[str, Version]]:
    """Yield names relative to a folder, and versions, of all files in it and below. Raises OSError."""
    files = file_system(address)
    top = files._strip_protocol(address).rstrip("/")
    try:
        found = _pages_of_s3(files, top) if hasattr(files, "call_s3") else files.find(top, detail=True).items()
        for path, info in found:
            if info.get("type", "file") == "file" and path.startswith(f"{top}/") and not path.endswith("/"):
                yield path[len(top) + 1 :], _version(info)
    except Exception as error:
        raise translated(error) from error


def _pages_of_s3(files: Any, top: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects in a folder, page by page: s3fs's own listing takes 2 kB of memory for each object."""
    bucket, prefix, _ = files.split_path(top)
    where = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else "", "MaxKeys": PAGE}
    page: dict[str, Any] = {"NextContinuationToken": None}
    while (token := page.get("NextContinuationToken", "")) != "":
        page = files.call_s3("list_objects_v2", **where, **({"ContinuationToken": token} if token else {}))
        for entry in page.get("Contents", ()):
            yield f"{bucket}/{entry['Key']}", {"ETag": entry["ETag"], "size": entry["Size"]}


def matches(pattern: str) -> list[str]:
    """Return the addresses that match a pattern of which only * is special, sorted. Raises OSError."""
    files, protocol = file_system(pattern), protocol_of(pattern)
    _require_hub(pattern)
    try:
        escaped = files._strip_protocol(pattern).replace("[", "[[]").replace("?", "[?]")
        found = within(FIRST_ANSWER, lambda: files.glob(escaped), shown(pattern))
    except Exception as error:
        raise translated(error) from error
    return sorted(f"{protocol}://{path}" for path in found)


def fetch(
    address: str, version: Version | None, limit: int | None, on_bytes: Callable[[int], None] | None = None
) -> Path:
    """Return the path of the content of a version in the cache. version: None: asked for. Raises OSError.

    on_bytes: called with the number of bytes that came.
    """
    version = _asked(address) if version is None else version
    if (path := cache.content_of(address, version)) is not None:
        return path
    with cache.download(address) as file:
        for block in _blocks(address, version, limit):
            cache.require_room(Path(file.name).parent)
            file.write(block)
            if on_bytes:
                on_bytes(len(block))
        return cache.store(file, address, version)


def read(address: str, version: Version | None, limit: int | None, start: int = 0, size: int | None = None) -> bytes:
    """Return `size` bytes of a version from `start` on, by default all, without the cache. Raises OSError."""
    version = _asked(address) if version is None else version
    return b"".join(_blocks(address, version, limit, start, size))


@functools.lru_cache(1 << 17)
def _asked(address: str) -> Version:
    """Return the version of a file that was not listed, asked for once in a process. Raises OSError."""
    if (version := facts(address)) is None:
        raise lasting("a folder, not a file")
    return version


def _blocks(
    address: str, version: Version, limit: int | None, start: int = 0, size: int | None = None
) -> Iterator[bytes]:
    if version.size < 0:
        raise lasting("the store does not say how large it is")
    if limit is not None and version.size > limit:
        raise lasting(f"{version.size} bytes, above the limit of {limit}")
    end = version.size if size is None else min(version.size, start + size)
    files = file_system(address)
    path = files._strip_protocol(address)
    for first in range(start, end, BLOCK):
        last = min(first + BLOCK, end)
        try:
            block = _block(files, path, first, last, version)
        except Exception as error:
            raise translated(error) from error
        if len(block) != last - first:
            raise passing(f"{len(block)} of {last - first} bytes from {first} on came")
        yield block


def _block(files: Any, path: str, first: int, last: int, version: Version) -> bytes:
    if not hasattr(files, "call_s3"):
        return files.cat_file(path, first, last)
    from fsspec.asyn import sync

    return sync(files.loop, _block_of_s3, files, path, first, last, version)


async def _block_of_s3(files: Any, path: str, first: int, last: int, version: Version) -> bytes:
    """Return a range of an object, if it still is the version that was listed: the store checks that (If-Match)."""
    bucket, key, _ = files.split_path(path)
    condition = {"IfMatch": version.tag} if version.tag else {}
    answer = await files._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={first}-{last - 1}", **condition)
    async with answer["Body"] as body:
        block: bytes = await body.read()
        return block


def _version(info: dict[str, Any]) -> Version:
    tag = next((str(info[name]) for name in _TAGS if info.get(name)), "")
    modified = "" if tag else next((str(info[name]) for name in _TIMES if info.get(name)), "")
    size = info.get("size")
    return Version(tag, modified, -1 if size is None else int(size))


def translated(error: Exception) -> Exception:
    """Return an error of fsspec or the libraries below it as an OSError of one line; ours as they are."""
    names = [type(each).__name__ for each in chain(error)]
    answers = [answer for each in chain(error) if isinstance(answer := getattr(each, "response", None), dict)]
    codes = {str(answer.get("Error", {}).get("Code", "")) for answer in answers}  # of botocore
    if isinstance(error, (DataError, cache.NoRoomError, RefusedError, UnreachableError, MemoryError)):
        return error
    text = f"{type(error).__name__}: {shown(first_line(error))[:160]}"
    if codes & {"PreconditionFailed", "412"}:
        return lasting(_CHANGED)
    if any("Credentials" in name for name in names):
        return refused("no credentials found; for a public S3 bucket set FSSPEC_S3_ANON=true")
    if isinstance(error, FileNotFoundError):
        missing = "no such bucket" if "NoSuchBucket" in codes else "no such object or folder"
        return lasting(missing)
    if isinstance(error, PermissionError) or codes & {"403", "AccessDenied", "SignatureDoesNotMatch", "ExpiredToken"}:
        return refused("forbidden; check the credentials and whether they may read it")
    if any("Offline" in name for name in names):
        return unreachable("the hub is switched off (HF_HUB_OFFLINE)")
    if not _UNREACHABLE.isdisjoint(names):
        return unreachable("no connection to the store")
    if isinstance(error, (OSError, TimeoutError)) or any("Timeout" in name or "Client" in name for name in names):
        return passing(text)
    return lasting(text)  # of a library, which raise many kinds
