"""Features of images in Ray Data: a callable for `map_batches`, with one model in each actor.

>>> images = ray.data.read_binary_files("s3://bucket/photos/", include_paths=True)
>>> features = images.map_batches(Embedder, fn_constructor_args=("adapted/",), concurrency=4, batch_size=64)
>>> features.write_parquet("features/")  # a folder that upstep-fast search and explore read
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from upstep_fast.data.decode.image import decode
from upstep_fast.data.loading.ordered_map import ordered_map
from upstep_fast.errors import BadImage, ConfigError, DataError
from upstep_fast.evaluation.feature_files.parquet import FACTS, FEATURES, require_pyarrow
from upstep_fast.evaluation.load_with_facts import load_with_facts
from upstep_fast.runtime import machine

log = logging.getLogger("upstep_fast")

IMAGES = ("bytes", "image", "path")  # columns that are read, the first of them that is there
ERROR = "error"


class Embedder:
    """Features of batches of images: unit vectors, whitened ones appended where the run has a whitening.

    batch -> pyarrow table: the columns of the batch without `bytes` and `image`, and `features`, fixed-size lists of
    fp32. Its metadata say what the features are, so each file of `Dataset.write_parquet` says so, too. A batch may have
    any number of rows.

    column: holds encoded files (`bytes`), arrays [H, W, C] (`image`) or paths and addresses (any other name); default:
    the first of `bytes`, `image` and `path` that is there. errors: "raise" on the first image that cannot be used;
    "drop" it, with a warning in the actor's log; or "column": add the column `error`, empty where there is none, and
    give an image that cannot be used no features (null). num_workers: threads that decode; None: one per core, at most
    16. model, whiten, device and further options: as for `upstep_fast.load`.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        column: str | None = None,
        errors: Literal["raise", "drop", "column"] = "raise",
        num_workers: int | None = None,
        base_model: str | Path | None = None,
        whiten: bool | str | Path | None = None,
        device: str = "auto",
        **options: Any,
    ) -> None:
        require_pyarrow("ray")
        if errors not in ("raise", "drop", "column"):
            raise ConfigError(f"errors: got {errors!r}, must be raise, drop or column")
        self.column, self.errors, self.num_workers = column, errors, machine.num_workers(num_workers)
        self.model, self.facts = load_with_facts(model, base_model, whiten, device=device, **options)

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        """Return the features of a batch of columns as a pyarrow table. Raises DataError, RunFailedError."""
        column = self._column(batch)
        prepared = list(ordered_map(self._prepared, list(batch[column]), self.num_workers, 2 * self.num_workers))
        reasons = [one.reason if isinstance(one, BadImage) else "" for one in prepared]
        if any(reasons) and self.errors != "column":
            self._say(batch, column, reasons)
        images = [one for one in prepared if isinstance(one, Tensor)]
        x = self.model(torch.stack(images)).cpu().numpy() if images else np.empty((0, self.model.dim), np.float32)
        return self._table(batch, np.array([not reason for reason in reasons], bool), reasons, x)

    def _column(self, batch: Mapping[str, Any]) -> str:
        names = IMAGES if self.column is None else (self.column,)
        found = next((name for name in names if name in batch), None)
        if found is None:
            raise DataError(
                f"ray: a batch has no column {' or '.join(names)}, but {', '.join(batch)}; name it: column="
            )
        return found

    def _prepared(self, image: Any) -> Tensor | BadImage:
        """Return the transformed image, fp32 [C, *size], or why it cannot be used."""
        transform = self.model.transform
        try:
            if isinstance(image, (bytes, memoryview)):
                channels = len(transform.mean)
                return transform.of_pixels(decode(image, channels=channels, reading=transform.reading))
            return transform(image if isinstance(image, np.ndarray) else str(image))
        except BadImage as error:
            return error

    def _say(self, batch: Mapping[str, Any], column: str, reasons: list[str]) -> None:
        """Raise DataError naming the first image that cannot be used, or warn of all of them."""
        names = batch["path"] if "path" in batch else [f"row {i} of a batch" for i in range(len(reasons))]
        bad = [f"{name}: {reason}" for name, reason in zip(names, reasons, strict=True) if reason]
        if self.errors == "raise":
            raise DataError(f'images: {bad[0]}; repair it, or give errors="drop" or "column"')
        for text in bad:
            log.warning("ray: dropped %s", text)

    def _table(self, batch: Mapping[str, Any], is_good: np.ndarray, reasons: list[str], x: np.ndarray) -> Any:
        import pyarrow

        kept = np.ones_like(is_good) if self.errors == "column" else is_good
        images = {*IMAGES[:2], self.column} - {name for name in batch if isinstance(next(iter(batch[name]), ""), str)}
        columns = {
            name: pyarrow.array([value for value, keep in zip(values, kept, strict=True) if keep])
            for name, values in batch.items()
            if name not in images
        }
        rows = np.zeros((int(kept.sum()), self.model.dim), np.float32)
        rows[is_good[kept]] = x
        null = pyarrow.array(~is_good[kept])
        flat = pyarrow.array(rows.ravel())
        columns[FEATURES] = pyarrow.FixedSizeListArray.from_arrays(flat, self.model.dim, mask=null)
        if self.errors == "column":
            columns[ERROR] = pyarrow.array(reasons, pyarrow.string())
        return pyarrow.table(columns).replace_schema_metadata({FACTS: json.dumps(self.facts)})
