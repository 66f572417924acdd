"""The search command: the images of a run that are most similar to each query."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from upstep_fast.config.search import SearchConfig
from upstep_fast.errors import ConfigError, DataError
from upstep_fast.evaluation.feature_files.table import FEATURES, FeatureTable
from upstep_fast.evaluation.run_features import model_of, read_or_embed
from upstep_fast.evaluation.search import approximate
from upstep_fast.evaluation.search.approximate import SAMPLE, K
from upstep_fast.evaluation.search.index import FeatureIndex, Match, build_index
from upstep_fast.runtime.atomic_file import require_writable

log = logging.getLogger("upstep_fast")

EQUAL = 0.9999  # similarity of an image and its copy, which differ by rounding in another batch
LISTS = "lists.safetensors"


@dataclass(frozen=True, eq=False)
class Found:
    """Matches of each query, nearest first."""

    queries: tuple[str, ...]
    matches: list[list[Match]]
    index: FeatureIndex

    @property
    def searched(self) -> str:
        """Number of images searched, and whether exactly, in words."""
        index = self.index
        how = "exact"
        if not index.is_exact:
            share = f"{100 * index.recall:.1f} % of the {K} nearest images are found"
            how = f"approximate: {share}, measured on {min(SAMPLE, len(index))} of these images; --exact finds all"
        return f"{len(index):,} images, {how}"


def run_search(config: SearchConfig) -> Found:
    """Run the search command. Raises UpstepError."""
    for field, path in (("json", config.json), ("out", config.out)):
        if path is not None:
            require_writable(Path(path), field)
            if field == "out" and os.path.lexists(path) and not config.overwrite:
                raise ConfigError(f"out: {path} exists; choose another name or add --overwrite")
    table = read_or_embed(config)[FEATURES]
    queries = query_features(config, table)
    index = open_index(config, table)
    return Found(config.query, nearest(index, queries, config.k, distinct=config.distinct), index)


def nearest(index: FeatureIndex, queries: np.ndarray, k: int, *, distinct: bool = False) -> list[list[Match]]:
    """Return the matches of each query [Q, D]; distinct: without those that equal it."""
    count = k
    while True:
        scores, rows = index.search(queries, count)
        kept = scores < EQUAL if distinct else np.ones_like(rows, bool)
        if count >= len(index) or kept.sum(axis=1).min() >= k:
            return [index.matches(s[good][:k], r[good][:k]) for s, r, good in zip(scores, rows, kept, strict=True)]
        count = min(2 * count + 8, len(index))


def query_features(config: SearchConfig, table: FeatureTable) -> np.ndarray:
    """Return the features of the queries [Q, D]: of names in the table its rows, of files those by the run's model."""
    row_of = {name: row for row, name in enumerate(table.names)} if len(table) else {}
    files = [query for query in dict.fromkeys(config.query) if query not in row_of]
    for query in files:
        if not os.path.isfile(query):
            raise DataError(
                f"query: {query} is no image file, and no name of the {len(table):,} images; give a path, or a name as "
                "the features have it"
            )
    features = {query: table.x[row_of[query]] for query in config.query if query in row_of}
    if files:
        try:
            rows = model_of(config).embed(files, config.batch_size)
        except DataError as error:
            raise DataError(f"query: {str(error).removeprefix('images: ')}") from error
        features |= dict(zip(files, rows, strict=True))
        if rows.shape[1] != table.x.shape[1]:
            raise DataError(
                f"features: those of the images have width {table.x.shape[1]}, the run's model gives {rows.shape[1]}; "
                "embed the images again with this run"
            )
    return np.stack([features[query] for query in config.query])


def index_folder(config: SearchConfig) -> Path:
    """Return where the index of the features is kept: RUN/index, or beside the file or folder of --features."""
    if config.features is None:
        return Path(config.run) / "index"
    features = Path(config.features)
    return features.with_name(f"{features.name}.index")


def open_index(config: SearchConfig, table: FeatureTable) -> FeatureIndex:
    """Return the index of a table; the lists of an approximate one are read, extended or made, and kept."""
    path, lists = index_folder(config) / LISTS, None
    if not config.exact and approximate.is_installed() and os.path.lexists(path):
        try:
            lists = approximate.read(path)
        except DataError as error:
            log.warning("%s", error)
    index = build_index(table, exact=config.exact, lists=lists)
    if index.lists is not None and index.lists is not lists:
        try:  # two writers write the same
            path.parent.mkdir(exist_ok=True)
            approximate.write(index.lists, path)
        except OSError as error:
            log.warning("index: not kept, as %s cannot be written (%s)", path, error.strerror or error)
    return index
