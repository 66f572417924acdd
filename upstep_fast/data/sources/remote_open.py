"""First contact with a remote store or server: errors of one line within seconds, and large files as a whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from upstep_fast.data.reading.retries import with_retries
from upstep_fast.data.remote import cache, objects
from upstep_fast.data.remote.address import HTTP, OBJECTS, protocol_of, shown
from upstep_fast.data.remote.cache import Version
from upstep_fast.data.remote.reasons import RefusedError, UnreachableError
from upstep_fast.data.sources.part import Listing
from upstep_fast.data.sources.remote_files import fetch
from upstep_fast.errors import DataError
from upstep_fast.runtime.progress import track

THREADS = 8  # that fetch archives

T = TypeVar("T")


def at_opening(address: str, function: Callable[[], T]) -> T:
    """Return function(), called again after errors that may pass. Raises DataError naming the address."""

    def call() -> T:
        try:
            return function()
        except (UnreachableError, RefusedError, cache.NoRoomError) as error:
            raise DataError(f"data: cannot read {shown(address)}: {error.strerror}") from error

    try:
        return with_retries(call, lambda: shown(address))
    except OSError as error:
        raise DataError(f"data: cannot read {shown(address)}: {error.strerror or error}") from error


def matches_of_address(pattern: str) -> list[str]:
    """Return the addresses that match a pattern, of which * alone is special, in order. Raises DataError."""
    if "*" not in pattern or protocol_of(pattern) not in (*OBJECTS, *HTTP):
        return [pattern]
    if protocol_of(pattern) in HTTP:
        raise DataError(f"data: {shown(pattern)}: web servers do not list files; write {{000..031}} in place of *")
    found = at_opening(pattern, lambda: objects.matches(pattern))
    if not found:
        raise DataError(f"data: nothing in the store matches {shown(pattern)}")
    return found


def fetch_all(addresses: Sequence[str], versions: Sequence[Version | None]) -> list[str]:
    """Return the paths in the cache of files that are fetched as a whole, by several threads. Raises DataError."""
    received = 0  # about, as threads may count at the same time; for the progress

    def count(num_bytes: int) -> None:
        nonlocal received
        received += num_bytes
        task.name = f"fetching ({received >> 20:,} MB)"

    def one(address: str, version: Version | None) -> str:
        def get() -> str:
            with cache.lock(address):
                return str(fetch(address, None, version, count))

        return at_opening(address, get)

    with ThreadPoolExecutor(THREADS) as pool, track("fetching", len(addresses), "files") as task:
        paths = []
        for path in pool.map(one, addresses, versions):
            paths.append(path)
            task.advance()
        return paths


@contextlib.contextmanager
def labeled(listing: Listing, labels: dict[str, str]) -> Iterator[None]:
    """Write addresses in place of the cache's paths into errors and into what `listing` learns within the context.

    labels: {path: address}.
    """

    def label(text: str) -> str:
        for path, address in labels.items():
            text = text.replace(path, shown(address))
        return text

    problems, notes, without = len(listing.problems), len(listing.notes), len(listing.without_test)
    try:
        yield
    except DataError as error:
        raise type(error)(label(str(error))) from error
    listing.problems[problems:] = [(label(name), label(reason)) for name, reason in listing.problems[problems:]]
    listing.notes[notes:] = map(label, listing.notes[notes:])
    listing.without_test[without:] = map(label, listing.without_test[without:])
