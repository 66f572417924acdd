"""Images of a Hugging Face dataset: from the hub, its cache, a folder of `save_to_disk`, parquet or arrow files."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from upstep_fast.data.formats.kinds import kind_of
from upstep_fast.data.sources.part import ALREADY_LISTED, Columns, Listing, Part, printable, read_image_file
from upstep_fast.data.sources.splits import TRAIN_NAMES, all_read, find_splits, is_split, reading
from upstep_fast.errors import DataError, first_line

LABEL_COLUMNS = ("label", "class")


@dataclass(frozen=True, eq=False)
class Rows(Part):
    """One split of a dataset; images stay encoded in its arrow files."""

    title: str
    rows: Any  # datasets.Dataset, the image column not decoded
    image: str  # columns
    label: str | None
    reason: str = ""  # why there is no label column

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
        if value["path"] is None:
            raise OSError("the row has neither bytes nor a path")
        return read_image_file(value["path"])

    def file_name(self, index: int) -> str:
        """Return the name that the image's file had; empty if the data set does not say."""
        return self._file_names[index] if self._file_names else ""

    @functools.cached_property
    def _file_names(self) -> list[str]:
        """Names of all files; none if a row has none, or if the rows lie behind an index."""
        if self.rows._indices is not None:
            return []
        import pyarrow.compute

        paths = pyarrow.compute.struct_field(self.rows.data.column(self.image), "path")
        return [] if paths.null_count else paths.to_pylist()

    def other_than(self, suffixes: tuple[bytes, ...]) -> Sequence[int]:
        """Return the images of names that end otherwise; without names all if the first is no photograph."""
        if self._file_names:
            return super().other_than(suffixes)
        try:
            is_photograph = not len(self) or kind_of("", self.start(0)) is None
        except OSError:
            is_photograph = True
        return () if is_photograph else range(len(self))

    def ending_in(self, suffixes: tuple[bytes, ...]) -> Sequence[int]:
        """Return the images of names that end so; none without names."""
        return super().ending_in(suffixes) if self._file_names else ()

    def labels(self) -> list[str] | None:
        """Return the class column's values by name; None without such a column, or if a row has none."""
        if self.label is None:
            return None
        names = _label_names(self.rows.features[self.label], self.rows[self.label][:])
        known = [name for name in names if name is not None]
        if len(known) < len(names) or all(map(is_split, known)):
            return None
        return known

    def unlabeled(self) -> str:
        """Return why `labels` is None."""
        if self.label is None:
            return self.reason
        names = _label_names(self.rows.features[self.label], self.rows[self.label][:])
        missing = [index for index, name in enumerate(names) if name is None]
        if not missing:
            return f"has no labels: its column {self.label} holds only the name of the split"
        return (
            f"has {len(missing)} of {len(names)} rows without a label (none, or -1) in its column {self.label}, e.g. "
            f"{self.name(missing[0])}; leave these rows out, or name another column with --label-column"
        )

    def sizes_in_bytes(self) -> np.ndarray:
        """Return the sizes of the encoded images, [N] int64; -1 for those that lie in files or behind an index."""
        if self.rows._indices is not None:
            return np.full(len(self), -1, np.int64)
        import pyarrow.compute

        images = pyarrow.compute.struct_field(self.rows.data.column(self.image), "bytes")
        lengths = pyarrow.compute.fill_null(pyarrow.compute.binary_length(images), -1)
        return lengths.to_numpy().astype(np.int64)

    def identity(self) -> Iterator[bytes]:
        """Yield the fingerprint that `datasets` keeps."""
        yield f"{self.title}:{self.rows._fingerprint}".encode()


