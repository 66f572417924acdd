"""Images of a Hugging Face dataset: from the hub, its cache, a folder of `save_to_disk`, parquet or arrow files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from upstep_fast.data.sources.part import Part
from upstep_fast.errors import DataError


@dataclass(frozen=True, eq=False)
class Rows:
    """One split of a dataset; images stay encoded in its arrow files."""

    title: str
    rows: Any  # datasets.Dataset, the image column not decoded
    image: str  # columns
    label: str | None

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Return dataset, split and row."""
        return f"{self.title}/{index}"

    def read(self, index: int) -> bytes:
        """Return the encoded image of a row. Raises OSError."""
        value = self.rows[index][self.image]
        if value is None:
            raise OSError("the row has no image")
        if value["bytes"] is not None:
            return value["bytes"]
        with open(value["path"], "rb") as file:
            return file.read()

    def labels(self) -> list[str] | None:
        """Return the class column's values by name; None without such a column."""
        if self.label is None:
            return None
        feature, values = self.rows.features[self.label], self.rows[self.label][:]
        return [feature.int2str(v) if hasattr(feature, "int2str") else str(v) for v in values]

    def identity(self) -> Iterator[bytes]:
        """Yield the fingerprint that `datasets` keeps."""
        yield f"{self.title}:{self.rows._fingerprint}".encode()


def open_dataset(name: str, split: str | None) -> list[Part]:
    """Return the parts of dataset `name`. Raises DataError when `datasets` is absent or cannot load it."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"data: hf:{name} needs the package datasets; pip install 'upstep_fast[data]'") from error
    try:
        loaded = _load(name, datasets)
    except Exception as error:  # the hub, arrow and the dataset's own reader raise many kinds
        first_line = str(error).strip().split("\n", 1)[0]
        raise DataError(f"data: cannot load hf:{name}: {first_line}") from error
    splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    if split is not None:
        splits = {key: rows for key, rows in splits.items() if key == split}
    return [_rows(f"hf:{name}/{key}", rows, datasets) for key, rows in splits.items()]


def _load(name: str, datasets: Any) -> Any:
    kind = os.path.splitext(name)[1].removeprefix(".")
    if kind in ("parquet", "arrow") and os.path.isfile(name):
        return datasets.load_dataset(kind, data_files=name)
    is_saved = any(os.path.isfile(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json"))
    return datasets.load_from_disk(name) if is_saved else datasets.load_dataset(name)


def _holds_images(feature: Any, datasets: Any) -> bool:
    """Return whether a column holds images, or files: bytes, or bytes and a path."""
    is_binary = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    return isinstance(feature, datasets.Image) or is_binary or (isinstance(feature, dict) and "bytes" in feature)


def _rows(title: str, rows: Any, datasets: Any) -> Part:
    images = [key for key, feature in rows.features.items() if _holds_images(feature, datasets)]
    images.sort(key=lambda key: not isinstance(rows.features[key], datasets.Image))  # declared ones first
    if not images:
        raise DataError(f"data: {title} has no image column; its columns are {', '.join(rows.features)}")
    labels = [key for key, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    label = next((key for key in (*labels, "label", "class") if key in rows.features), None)
    return Rows(title, rows.cast_column(images[0], datasets.Image(decode=False)), images[0], label)
