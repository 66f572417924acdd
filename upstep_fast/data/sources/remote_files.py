"""Images in files on other machines: those of a folder of an object store, and of lists that hold addresses.

Names are the addresses, without what is secret in them. A file is fetched as a whole when it is read first, and read
from the cache from then on (remote/cache.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from upstep_fast.data.formats.kinds import START
from upstep_fast.data.reading.retries import with_retries
from upstep_fast.data.remote import http, objects
from upstep_fast.data.remote.address import HTTP, is_address, joined, protocol_of, shown
from upstep_fast.data.remote.cache import NoRoomError, Version
from upstep_fast.data.remote.reasons import UnreachableError, lasting
from upstep_fast.data.sources.folders import Files
from upstep_fast.data.sources.names import Names
from upstep_fast.data.sources.part import MAX_BYTES, printable, read_image_file
from upstep_fast.errors import DataError

log = logging.getLogger(__name__)
_said: set[str] = set()  # reasons why nothing is cached


@dataclass(frozen=True, eq=False)
class RemoteFiles(Files):
    """Images in remote files, with names relative to the address `root`, or addresses; other names are local paths."""

    sizes: np.ndarray | None = None  # [N] int64, bytes, as listed; -1 where not known
    tags: Names | None = None  # versions as listed: "tag\0modified"

    def name(self, index: int) -> str:
        """Return the address, printable and without secrets."""
        return printable(os.fsencode(shown(self._path(index))))

    def read(self, index: int) -> bytes:
        """Return the encoded image. Raises OSError, DataError if no server at all can be reached."""
        address = self._path(index)
        if not is_address(address):
            return super().read(index)
        try:
            return read_image_file(str(self._fetch(index)))
        except NoRoomError as error:
            _say_once(error)
        if protocol_of(address) in HTTP:
            return http.read(address, MAX_BYTES)
        return objects.read(address, self._version(index), MAX_BYTES)

    def file_path(self, index: int) -> str | None:
        """Return the path of the file in the cache. Raises OSError as `read`."""
        return str(self._fetch(index)) if is_address(self._path(index)) else super().file_path(index)

    def start(self, index: int) -> bytes:
        """Return the file's first bytes. Raises OSError, DataError after errors that may pass."""
        address = self._path(index)
        if not is_address(address):
            return super().start(index)
        return with_retries(lambda: self._start(index), lambda: self.name(index))

    def _start(self, index: int) -> bytes:
        address = self._path(index)
        if protocol_of(address) in HTTP:
            return self.read(index)[:START]
        return objects.read(address, self._version(index), None, 0, START)

    def sizes_in_bytes(self) -> np.ndarray:
        """Return the sizes as they were listed, [N] int64; -1 where one is not known."""
        if self.sizes is not None:
            return self.sizes
        is_remote = [is_address(self._path(i)) for i in range(len(self))]
        return np.where(is_remote, -1, super().sizes_in_bytes())

    def _path(self, index: int) -> str:
        name = os.fsdecode(self.names[index])
        return joined(self.root, name) if is_address(self.root) or is_address(name) else os.path.join(self.root, name)

    def _version(self, index: int) -> Version | None:
        if self.sizes is None or self.tags is None:
            return None
        tag, modified = os.fsdecode(self.tags[index]).split("\0")
        return Version(tag, modified, int(self.sizes[index]))

    def _fetch(self, index: int) -> Path:
        return fetch(self._path(index), MAX_BYTES, self._version(index))


def fetch(
    address: str,
    limit: int | None,
    version: Version | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Path:
    """Return the path of a remote file's content in the cache. Raises OSError, as transient ones are.

    limit: bytes; None: as many as the disk has room for. on_bytes: called with the number of bytes that came.

    A server that cannot be reached is an error of the file only if another one gave an answer before; else the network
    is the reason, and DataError is raised.
    """
    if protocol_of(address) not in HTTP:
        return objects.fetch(address, version, limit, on_bytes)
    try:
        return http.fetch(address, limit, on_bytes)
    except UnreachableError as error:
        if http.is_first_contact():
            cure = "check the address, the network or the proxy"
            raise DataError(f"data: cannot read {shown(address)}: {error.strerror}; {cure}") from error
        raise error if http.has_answered(address) else lasting(str(error.strerror)) from error


def _say_once(error: OSError) -> None:
    if (reason := str(error.strerror)) not in _said:
        _said.add(reason)
        log.warning("data: remote files are read without a cache: %s", reason)
