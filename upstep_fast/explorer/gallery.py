"""Content of the page: images, their features before and after, maps, columns and thumbnails."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from upstep_fast.config.explore import ExploreConfig
from upstep_fast.data.curation.intensity import measure_intensity
from upstep_fast.data.decode.image import decode
from upstep_fast.data.loading.skipped_images import csv_cell
from upstep_fast.data.sources.source import Source, open_source
from upstep_fast.errors import DataError
from upstep_fast.evaluation.feature_files.table import FEATURES
from upstep_fast.evaluation.feature_model import FeatureModel
from upstep_fast.evaluation.features import load_models
from upstep_fast.evaluation.load_options import configured
from upstep_fast.evaluation.run_features import BASE, data_of_run, model_of, read_or_embed
from upstep_fast.evaluation.search.exact import top_k, unit_rows
from upstep_fast.explorer import columns as of_images
from upstep_fast.explorer.columns import Column
from upstep_fast.explorer.lists import Lists
from upstep_fast.explorer.maps import Maps, start_maps
from upstep_fast.explorer.thumbnails import Thumbnails
from upstep_fast.runtime.atomic_file import probe
from upstep_fast.runtime.progress import track

log = logging.getLogger("upstep_fast")

BEFORE, AFTER = "base", "adapted"
FOLDER = "explore"  # of a run: the caches


@dataclass(frozen=True, eq=False)
class Gallery:
    """N images with unit features by BEFORE and AFTER, [N, D] each."""

    title: str
    names: tuple[str, ...]
    x: dict[str, np.ndarray]
    rows: np.ndarray  # [N] the number of each image in `source`; -1: it is not there any more
    source: Source
    model: FeatureModel
    columns: list[Column]
    maps: Maps
    thumbnails: Thumbnails
    lists: Lists
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def neighbors(self, queries: dict[str, np.ndarray], k: int, leave_out: int = -1) -> dict[str, list[list[float]]]:
        """Return the k nearest images of each query [D] as [index, cosine similarity], nearest first.

        queries: by column. leave_out: an image that is not its own neighbor. Equal ones: the lower index first.
        """
        found = {}
        for column, query in queries.items():
            scores, indices = (rows[0].tolist() for rows in top_k(self.x[column], query[None], k + 1))
            pairs = [[i, round(score, 4)] for i, score in zip(indices, scores, strict=True) if i != leave_out]
            found[column] = pairs[:k]
        return found

    def neighbors_of(self, index: int, k: int) -> dict[str, list[list[float]]]:
        """Return the k nearest images of an image, before and after."""
        return self.neighbors({column: rows[index] for column, rows in self.x.items()}, k, index)

    def search(self, data: bytes, k: int) -> dict[str, list[list[float]]]:
        """Return the k nearest images of an encoded image. Raises BadImage."""
        with self._lock:  # one image at a time: decoded, it may take half a gigabyte
            pixels = decode(data, channels=len(self.model.transform.mean), reading=self.source.reading)
            images = self.model.transform.of_pixels(pixels)[None]
            models = {AFTER: self.model} | ({BEFORE: self._base} if BEFORE in self.x else {})
            queries = {column: models[column](images)[0].cpu().numpy() for column in self.x}
        return self.neighbors(queries, k)

    @cached_property
    def _base(self) -> FeatureModel:
        return base_of(self.model)

    def path(self, index: int) -> str:
        """Return an image's path as a cell of a list for --data: absolute, or its name if it is in an archive."""
        row = int(self.rows[index])
        path = None if row < 0 else self.source.file_path(row)
        return csv_cell(self.names[index]) if path is None else os.path.abspath(path)

    @property
    def has_files(self) -> bool:
        """Return whether each image is a file of its own, which a list can name: not a member of an archive."""
        return all(part.file_path(0) is not None for part in self.source.parts)

    def thumbnail(self, index: int, large: bool = False) -> bytes:
        """Return a picture of an image, WebP. Raises BadImage, OSError or KeyError if it is not there any more."""
        row = int(self.rows[index])
        if row < 0:
            raise KeyError(index)
        return self.thumbnails.large(row) if large else self.thumbnails.small(row)

    def close(self) -> None:
        """End the computation of maps."""
        self.maps.close()


