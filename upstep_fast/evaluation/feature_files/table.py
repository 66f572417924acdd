"""Features of images with their names, read from the files and folders that `embed` writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from upstep_fast.data.sources.lines import name_line, name_of_line
from upstep_fast.errors import ConfigError, DataError, first_line
from upstep_fast.evaluation.feature_files import parquet as feature_parquet
from upstep_fast.evaluation.feature_files.moved import moved
from upstep_fast.evaluation.feature_files.parquet import BASE, FACTS, FEATURES
from upstep_fast.input_files import read_text, require_regular

__all__ = ["BASE", "FACTS", "FEATURES", "FeatureTable", "name_line", "name_of_line", "read_features"]

MAX_NAMES_BYTES = 1 << 34
_UNREADABLE = (ConfigError, OSError, ValueError, KeyError, TypeError, NotImplementedError, RecursionError, MemoryError)


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """Features by image. Made by `read_features`."""

    names: tuple[str, ...]  # as `Source.name` gives them, in order
    x: np.ndarray  # [N, D] fp32, finite, no row 0
    facts: dict[str, Any]  # model, fingerprint, form, dim, version; {} where the file has none

    def __len__(self) -> int:
        return len(self.names)


def read_features(path: str | Path, column: str = FEATURES, places: Sequence[tuple[str, str]] = ()) -> FeatureTable:
    """Return the features in a .npy (with its .txt), .safetensors or .parquet file, or in a folder of .parquet files.

    column: which features; places: of images that have moved since, as `parse_moved` gives them. Raises DataError for
    what cannot be read, for names that do not match, and for rows that are not finite or are 0.
    """
    path = Path(path)
    kind = "folder" if path.is_dir() else path.suffix
    if kind not in _READERS:
        raise DataError(f"features: {path} must be a {', '.join(_READERS)} that embed wrote")
    try:
        table = _READERS[kind](path, column)
    except _UNREADABLE as error:
        raise DataError(f"features: cannot read {path}: {first_line(error).removeprefix('features: ')}") from error
    if table.x.ndim != 2 or len(table.x) != len(table.names):
        raise DataError(f"features: {path} holds features {list(table.x.shape)} and {len(table.names)} names")
    if bad := int((~np.isfinite(table.x).all(axis=1) | ~table.x.any(axis=1)).sum()):
        raise DataError(f"features: {bad} of {len(table)} rows of {path} are not finite or are 0; embed them again")
    if places:
        table = replace(table, names=tuple(moved(name, places) for name in table.names))
    return table


def _npy(path: Path, column: str) -> FeatureTable:
    if column != FEATURES:
        raise ValueError(f"a .npy has no {column}")
    lines = read_text(path.with_suffix(".txt"), "features", MAX_NAMES_BYTES).split("\n")
    x = np.load(require_regular(path, "features"), allow_pickle=False)
    if x.dtype.kind not in "fiu":
        raise ValueError(f"it holds {x.dtype}, not real numbers")
    return FeatureTable(tuple(map(name_of_line, lines[:-1])), x.astype(np.float32, copy=False), {})


def _safetensors(path: Path, column: str) -> FeatureTable:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(require_regular(path, "features"), "np") as file:
            if column not in file.keys():  # noqa: SIM118  (not a dict)
                raise ValueError(f"it has no tensor {column}, but {', '.join(list(file.keys())[:20])}")
            metadata, x = file.metadata() or {}, file.get_tensor(column)
    except SafetensorError as error:
        raise ValueError(first_line(error)) from error
    names, facts = json.loads(metadata.get("paths", "null")), json.loads(metadata.get(FACTS, "{}"))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not isinstance(facts, dict):
        raise ValueError("its metadata names no images")
    return FeatureTable(tuple(names), x.astype(np.float32, copy=False), facts)


def _parquet(path: Path, column: str) -> FeatureTable:
    feature_parquet.require_pyarrow("features")
    read = feature_parquet.read_folder if path.is_dir() else feature_parquet.read_file
    names, x, facts = read(path, column)
    return FeatureTable(tuple(names), x, facts)


_READERS: dict[str, Callable[[Path, str], FeatureTable]] = {
    ".npy": _npy,
    ".safetensors": _safetensors,
    ".parquet": _parquet,
    "folder": _parquet,
}
