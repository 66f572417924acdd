"""Sources of encoded images: folders, lists, tar shards and Hugging Face datasets.

A PATH is a folder (read recursively), an image, a text or CSV list, a .tar or .zip file, a pattern of them
(`shards-{000..031}.tar`, `*.tar`), `hf:NAME`, or an address of one of these (s3://, https:// ..., remote.py). A tree
with `train/` and one of `test/`, `val/`, `valid/` and the like at its top has these splits (splits.py); the class of an
image is the folder directly under the split, or under the top where there are no splits.

Order: sorted by path, component by component, as bytes; a folder and its tar have equal orders.
Memory: the names, joined into one bytes object, and 8 bytes per file.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from upstep_fast.config.base import DataConfig, reading_of
from upstep_fast.config.reading import Reading
from upstep_fast.data.formats.kinds import SUFFIXES, suffix_of
from upstep_fast.data.reading.regular import is_zarr
from upstep_fast.data.remote.address import is_address, shown
from upstep_fast.data.sources.explain import HINTS, no_images
from upstep_fast.data.sources.file_kinds import is_unnamed_dicom
from upstep_fast.data.sources.folders import Files
from upstep_fast.data.sources.huggingface import open_dataset
from upstep_fast.data.sources.image_folder import open_folder
from upstep_fast.data.sources.lists import LIST_SUFFIXES, read_list
from upstep_fast.data.sources.masks import named_like_masks
from upstep_fast.data.sources.names import Names
from upstep_fast.data.sources.part import (
    ALREADY_LISTED,
    Columns,
    Digest,
    Item,
    Listing,
    Part,
    Problem,
    printable,
    read_start,
)
from upstep_fast.data.sources.patterns import matches_of
from upstep_fast.data.sources.pieces import expand
from upstep_fast.data.sources.remote import open_remote
from upstep_fast.data.sources.selection import is_selection, open_selection
from upstep_fast.data.sources.splits import SPLITS, TREE, all_paths
from upstep_fast.data.sources.subset import Subset
from upstep_fast.data.sources.tar_shards import open_tars
from upstep_fast.data.sources.zip_files import open_zips
from upstep_fast.errors import DataError, NoTestPartError
from upstep_fast.runtime.progress import track

log = logging.getLogger(__name__)
_ANY, _PLAIN = Columns(), Reading()


@dataclass(frozen=True, eq=False)
class Source:
    """Fixed sequence of encoded images. Thread-safe, and small to send to another process."""

    parts: tuple[Part, ...]
    problems: tuple[Problem, ...] = ()  # (name, reason) of files and members that cannot be used
    summary: str = ""  # how many images were found, in which split, and what was left out
    reading: Reading = _PLAIN

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
        """Return the encoded image, or the file that holds it. Raises OSError if it cannot be read any more."""
        part, local = self._locate(index)
        return part.read(local)

    def file_path(self, index: int) -> str | None:
        """Return the path of an image that is a file of its own; None for another."""
        part, local = self._locate(index)
        return part.file_path(local)

    def item(self, index: int) -> Item:
        """Return the encoded image, or a file and which picture of it is meant. Raises OSError."""
        part, local = self._locate(index)
        return part.item(local)

    def digest(self, index: int) -> Digest:
        """Return what two images share only if they are equal. Raises OSError."""
        part, local = self._locate(index)
        return part.digest(local)

    def groups(self) -> np.ndarray | None:
        """Return the number of each image's file, [N] int64; None if each image is a file of its own."""
        of_parts = [part.groups() for part in self.parts]
        if all(groups is None for groups in of_parts):
            return None
        result, first = [], 0
        for part, groups in zip(self.parts, of_parts, strict=True):
            numbers = np.arange(len(part)) if groups is None else groups
            result.append(first + numbers)
            first += int(numbers.max(initial=-1)) + 1
        return np.concatenate(result)

    @cached_property
    def labels(self) -> list[str] | None:
        """Class of each image; None when not all of them have one."""
        of_parts = [part.labels() for part in self.parts]
        if any(labels is None for labels in of_parts):
            return None
        return [label for labels in of_parts if labels is not None for label in labels]

    def unlabeled(self) -> str:
        """Return why `labels` is None, as the end of a sentence that starts with the data's path."""
        return next((part.unlabeled() for part in self.parts if part.labels() is None), "has no images")

    def sizes(self) -> np.ndarray:
        """Return the size of each encoded image in bytes, [N] int64; -1 where it is not known."""
        return np.concatenate([part.sizes_in_bytes() for part in self.parts])

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