def base_of(model: FeatureModel) -> FeatureModel:
    """Return the base model of a model, without whitening, on the same device. Raises ConfigError."""
    backbone = model.backbone
    if model.adapter is not None:
        how = {"device": model.device, "precision": model.precision, "implementation": model.implementation}
        config, _ = configured(model.adapter, whiten=False, **how)
        backbone = load_models(replace(config, adapter=None))["base"]
    return replace(model, backbone=backbone, adapter=None, whitening=None, _functions={})


def gallery_of_run(config: ExploreConfig) -> Gallery:
    """Return the gallery of a run's images; what is missing of their features is embedded first. Raises UpstepError."""
    if config.columns is not None:  # before minutes of embedding
        of_images.require_table(Path(config.columns))
    data = config.data or data_of_run(config.run)
    tables = read_or_embed(config, base=True)
    adapted, base = tables[FEATURES], tables[BASE]
    if adapted.names != base.names:
        raise DataError("features: those of the base model are of other images; embed them again with --with-base")
    x = {BEFORE: base.x, AFTER: adapted.x}
    model = model_of(config)
    return make_gallery(Path(config.run).name, adapted.names, x, data, model, config, Path(config.run) / FOLDER)


def gallery_of_model(model: FeatureModel, data: Sequence[str], config: ExploreConfig) -> Gallery:
    """Return the gallery of images by a loaded model, embedded in memory. Raises UpstepError."""
    names = tuple(name for path in data for name in model.paths(path))
    models = {BEFORE: base_of(model), AFTER: model}
    x = {
        column: np.concatenate([one.embed(path, config.batch_size) for path in data]) for column, one in models.items()
    }
    return make_gallery(Path(model.backbone.name).name, names, x, data, model, config, None)


def make_gallery(
    title: str,
    names: tuple[str, ...],
    x: dict[str, np.ndarray],
    data: Sequence[str],
    model: FeatureModel,
    config: ExploreConfig,
    cache: Path | None,
) -> Gallery:
    """Return the gallery of images with features {column: [N, D]}, "base" first. Raises UpstepError.

    cache: a folder for maps and thumbnails; not used if it cannot be written.
    """
    if not names:
        raise DataError("data: there are no images to explore")
    channels = len(model.backbone.mean)
    with track("explore: images and maps"):
        x = {column: unit_rows(rows) for column, rows in x.items()}
        source = measure_intensity(open_source(tuple(data), reading=model.reading), channels=channels)
        rows = rows_of(names, source)
        columns = columns_of(names, x[AFTER], rows, source, config)
        cache = cache if cache is not None and _is_writable(cache) else None
        maps = start_maps(x, cache)
    folder = None if cache is None else cache / f"thumbnails-{_key(source)}"
    thumbnails, lists = Thumbnails(source, channels, folder), Lists(source, names, x[AFTER], rows, channels)
    return Gallery(title, names, x, rows, source, model, columns, maps, thumbnails, lists)


def rows_of(names: Sequence[str], source: Source) -> np.ndarray:
    """Return the number of each name in the source, [N] int64; -1: not there. Raises DataError if none is there."""
    numbers = {source.name(i): i for i in range(len(source))}
    rows = np.fromiter((numbers.get(name, -1) for name in names), np.int64, len(names))
    if missing := int((rows < 0).sum()):
        if missing == len(rows):
            raise DataError(
                f"data: none of the {len(rows)} embedded images is there, e.g. {names[0]}; give their --data"
            )
        log.warning("explore: %d of %d embedded images are not in --data; they have no picture", missing, len(rows))
    return rows


def columns_of(
    names: Sequence[str], x: np.ndarray, rows: np.ndarray, source: Source, config: ExploreConfig
) -> list[Column]:
    """Return the columns to color by: label, folder, cluster, and those of the CSV."""
    columns = []
    if (labels := source.labels) is not None:
        columns.append(of_images.of_categories("label", [labels[i] if i >= 0 else of_images.NONE for i in rows]))
    if (folders := of_images.of_folders(names)) is not None:
        columns.append(folders)
    columns.append(of_images.of_clusters(x, config.clusters))
    if config.columns is not None:
        columns += of_images.read_columns(Path(config.columns), names)
    return columns


def _is_writable(folder: Path) -> bool:
    try:
        probe(folder)
    except OSError:
        return False
    return True


def _key(source: Source) -> str:
    where = [os.path.abspath(path) for i in range(min(len(source), 1)) if (path := source.file_path(i))]
    return hashlib.sha256(f"{source.fingerprint()} {source.reading} {where}".encode()).hexdigest()[:16]
