"""Reading of files that a stranger may have written: adapters, model folders, whitening files, reports of other runs.

Links are followed, since hub caches are made of links; what they lead to must be a regular file of bounded size. Pipes
and devices are refused without waiting for them. JSON and TOML may be neither too deep nor hold NaN, infinity or
integers beyond 64 bits.
"""

from __future__ import annotations

import json
import math
import os
import stat
import tomllib
from io import BufferedReader
from pathlib import Path
from typing import Any

from upstep_fast.errors import ConfigError, first_line

MAX_TEXT_BYTES = 64 << 20  # the index of the largest sharded checkpoint has about 1 MB
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: Path, field: str) -> BufferedReader:
    """Open a regular file for reading, without waiting for a pipe or device.

    field: the flag or file kind that the message starts with. Raises ConfigError if it is missing, not readable or not
    a regular file.
    """
    # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"{field}: cannot read {path}: {reason}") from error
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise ConfigError(f"{field}: {path} is {_KINDS.get(kind, 'special')}, not a regular file; give a regular file")
    return open(descriptor, "rb")


def require_regular(path: Path, field: str) -> Path:
    """Return `path` if it can be opened and is a regular file: for libraries that open a path themselves.

    Raises ConfigError as `open_regular` does.
    """
    open_regular(path, field).close()
    return path


def read_bytes(path: Path, field: str, limit: int = MAX_TEXT_BYTES) -> bytes:
    """Return the content of a regular file. Raises ConfigError as `open_regular`, or above `limit` bytes."""
    with open_regular(path, field) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:  # without reading them: they may be a terabyte of holes
            raise ConfigError(f"{field}: {path} has more than {limit} bytes; is this the right file?")
        try:
            data = file.read(size + 1)  # which takes memory for as many bytes at once
            if len(data) > size:  # it has grown, or is one of /proc, whose size is 0
                data += file.read(limit + 1 - len(data))
        except OSError as error:
            raise ConfigError(f"{field}: cannot read {path}: {error.strerror or first_line(error)}") from error
    if len(data) > limit:
        raise ConfigError(f"{field}: {path} has more than {limit} bytes; is this the right file?")
    return data


def read_text(path: Path, field: str, limit: int = MAX_TEXT_BYTES) -> str:
    """Return the text of a regular UTF-8 file. Raises ConfigError as `read_bytes`, or if it is not UTF-8."""
    try:
        return read_bytes(path, field, limit).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{field}: {path} is not UTF-8 text ({first_line(error)}); save it as UTF-8") from error


def read_json(path: Path, field: str, limit: int = MAX_TEXT_BYTES) -> Any:
    """Return the value in a JSON file. Raises ConfigError as `read_text`, or if it is not JSON with finite numbers."""
    text = read_text(path, field, limit)
    try:
        return _checked(json.loads(text, parse_constant=_not_finite, parse_float=_finite))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{field}: {path} is not valid JSON ({_reason(error)}); fetch or write it again") from error


def read_toml(path: Path, field: str, limit: int = MAX_TEXT_BYTES) -> dict[str, Any]:
    """Return the values in a TOML file. Raises ConfigError as `read_text`, or if it is not TOML with finite numbers."""
    text = read_text(path, field, limit)
    try:
        values: dict[str, Any] = _checked(tomllib.loads(text, parse_float=_finite))
        return values
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{field}: {path} is not valid TOML ({_reason(error)}); mend this line") from error


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _not_finite(text)


def _not_finite(text: str) -> float:
    raise ValueError(f"the number {text[:20]} is not finite")


def _checked(value: Any) -> Any:
    """Return `value`. Raises ValueError if an integer in it has more than 64 bits, which would fail far from here."""
    if isinstance(value, int) and value.bit_length() > 64:
        raise ValueError(f"an integer has {value.bit_length()} bits, more than 64")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _checked(item)
    return value


def _reason(error: BaseException) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