@track("listing images")
def open_source(
    paths: str | Path | Sequence[str | Path],
    split: str | None = None,
    columns: Columns = _ANY,
    reading: Reading = _PLAIN,
) -> Source:
    """Return the source of the images at one or more PATHs; a file that is met twice counts once.

    split: "train" or "test" selects that split of each tree that has splits; of a tree without them "train" selects all
    and "test" nothing; None selects all. columns: those that the user named. reading: which pictures of a file are
    images, and how their values become pixels. Raises DataError, naming the path and the cure, when there are no
    images; NoTestPartError, which is one, when no path has splits and "test" is asked for.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"split: got {split!r}, must be None, {' or '.join(map(repr, SPLITS))}")
    paths = (paths,) if isinstance(paths, (str, Path)) else tuple(paths)
    if not paths:
        raise DataError("data: no path given; give a folder, a .tar or .zip file, a list or hf:NAME")
    listing = Listing()
    matches = [match for path in paths for match in matches_of(str(path))]
    listing.several = len(matches) > 1
    parts = [part for match in matches for part in _parts(match, split, columns, reading, listing)]
    if split:
        listing.add_note(all_paths(matches))
    # the pictures of a selection are chosen already
    each = (part if isinstance(part, Subset) else expand(part, reading, listing) for part in parts)
    parts = [part for part in each if len(part)]
    count = sum(map(len, parts))
    listing.add_note(named_like_masks(parts))
    left_out = f"left out: {listing.left_out()}" if listing.others else ""
    words = [_counted(parts, count), *listing.notes, left_out]
    source = Source(tuple(parts), tuple(listing.problems), "; ".join(word for word in words if word), reading)
    if not count:
        kind = NoTestPartError if matches and len(listing.without_test) == len(matches) else DataError
        raise kind(no_images(", ".join(shown(str(path)) for path in paths), split, columns, listing))
    for name, reason in listing.problems[:5]:
        log.warning("data: left out %s: %s", name, reason)
    if len(listing.problems) > 5:
        log.warning("data: left out %d more; skipped.csv lists them", len(listing.problems) - 5)
    return source


def _counted(parts: Sequence[Part], count: int) -> str:
    """Return the number of images, and of the files of each suffix if they are several or hold several pictures."""
    files: Counter[str] = sum((part.suffixes() for part in parts), Counter())
    text = f"{count:,} image{'s' * (count != 1)}"
    if len(files) < 2 and files.total() == count:
        return text
    return f"{text} ({', '.join(f'{n:,} {suffix}' for suffix, n in files.most_common(8))})"


def columns_of(config: DataConfig) -> Columns:
    """Return the columns that a command's configuration names."""
    return Columns(config.image_column, config.label_column)


def open_configured(config: DataConfig, split: str | None = None) -> Source:
    """Return the source that a command's configuration names. Raises DataError."""
    return open_source(config.paths, split, columns_of(config), reading_of(config))


def _parts(
    match: str | list[str], split: str | None, columns: Columns, reading: Reading, listing: Listing
) -> list[Part]:
    if not isinstance(match, str) or not is_selection(match):
        return _open(match, split, columns, listing)
    return open_selection(match, split, listing, lambda paths: open_source(paths, split, columns, reading))


def _open(match: str | list[str], split: str | None, columns: Columns, listing: Listing) -> list[Part]:
    if is_address(match if isinstance(match, str) else match[0]):
        return open_remote(match, split, columns, listing)
    if isinstance(match, list) and match[0].lower().endswith(".zip"):
        return open_zips(match, split, listing)
    if isinstance(match, list):
        return open_tars(match, split, columns, listing)
    if match.startswith("hf:"):
        return open_dataset(match.removeprefix("hf:"), split, columns, listing)
    if os.path.isdir(match) and not is_zarr(match):
        return open_folder(match, split, columns, listing)
    suffix = suffix_of(match)
    if suffix in LIST_SUFFIXES:
        return read_list(Path(match), split, columns, listing)
    if suffix == ".zip":
        return open_zips([match], split, listing)
    if suffix in HINTS:
        raise DataError(f"data: {match} is no image, .tar or .zip file or list; {HINTS[suffix].format(path=match)}")
    if suffix not in SUFFIXES and not is_unnamed_dicom(os.fsencode(match), lambda: read_start(match)):
        return open_tars([match], split, columns, listing)
    if split == "test":
        listing.without_test.append(f"it must hold {TREE}; {match} is one image")
        return []
    if not listing.is_new_file(match):
        listing.problems.append((printable(os.fsencode(match)), ALREADY_LISTED))
        return []
    return [Files(os.path.dirname(match), Names.pack([os.fsencode(os.path.basename(match))]))]
