"""Patterns of paths: {a,b}, {000..031}, * and ?."""

from __future__ import annotations

import glob
import itertools
import math
import os
import re
from collections.abc import Sequence

from upstep_fast.data.remote.address import PROTOCOLS, is_address, shown
from upstep_fast.data.sources.remote_open import matches_of_address
from upstep_fast.errors import DataError

MAX_NAMES = 100_000  # of a pattern


def matches_of(path: str) -> list[str | list[str]]:
    """Return what a PATH names: tars or zips of one pattern together, as one tree, everything else one by one."""
    if (path.startswith("hf:") and not is_address(path)) or os.path.exists(path):
        return [path]
    if ("://" in path and not is_address(path)) or path.startswith("pipe:"):
        kinds = ", ".join(f"{protocol}://" for protocol in PROTOCOLS)
        raise DataError(f"data: {shown(path)} is an address of a kind that is not read; read are {kinds}")
    found = _expand(path)
    if not found:
        raise DataError(f"data: no file or folder at {shown(path)}{_lost_slash(path)}")
    together = any(all(match.lower().endswith(suffix) for match in found) for suffix in (".tar", ".zip"))
    return [found] if together else list(found)


def _expand(pattern: str) -> list[str]:
    """Expand {a,b} and {000..031}, then * ? [ ]; the order is sorted within each alternative. Raises DataError."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)  # text, brace, text, brace, ..., text
    choices: list[Sequence[str] | range] = [
        (piece,) if at % 2 == 0 else span if (span := _range(piece)) is not None else piece.split(",")
        for at, piece in enumerate(pieces)
    ]
    count = math.prod(map(len, choices))
    if count > MAX_NAMES:
        raise DataError(f"data: {pattern} stands for {count:,} names, more than {MAX_NAMES:,}; give a narrower pattern")
    found = []
    for words in itertools.product(*map(_words, choices, pieces)):
        path = "".join(words)
        if is_address(path):
            found += matches_of_address(path)
        elif glob.has_magic(path):
            found += sorted(glob.glob(path))
        elif os.path.exists(path):
            found.append(path)
        else:
            raise DataError(f"data: no file or folder at {path}{_lost_slash(path)}")
    return found


def _lost_slash(path: str) -> str:
    is_lost = path.partition(":")[0] in PROTOCOLS and path.partition(":")[2][:1] == "/"
    return "; an address is given as text, as a Path has one slash of :// left" if is_lost else ""


def _range(brace: str) -> range | None:
    """Return the numbers of 000..031; None for something else."""
    span = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", brace)
    return range(int(span[1]), int(span[2]) + 1) if span else None


def _words(choices: Sequence[str] | range, piece: str) -> Sequence[str]:
    width = len(piece.split("..")[0])
    return [str(n).zfill(width) for n in choices] if isinstance(choices, range) else choices