def open_dataset(name: str, split: str | None, columns: Columns, listing: Listing) -> list[Part]:
    """Return the parts of dataset `name`. Raises DataError when `datasets` is absent or cannot load it."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"data: hf:{name} needs the package datasets; pip install 'upstep_fast[data]'") from error
    if (key := f"hf:{name}") in listing.seen:
        listing.problems.append((key, ALREADY_LISTED))
        return []
    listing.seen.add(key)
    try:
        loaded = _load(name, datasets)
    except Exception as error:  # the hub, arrow and the dataset's own reader raise many kinds
        first_line = str(error).strip().split("\n", 1)[0]
        raise DataError(f"data: cannot load hf:{name}: {first_line}") from error
    parts = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    splits = find_splits(parts, key)
    if split == "test" and splits is None:
        need = f"it must have the splits train and test (or val, valid, validation), and has {', '.join(parts)}"
        listing.without_test.append(need)
        return []
    if split and splits is not None:
        listing.notes.append(reading(key, splits[split], parts, folders=False))
        parts = {splits[split]: parts[splits[split]]}
    elif split and any(part.lower() not in TRAIN_NAMES for part in parts):
        listing.notes.append(all_read(key, parts))
    return [_rows(f"{key}/{name}", rows, columns, listing, datasets) for name, rows in parts.items()]


def _load(name: str, datasets: Any) -> Any:
    kind = os.path.splitext(name)[1].removeprefix(".")
    if kind in ("parquet", "arrow") and os.path.isfile(name):
        return datasets.load_dataset(kind, data_files=name)
    is_saved = any(os.path.isfile(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json"))
    if is_saved:
        return datasets.load_from_disk(name)
    if os.path.exists(name):
        return datasets.load_dataset(name)
    from upstep_fast import network  # its import takes a moment, which folders need not

    try:
        with network.limited(datasets.config, errors=(OSError, ValueError)):
            return datasets.load_dataset(name)
    except ConnectionError as error:
        raise ConnectionError(
            f"{first_line(error)}; check the name, the network or HF_HOME, or give a folder"
        ) from error


def _rows(title: str, rows: Any, columns: Columns, listing: Listing, datasets: Any) -> Part:
    image = _image_column(title, rows.features, columns.image, listing, datasets)
    label, reason = _label_column(title, rows.features, columns.label, datasets)
    return Rows(title, rows.cast_column(image, datasets.Image(decode=False)), image, label, reason)


def _image_column(title: str, features: Any, given: str | None, listing: Listing, datasets: Any) -> str:
    """Return the column of images: the given one, `image`, the only declared one, or the only one of bytes.

    Raises DataError where the choice would be a guess.
    """
    have = ", ".join(features)
    declared = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    stored = [key for key, feature in features.items() if _holds_bytes(feature, datasets)]
    found = declared or stored
    if given is not None:
        if given not in (*declared, *stored):
            raise DataError(f"data: {title} has no column {given} of images (--image-column); it has {have}")
        return given
    if not found:
        raise DataError(f"data: {title} has no image column; its columns are {have}")
    if "image" not in found and len(found) > 1:
        raise DataError(
            f"data: {title} has {len(found)} columns that may be the image: {', '.join(found)}; name it with "
            "--image-column"
        )
    image = "image" if "image" in found else found[0]
    if rest := [key for key in found if key != image]:
        listing.notes.append(f"{title}: the column {image} is read; left out: {', '.join(rest)}")
    return image


def _holds_bytes(feature: Any, datasets: Any) -> bool:
    """Return whether a column holds files: bytes, or bytes and a path."""
    is_binary = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    return is_binary or (isinstance(feature, dict) and "bytes" in feature)


def _label_column(title: str, features: Any, given: str | None, datasets: Any) -> tuple[str | None, str]:
    """Return the column of classes: the given one, `label`, `class`, or the only ClassLabel; or None, and why."""
    have = ", ".join(features)
    if given is not None:
        if given not in features:
            raise DataError(f"data: {title} has no column {given} (--label-column); it has {have}")
        return given, ""
    kinds = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    label = next((key for key in LABEL_COLUMNS if key in features), kinds[0] if len(kinds) == 1 else None)
    if label is None and kinds:
        return None, f"has the label columns {', '.join(kinds)}; name one with --label-column"
    return label, f"has no column label or class ({title}); it has {have}; name one with --label-column"


def _label_names(feature: Any, values: list[Any]) -> list[str | None]:
    """Return the class of each row by name; None for None, NaN, lists, and -1 where it means no class.

    -1 is no class of a ClassLabel, nor of plain numbers if all of them are -1, as in the test splits on the hub.
    """
    if hasattr(feature, "int2str"):
        names = [printable(name.encode()) for name in feature.names]
        return [names[v] if v is not None and 0 <= v < len(names) else None for v in values]
    if all(v == -1 for v in values):
        return [None] * len(values)
    is_class = [isinstance(v, (str, int, float)) and v == v and v != "" for v in values]
    return [printable(str(v).encode()) if ok else None for v, ok in zip(values, is_class, strict=True)]
