"""Parquet files of features: a file, or a folder of shards that grows as images are added.

    FOLDER/plan-000.parquet         names of one generation of images, in order; written first
    FOLDER/part-000-00000.parquet   shard k of that plan, its rows k S to (k + 1) S: path, features, and perhaps base

Every shard says for itself what its features are (FACTS in its schema's metadata), as readers of a sharded data set
keep the first one's metadata alone. Images of the plan that could not be read are in the shard's metadata (SKIPPED).
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upstep_fast.errors import ConfigError, DataError, first_line
from upstep_fast.evaluation.feature_files.write import ROW_GROUP
from upstep_fast.input_files import require_regular

FACTS = "upstep_fast"  # in the metadata of Parquet and safetensors: what the features are, as JSON
SKIPPED = "upstep_fast.skipped"  # in the metadata of a shard: {name: reason} of images that could not be read, as JSON
SIZES = "upstep_fast.sizes"  # in the metadata of a shard: {"bytes": sizes of its rows' images in the plan}, as JSON
FEATURES, BASE = "features", "base"  # the columns, or tensors; the second holds the base model's plain features
RECORD = ("model", "version", "precision")  # facts that may differ between shards: the fingerprint tells the model
ANEW = "embed to another --out, or all again with --overwrite"
_FILE = re.compile(r"(plan|part)-(\d{3,9})(-\d{5,9})?\.parquet", re.ASCII)


@dataclass(frozen=True)
class Plan:
    """One generation of images in a folder of features."""

    folder: Path
    number: int
    size: int  # images in each shard but the last
    rows: int  # images in all
    metadata: dict[str, Any]

    @property
    def path(self) -> Path:
        """File of the names."""
        return self.folder / f"plan-{self.number:03d}.parquet"

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.size)

    def shard(self, k: int) -> Path:
        """Return the file of shard `k`."""
        return self.folder / f"part-{self.number:03d}-{k:05d}.parquet"

    def shard_rows(self, k: int) -> range:
        """Return the rows of shard `k` in the plan."""
        return range(k * self.size, min((k + 1) * self.size, self.rows))

    def missing(self) -> list[int]:
        """Return the shards that are not written yet."""
        return [k for k in range(self.num_shards) if not self.shard(k).exists()]

    def names(self) -> Iterator[list[str]]:
        """Yield the names of each shard in turn. Raises DataError, ConfigError."""
        import pyarrow

        try:
            yield from self._names()
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise DataError(f"features: {self.path} is damaged ({first_line(error)}); {ANEW}") from error

    def _names(self) -> Iterator[list[str]]:
        import pyarrow.parquet

        waiting: list[str] = []
        path = require_regular(self.path, "features")
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(ROW_GROUP, columns=["path"]):
                waiting += batch.column(0).to_pylist()
                while len(waiting) >= self.size:
                    yield waiting[: self.size]
                    waiting = waiting[self.size :]
        if waiting:
            yield waiting


def has_pyarrow() -> bool:
    """Return whether pyarrow is installed."""
    return importlib.util.find_spec("pyarrow") is not None


def require_pyarrow(field: str) -> None:
    """Raise ConfigError if pyarrow is not installed."""
    if not has_pyarrow():
        raise ConfigError(
            f'{field}: .parquet needs pyarrow; pip install "upstep_fast[parquet]", or use .npy or .safetensors'
        )


def read_plans(folder: Path) -> list[Plan]:
    """Return the plans of a folder of features, in order; [] if it holds none. Raises DataError, ConfigError."""
    import pyarrow.parquet

    found = {"plan": set[int](), "part": set[int]()}
    for match in (_FILE.fullmatch(path.name) for path in folder.iterdir()):
        if match and (match[1] == "part") == bool(match[3]):
            found[match[1]].add(int(match[2]))
    numbers = range(1 + max(found["plan"] | found["part"], default=-1))
    if lost := [number for number in numbers if number not in found["plan"]]:
        raise DataError(f"features: {folder} has lost plan-{lost[0]:03d}.parquet, the names of its images; {ANEW}")
    plans = []
    for number in numbers:
        path = folder / f"plan-{number:03d}.parquet"
        try:
            file = pyarrow.parquet.read_metadata(require_regular(path, "features"))
            values = _json_of(file.metadata, FACTS)
            plans.append(Plan(folder, number, _positive(values["shard_size"]), file.num_rows, values))
        except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
            raise DataError(f"features: {path} is damaged ({first_line(error)}); {ANEW}") from error
    return plans


def holds_features(folder: Path) -> bool:
    """Return whether a folder has a plan or a shard."""
    return folder.is_dir() and any(_FILE.fullmatch(path.name) for path in folder.iterdir())


def read_file(path: Path, column: str) -> tuple[list[str], np.ndarray, dict[str, Any]]:
    """Return names [N], features [N, D] and facts of a Parquet file. Raises DataError, ConfigError, OSError."""
    import pyarrow

    names, x, metadata = _read(path, column)
    try:
        return names, x, _json_of(metadata, FACTS)
    except (ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"features: {path} does not say what its features are ({first_line(error)})") from error


def read_folder(folder: Path, column: str) -> tuple[list[str], np.ndarray, dict[str, Any]]:
    """Return names [N], features [N, D] and facts of all shards in a folder, in order of the plans.

    Raises DataError if shards are missing, damaged, or of another model than the first.
    """
    plans = read_plans(folder)
    if not plans:
        return _read_without_plan(folder, column)
    require_complete(plans)
    names: list[str] = []
    x = np.empty((0, 0), np.float32)
    facts: dict[str, Any] = {}
    for plan in plans:
        for k, expected in enumerate(plan.names()):
            path = plan.shard(k)
            own_names, rows, own_facts, skipped = read_shard(path, column)
            if own_names != [name for name in expected if name not in skipped]:
                raise DataError(f"features: {path} has other names than {plan.path.name}; delete it and embed again")
            if not facts:
                facts, x = own_facts, np.empty((sum(plan.rows for plan in plans), rows.shape[1]), np.float32)
            require_same(facts, own_facts, path)
            x[len(names) : len(names) + len(rows)] = rows.reshape(len(rows), x.shape[1])  # no other width
            names += own_names
    return names, x[: len(names)], facts


def _read_without_plan(folder: Path, column: str) -> tuple[list[str], np.ndarray, dict[str, Any]]:
    """Return names, features and facts of all Parquet files in a folder, as Ray or Spark write it, sorted by name.

    Raises DataError if there are none, if they are of several models, and for a name that occurs twice.
    """
    parts = [(path, *read_file(path, column)) for path in sorted(folder.glob("*.parquet"))]
    if not parts:
        raise DataError(
            f"features: {folder} holds no features; `upstep-fast embed RUN --data ... --out FOLDER/` writes them"
        )
    for path, *_, facts in parts:
        require_same(parts[0][-1], facts, path)
    names = [name for _, of_file, *_ in parts for name in of_file]
    order = sorted(range(len(names)), key=names.__getitem__)
    twice = next((names[b] for a, b in itertools.pairwise(order) if names[a] == names[b]), None)
    if twice is not None:
        raise DataError(f"features: {folder} names {twice} twice; write each result to a folder of its own")
    x = np.concatenate([rows for *_, rows, _ in parts])
    return [names[i] for i in order], x[order], parts[0][-1]


def read_shard(path: Path, column: str) -> tuple[list[str], np.ndarray, dict[str, Any], dict[str, str]]:
    """Return names [n], features [n, D], facts and {name: reason} of skipped images. Raises DataError."""
    import pyarrow

    try:
        names, x, metadata = _read(path, column)
        return names, x, _json_of(metadata, FACTS), _json_of(metadata, SKIPPED)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"features: {path} is damaged ({first_line(error)}); delete it and repeat embed") from error


def read_shard_facts(path: Path) -> tuple[int, dict[str, Any], dict[str, str], dict[str, Any]]:
    """Return the number of rows, the facts, {name: reason} of skipped images and the SIZES of a shard, or DataError."""
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.read_metadata(require_regular(path, "features"))
        facts, skipped, sizes = (_json_of(file.metadata, key) for key in (FACTS, SKIPPED, SIZES))
        return file.num_rows, facts, skipped, sizes
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"features: {path} is damaged ({first_line(error)}); delete it and repeat embed") from error


def require_complete(plans: Sequence[Plan]) -> None:
    """Raise DataError naming shards that are missing."""
    missing = [plan.shard(k) for plan in plans for k in plan.missing()]
    if missing:
        total = sum(plan.num_shards for plan in plans)
        raise DataError(
            f"features: {missing[0].parent} lacks {len(missing):,} of {total:,} shards, the first {missing[0].name}; "
            "repeat the embed that was stopped, which writes what is missing"
        )


def require_same(then: Mapping[str, Any], now: Mapping[str, Any], where: object) -> None:
    """Raise DataError naming the first fact in which features `now` differ from those `then`."""
    for name in dict.fromkeys((*then, *now)):
        if name not in RECORD and then.get(name) != now.get(name):
            was, is_ = (str(facts.get(name))[:200] for facts in (then, now))
            raise DataError(f"features: {where} are of another kind: {name} {is_}, not {was}; {ANEW}")


def _read(path: Path, column: str) -> tuple[list[str], np.ndarray, Mapping[bytes, bytes]]:
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(require_regular(path, "features"), page_checksum_verification=True) as file:
        schema = file.schema_arrow
        for name in ("path", column):
            if name not in schema.names:
                cure = "; embed --with-base --overwrite writes it" if name == BASE else ""
                raise DataError(f"features: {path} has no column {name}, but {', '.join(schema.names[:20])}{cure}")
        kind = schema.field(column).type
        if not (pyarrow.types.is_fixed_size_list(kind) and pyarrow.types.is_floating(kind.value_type)):
            raise DataError(f"features: {path}: the column {column} has {kind}, not fixed-size lists of numbers")
        table = file.read(columns=["path", column])
    values, names = table.column(column), table.column("path").to_pylist()
    if values.null_count or not all(isinstance(name, str) for name in names):
        raise DataError(f"features: {path} has rows without {'features' if values.null_count else 'a path'}")
    # flatten() minds that a list may be a slice, `.values` does not
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in values.chunks]
    x = np.concatenate([*chunks, np.empty(0, np.float32)]).reshape(len(names), kind.list_size)
    return names, x.astype(np.float32, copy=False), schema.metadata or {}


def _json_of(metadata: Mapping[bytes, bytes] | None, key: str) -> dict[str, Any]:
    try:
        values = json.loads((metadata or {}).get(key.encode(), b"{}"))
    except RecursionError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"its {key} is no JSON object")
    return values


def _positive(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"a shard size of {value}")
    return value
