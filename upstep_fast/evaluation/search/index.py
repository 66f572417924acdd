"""An index of features: searched exactly or by lists, extended, and kept in a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from upstep_fast.errors import ConfigError, DataError
from upstep_fast.evaluation.feature_files.table import FeatureTable
from upstep_fast.evaluation.search import approximate, storage
from upstep_fast.evaluation.search.approximate import InvertedLists
from upstep_fast.evaluation.search.exact import top_k, unit_rows


class Match(NamedTuple):
    """An image that a search returns."""

    similarity: float  # cosine
    name: str


@dataclass(frozen=True, eq=False, repr=False)
class FeatureIndex:
    """Features of images to search in. Made by `build_index`, `FeatureModel.index` and `FeatureIndex.open`."""

    names: tuple[str, ...]
    x: np.ndarray  # [N, D] fp32, unit length
    facts: dict[str, Any]
    lists: InvertedLists | None = None  # None: every search is exact
    exact: bool = False  # never make lists
    embed: Callable[[Any], FeatureTable] | None = None  # of the model, for images

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        """Return the number of images, D, and how it is searched."""
        how = "exact" if self.is_exact else f"approximate, recall {self.recall:.3f}"
        return f"FeatureIndex({len(self):,} images, D = {self.x.shape[1]}, {how})"

    @property
    def is_exact(self) -> bool:
        """True if every image is compared with a query: of few images, on request, and where lists do not help."""
        return self.lists is None or self.lists.is_exact

    @property
    def recall(self) -> float:
        """Part of the 20 nearest images that a search returns: measured on these images; 1.0 if it is exact."""
        return 1.0 if self.lists is None else self.lists.recall

    def search(self, queries: np.ndarray, k: int = 20) -> tuple[np.ndarray, np.ndarray]:
        """Return cosines [Q, min(k, N)] in float64, largest first, and the rows of the k nearest images, int64.

        queries: features [Q, D] of any length. Of equal images the one with the lower row comes first. Raises DataError
        for features of another width, that are not finite, or are 0.
        """
        if k < 1:
            raise ConfigError(f"k: got {k}, must be at least 1")
        unit = unit_rows(queries, "query")
        if unit.shape[1] != self.x.shape[1]:
            raise DataError(
                f"query: features of width {unit.shape[1]}, those of the index have {self.x.shape[1]}; use the model "
                "that the index was made with"
            )
        if self.lists is None or self.is_exact:
            return top_k(self.x, unit, k)
        return approximate.search(self._faiss, self.lists.nprobe, self.x, unit, k)

    def search_images(self, images: Any, k: int = 20) -> list[list[Match]]:
        """Return the k nearest images of each image: [Match(similarity, name), ...], nearest first.

        images: a path, PIL image or array [H, W, C], or a sequence of them. Raises DataError, and ConfigError for an
        index that was opened without a model.
        """
        if self.embed is None:
            raise ConfigError("index: it has no model to embed images with; use FeatureIndex.open(folder, model)")
        is_single = isinstance(images, (str, Path)) or not isinstance(images, (Sequence, np.ndarray))
        is_single |= isinstance(images, np.ndarray) and images.ndim in (2, 3)
        scores, rows = self.search(self.embed([images] if is_single else images).x, k)
        return [self.matches(*found) for found in zip(scores, rows, strict=True)]

    def matches(self, scores: np.ndarray, rows: np.ndarray) -> list[Match]:
        """Return one query's scores and rows [k] as matches."""
        return [Match(float(score), self.names[row]) for score, row in zip(scores, rows, strict=True)]

    def add(self, features: Any) -> FeatureIndex:
        """Return an index with more images behind the present ones, which are not computed again.

        features: a `FeatureTable`, or images as `FeatureModel.embed` takes them. Raises DataError for features of
        another model, form or width, and for a name that is there already.
        """
        table = features if isinstance(features, FeatureTable) else self._embedded(features)
        storage.require_same(self.facts, table.facts)
        if table.x.shape[1:] != self.x.shape[1:]:
            raise DataError(f"index: features of width {table.x.shape[1]}, the index has {self.x.shape[1]}")
        names = self.names + tuple(table.names)
        if len(set(names)) < len(names):
            there = set(self.names)
            again = next((name for name in table.names if name in there), "a new image")
            raise DataError(f"index: {again} is in it already; add each image once")
        x = np.concatenate([self.x, unit_rows(table.x)])
        return replace(self, names=names, x=x, lists=_lists(names, x, self.exact, self.lists))

    def save(self, folder: str | Path) -> Path:
        """Write the index to a folder and return it; one that is there is extended by the images that it lacks.

        Raises DataError if the folder holds another index, ConfigError if it holds other files or is being written.
        """
        folder = Path(folder)
        storage.save(storage.Content(FeatureTable(self.names, self.x, self.facts), self.lists), folder)
        return folder

    @staticmethod
    def open(folder: str | Path, model: Any = None) -> FeatureIndex:
        """Return the index in a folder. model: the `FeatureModel` that it was made with, to search by images.

        Raises ConfigError if there is none, DataError if it is damaged or of another model.
        """
        content = storage.read(Path(folder))
        table = content.table
        is_exact = content.lists is None and len(table) >= approximate.EXACT_BELOW
        index = FeatureIndex(table.names, table.x, table.facts, content.lists, is_exact)
        return index if model is None else model.attach(index)

    def _embedded(self, images: Any) -> FeatureTable:
        if self.embed is None:
            raise ConfigError("index: it has no model to embed images with; use FeatureIndex.open(folder, model)")
        return self.embed(images)

    @cached_property
    def _faiss(self) -> Any:
        assert self.lists is not None
        return approximate.faiss_index(self.lists, self.x)


def build_index(
    table: FeatureTable,
    *,
    exact: bool = False,
    lists: InvertedLists | None = None,
    embed: Callable[[Any], FeatureTable] | None = None,
) -> FeatureIndex:
    """Return an index of a table's features: exact below EXACT_BELOW images, with `exact`, and without FAISS.

    lists: of an earlier index, used as far as they fit. Raises DataError for rows that are not finite or are 0.
    """
    names, x = tuple(table.names), unit_rows(table.x)
    return FeatureIndex(names, x, table.facts, _lists(names, x, exact, lists), exact, embed)


def _lists(names: tuple[str, ...], x: np.ndarray, exact: bool, old: InvertedLists | None) -> InvertedLists | None:
    if exact or not approximate.is_used(len(x)):
        return None
    return (old and approximate.fitting(old, names, x)) or approximate.build(names, x)
