"""Columns of values by image that color the maps: folders, labels, clusters and those of a CSV."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from upstep_fast.data.sources.lists import columns_of_header, csv_cells, read_text
from upstep_fast.data.sources.part import Columns
from upstep_fast.errors import ConfigError, DataError, printable

MAX_CATEGORIES = 1000  # the most frequent ones; the others share one
OTHERS, NONE = "(others)", "(none)"
MAX_TEXT = 200  # characters of a category
FEW = 12  # as many as the palette has colors
MIN_INTEGERS = 13  # a column of integers with fewer distinct values is one of categories

_DIGITS = re.compile(r"([0-9]+)")


@dataclass(frozen=True, eq=False)
class Column:
    """One value for each of N images: a category, or a number."""

    name: str
    values: np.ndarray  # [N]: uint16 codes of categories, or fp32 with NaN where there is none
    categories: tuple[str, ...] = field(default=())  # most frequent first; () for numbers

    @property
    def is_number(self) -> bool:
        """Return whether the values are numbers."""
        return self.values.dtype == np.float32

    def text(self, index: int) -> str:
        """Return the value of an image as text; "" where there is none."""
        value = self.values[index]
        if self.categories:
            return self.categories[value]
        return "" if np.isnan(value) else f"{value:.7g}"


def of_categories(name: str, texts: Sequence[str]) -> Column:
    """Return a column of categories: a few in the order of their names, many with the most frequent first."""
    counts = Counter(texts)
    by_name = sorted(counts, key=lambda text: (text == NONE, _natural(text)))
    ordered = by_name if len(by_name) <= FEW else sorted(by_name, key=lambda text: (text == NONE, -counts[text]))
    shown = ordered if len(ordered) <= MAX_CATEGORIES else [*ordered[: MAX_CATEGORIES - 1], OTHERS]
    codes = {text: min(i, len(shown) - 1) for i, text in enumerate(ordered)}
    values = np.fromiter((codes[text] for text in texts), np.uint16, len(texts))
    return Column(name, values, tuple(printable(text, MAX_TEXT) for text in shown))


def _natural(text: str) -> list[tuple[int, str]]:
    """Return what sorts "2" before "10"."""
    return [(len(part.lstrip("0")) if i % 2 else 0, part) for i, part in enumerate(_DIGITS.split(text))]


def of_texts(name: str, texts: Sequence[str]) -> Column:
    """Return a column of numbers if all texts but empty ones are numbers, unless they are few different integers."""
    given = {text for text in texts if text}
    numbers = {text: value for text in given if (value := _number(text)) is not None}
    distinct = set(numbers.values())
    is_scale = len(distinct) >= MIN_INTEGERS or not all(value.is_integer() for value in distinct)
    if given and len(numbers) == len(given) and is_scale:
        values = np.fromiter((numbers.get(text, math.nan) for text in texts), np.float32, len(texts))
        return Column(name, values)
    return of_categories(name, [text or NONE for text in texts])


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < float(np.finfo(np.float32).max) else None


def of_folders(names: Sequence[str]) -> Column | None:
    """Return the folder of each name below what all have in common; None if they are in one folder."""
    folders = [name.rpartition("/")[0] for name in names]
    if len(distinct := set(folders)) < 2:
        return None
    parts = [folder.split("/") for folder in distinct]
    shared = next((n for n, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), min(map(len, parts)))
    return of_categories("folder", ["/".join(folder.split("/")[shared:]) or "." for folder in folders])


def of_clusters(x: np.ndarray, count: int) -> Column:
    """Return the k-means cluster of each row of x [N, D], by mini-batches, seed 0; the largest is cluster 1."""
    from sklearn.cluster import MiniBatchKMeans

    count = min(count, len(x))
    means = MiniBatchKMeans(count, random_state=0, n_init=3, batch_size=4096).fit(x)
    sizes = np.bincount(means.labels_, minlength=count)
    rank = np.argsort(np.argsort(-sizes, kind="stable"))
    names = tuple(f"cluster {i + 1}" for i in range(count))
    return Column("cluster", rank[means.labels_].astype(np.uint16), names)


def require_table(path: Path) -> None:
    """Raise ConfigError if the CSV of --columns is no regular file."""
    if not path.is_file():
        raise ConfigError(f"columns: {path} is not a regular file; give a CSV with a column of paths")


def read_columns(path: Path, names: Sequence[str]) -> list[Column]:
    """Return the columns of a CSV for the images of these names. Raises DataError, ConfigError.

    The column of paths is found as in lists of images. A path names an image if it is its name, or if it is the end of
    its name, folder by folder, and of no other image's.
    """
    require_table(path)
    header, cells = csv_cells(read_text(path).decode("utf-8", "replace"), path)
    at = columns_of_header(header, path, Columns()).get("path", 0)
    found = {row[at].strip(): row for _, row in cells if len(row) == len(header)}
    rows = _rows_of(names, found)
    matched = sum(row is not None for row in rows)
    if not matched:
        example = printable(next(iter(found), ""), MAX_TEXT)
        raise DataError(f"columns: none of the {len(found)} paths in {path} names an image, e.g. {example!r}")
    empty = [""] * len(header)
    return [
        of_texts(name or f"column {i + 1}", [(row or empty)[i].strip() for row in rows])
        for i, name in enumerate(header)
        if i != at
    ]


def _rows_of(names: Sequence[str], found: dict[str, list[str]]) -> list[list[str] | None]:
    """Return the row of each name: by the whole name, else by its longest end that belongs to this name only."""
    lengths = {path.count("/") for path in found}
    ends = Counter(end for name in names for end in _ends(name, lengths) if end in found)
    result = []
    for name in names:
        keys = (end for end in _ends(name, lengths) if end in found and ends[end] == 1)
        result.append(found.get(name) or next((found[key] for key in keys), None))
    return result


def _ends(name: str, lengths: set[int]) -> list[str]:
    """Return the ends of a path with these numbers of slashes, the longest first."""
    parts = name.split("/")
    return ["/".join(parts[-n - 1 :]) for n in sorted(lengths, reverse=True) if n < len(parts)]
