"""Errors of remote reading as OSErrors of one line: those that may pass, and those that lie with the file."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from upstep_fast.data.remote.address import protocol_of
from upstep_fast.errors import DataError

CONNECT, ANSWER = 5.0, 8.0  # seconds for a connection, and for the first answer of a server
EXTRA = "pip install 'upstep_fast[remote]'"
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}

T = TypeVar("T")


class UnreachableError(OSError):
    """A server gives no answer. May pass, unless it never gave one."""


class RefusedError(OSError):
    """A store does not let these credentials read. Never held against an image, as credentials expire."""


def refused(reason: str) -> RefusedError:
    """Return the error of a store that does not let the credentials read."""
    return RefusedError(errno.EIO, reason)


def passing(reason: str) -> OSError:
    """Return an error of the network or the server, which is retried and never held against an image."""
    return OSError(errno.EIO, reason)


def unreachable(reason: str) -> UnreachableError:
    """Return the error of a server that gives no answer."""
    return UnreachableError(errno.EHOSTUNREACH, reason)


def lasting(reason: str) -> OSError:
    """Return an error of the file itself."""
    return OSError(errno.ENOENT, reason)


def missing_package(address: str) -> DataError:
    """Return the error for an address whose protocol needs a package that is not installed."""
    protocol = protocol_of(address)
    package = PACKAGES.get(protocol, "fsspec")
    cure = EXTRA if package != "gcsfs" else "pip install gcsfs"
    return DataError(f"data: {protocol}:// needs the package {package}; {cure}")


def within(seconds: float, function: Callable[[], T], where: str) -> T:
    """Return function(), or raise UnreachableError after `seconds`. Raises as it.

    A daemon thread waits, as looking up a name and some libraries' retries have no limit of their own.
    """
    result: list[T] = []
    error: list[BaseException] = []

    def call() -> None:
        try:
            result.append(function())
        except BaseException as raised:
            error.append(raised)

    thread = threading.Thread(target=call, name="upstep-remote", daemon=True)
    thread.start()
    thread.join(seconds)
    if error:
        raise error[0]
    if not result:
        raise unreachable(f"no answer of {where} within {seconds:.0f} s")
    return result[0]


def chain(error: BaseException) -> list[Any]:
    """Return an error and its causes, the latest first."""
    errors: list[Any] = []
    current: BaseException | None = error
    while current is not None and len(errors) < 8:
        errors.append(current)
        current = current.__cause__ or current.__context__
    return errors
