"""Sources of encoded images: folders, lists, tar shards and Hugging Face datasets.

A PATH is a folder (read recursively), an image, a text or CSV list, a .tar file, a pattern of them
(`shards-{000..031}.tar`, `*.tar`), or `hf:NAME`. A tree with both `train/` and `test/` at its top has these two splits;
the class of an image is the folder directly under the split, or under the top where there are no splits.

Order: sorted by path, component by component, as bytes; a folder and its tar have equal orders.
Memory: the names, joined into one bytes object, and 8 bytes per file.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from upstep_fast.data.decode.image import SUFFIXES
from upstep_fast.data.sources.folders import Files, open_folder
from upstep_fast.data.sources.huggingface import open_dataset
from upstep_fast.data.sources.lists import read_list
from upstep_fast.data.sources.part import SPLITS, Names, Part, Problem
from upstep_fast.data.sources.tar_shards import open_tars
from upstep_fast.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Source:
    """Fixed sequence of encoded images. Thread-safe, and small to send to another process."""

    parts: tuple[Part, ...]
    problems: tuple[Problem, ...] = ()  # (name, reason) of files and members that cannot be used

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1] if self.parts else 0

    def name(self, index: int) -> str:
        """Return an image's path, or tar file and member: a label, printable whatever the bytes of the name are."""
        part, local = self._locate(index)
        return part.name(local)

    def read(self, index: int) -> bytes:
        """Return the encoded image. Raises OSError if it cannot be read any more."""
        part, local = self._locate(index)
        return part.read(local)

    @cached_property
    def labels(self) -> list[str] | None:
        """Class of each image; None when not all of them lie in class folders."""
        of_parts = [part.labels() for part in self.parts]
        if any(labels is None for labels in of_parts):
            return None
        return [label for labels in of_parts if labels is not None for label in labels]

    def fingerprint(self) -> str:
        """Return SHA-256 over names and sizes, in order; it does not depend on where the data lies."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(f"{len(part)};".encode())
            for piece in part.identity():
                digest.update(piece)
        return digest.hexdigest()

    def _locate(self, index: int) -> tuple[Part, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"source: index {index} of {len(self)} images")
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[which], index - (self._ends[which - 1] if which else 0)


def open_source(paths: str | Path | Sequence[str | Path], split: str | None = None) -> Source:
    """Return the source of the images at one or more PATHs.

    split: "train" or "test" selects that part of each tree that has both; of a tree without them "train" selects all
    and "test" nothing; None selects all. Raises DataError, naming the path and the cure, when there are no images.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"split: got {split!r}, must be None, {' or '.join(map(repr, SPLITS))}")
    paths = (paths,) if isinstance(paths, (str, Path)) else tuple(paths)
    if not paths:
        raise DataError("data: no path given; give a folder, a .tar file, a list or hf:NAME")
    parts: list[Part] = []
    problems: list[Problem] = []
    for path in paths:
        parts += _open(str(path), split, problems)
    source = Source(tuple(parts), tuple(problems))
    if len(source) == 0:
        where = ", ".join(map(str, paths))
        if split == "test":
            raise DataError(f"data: no test images in {where}; it must hold train/CLASS/... and test/CLASS/...")
        first = f"; the first of {len(problems)} problems: {problems[0][0]}: {problems[0][1]}" if problems else ""
        raise DataError(f"data: no images in {where}; looked for files ending in {' '.join(SUFFIXES)}{first}")
    for name, reason in problems[:5]:
        log.warning("data: left out %s: %s", name, reason)
    if len(problems) > 5:
        log.warning("data: left out %d more; skipped.csv lists them", len(problems) - 5)
    return source


def _open(path: str, split: str | None, problems: list[Problem]) -> list[Part]:
    if path.startswith("hf:"):
        return open_dataset(path.removeprefix("hf:"), split)
    if "://" in path or path.startswith("pipe:"):
        raise DataError(f"data: {path} is an address, only local files are read; download it first")
    if os.path.isdir(path):
        return open_folder(path, split, problems)
    matches = [path] if os.path.exists(path) else _expand(path)
    if not matches:
        raise DataError(f"data: no file or folder at {path}")
    if all(match.lower().endswith(".tar") for match in matches):
        return open_tars(matches, split, problems)
    return [part for match in matches for part in _single(match, split, problems)]


def _single(path: str, split: str | None, problems: list[Problem]) -> list[Part]:
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        return open_folder(path, split, problems)
    if suffix in (".txt", ".lst", ".csv", ".tsv"):
        return [read_list(Path(path))] if split != "test" else []
    if suffix in SUFFIXES:
        return (
            [Files(os.path.dirname(path), Names.pack([os.fsencode(os.path.basename(path))]))] if split != "test" else []
        )
    return open_tars([path], split, problems)


def _expand(pattern: str) -> list[str]:
    """Expand {a,b} and {000..031}, then * ? [ ]; the order is sorted within each alternative."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if brace:
        span = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
        if span:
            words = [str(n).zfill(len(span[1])) for n in range(int(span[1]), int(span[2]) + 1)]
        else:
            words = brace[1].split(",")
        return [p for word in words for p in _expand(pattern[: brace.start()] + word + pattern[brace.end() :])]
    if glob.has_magic(pattern):
        return sorted(glob.glob(pattern))
    if not os.path.exists(pattern):
        raise DataError(f"data: no file or folder at {pattern}")
    return [pattern]
