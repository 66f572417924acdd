"""Local cache of remote files, keyed by address and version, so that a file that changed is fetched again.

    FOLDER/ab/KEY.json              the version that is there: ETag, time of the last change, size
    FOLDER/ab/KEY-VERSION.jpg       its content, renamed into place when it is complete

KEY and VERSION are hashes. Older versions stay, since a run may be reading them when another process fetches a newer
one. FOLDER is $UPSTEP_FAST_CACHE, or upstep_fast/remote in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from upstep_fast.data.formats.kinds import suffix_of
from upstep_fast.data.remote.address import file_name_of
from upstep_fast.runtime import file_lock

VARIABLE = "UPSTEP_FAST_CACHE"
MIN_FREE = 1 << 30  # bytes of the disk that stay free


class NoRoomError(OSError):
    """The cache's disk has no room for a file."""


@dataclass(frozen=True, slots=True)
class Version:
    """Version of a remote file: what changes with its content."""

    tag: str = ""  # ETag, generation or hash; empty: the server gives none
    modified: str = ""  # time of the last change, as the server writes it
    size: int = -1  # bytes; -1: not known

    @property
    def text(self) -> str:
        """Return the version as one line, of which the name of its content is a hash."""
        return f"{self.tag} {self.modified} {self.size}"


def folder() -> Path:
    """Return the folder of the cache."""
    if given := os.environ.get(VARIABLE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "upstep_fast" / "remote"


def content_path(address: str, version: Version) -> Path:
    """Return where the content of a version lies, or would lie; its name ends as the address does."""
    name = f"{_key(address)}-{_hash(version.text)[:16]}{_suffix(address)}"
    return folder() / name[:2] / name


def content_of(address: str, version: Version) -> Path | None:
    """Return the path of the content of a version; None if it is not there or has another size."""
    path = content_path(address, version)
    try:
        return path if os.stat(path).st_size == version.size or version.size < 0 else None
    except OSError:
        return None


def latest(address: str) -> Version | None:
    """Return the version of an address that was stored last, if its content is there."""
    try:
        version = Version(**json.loads(_record(address).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return version if content_of(address, version) else None


@contextlib.contextmanager
def download(address: str) -> Iterator[IO[bytes]]:
    """Give a file for the content of an address, for `store` within the context; it is removed if it was not stored.

    Raises NoRoomError, OSError.
    """
    place = folder() / _key(address)[:2]
    with _no_room():
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        require_room(place)
        file = tempfile.NamedTemporaryFile(dir=place, prefix=".part-", delete=False)  # noqa: SIM115  closed below
    try:
        with file:
            yield file
    finally:
        with contextlib.suppress(OSError):
            os.unlink(file.name)


def store(file: IO[bytes], address: str, version: Version) -> Path:
    """Move a complete download into place. Raises NoRoomError, OSError."""
    path, record = content_path(address, version), _record(address)
    with _no_room():
        file.flush()
        os.replace(file.name, path)
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
        with open(fd, "w") as text:
            json.dump(asdict(version), text)
        os.replace(name, record)
    return path


@contextlib.contextmanager
def lock(address: str) -> Iterator[None]:
    """Hold the lock of a large file, so that processes of one machine fetch it once. Raises NoRoomError."""
    place = folder() / _key(address)[:2]
    with contextlib.ExitStack() as held:
        with _no_room():
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            held.enter_context(file_lock.locked(place / f"{_key(address)}.lock", in_use=None))
        yield


def require_room(place: Path) -> None:
    """Raise NoRoomError if less than MIN_FREE bytes of the disk are free."""
    if (free := shutil.disk_usage(place).free) < MIN_FREE:
        raise NoRoomError(
            errno.ENOSPC, f"{free >> 20} MB free in the cache {folder()}; make room, or set {VARIABLE} to another disk"
        )


@contextlib.contextmanager
def _no_room() -> Iterator[None]:
    """Raise what stops a folder from being written, other than that it is gone, as NoRoomError."""
    try:
        yield
    except NoRoomError:
        raise
    except OSError as error:
        reason = f"the cache {folder()} cannot be written: {error.strerror}; set {VARIABLE} to another folder"
        raise NoRoomError(errno.ENOSPC, reason) from error


def _record(address: str) -> Path:
    key = _key(address)
    return folder() / key[:2] / f"{key}.json"


def _key(address: str) -> str:
    return _hash(address)[:40]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _suffix(address: str) -> str:
    suffix = suffix_of(file_name_of(address))
    return suffix if len(suffix) <= 12 and suffix.isascii() and suffix.isprintable() and "/" not in suffix else ""
