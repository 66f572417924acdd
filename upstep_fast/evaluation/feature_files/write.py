"""Writers of the Parquet files of features: names of a plan, rows of a shard or file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

ROW_GROUP = 4096  # rows of features
NAMES = 1 << 16  # rows of names


def write_names(names: Iterable[str], metadata: Mapping[str, Any], file: BinaryIO) -> None:
    """Write names as the column `path` to an open file, without having all of them in memory at once."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("path", pyarrow.string())], {key: json.dumps(value) for key, value in metadata.items()})
    rest = iter(names)
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
    with pyarrow.parquet.ParquetWriter(file, schema, **options) as writer:
        while some := list(itertools.islice(rest, NAMES)):
            writer.write_batch(pyarrow.record_batch([pyarrow.array(some, pyarrow.string())], schema=schema))


def write_table(
    names: Sequence[str], columns: Mapping[str, np.ndarray], metadata: Mapping[str, Any], file: BinaryIO
) -> None:
    """Write names [N] and features, by column [N, D] fp32, to an open file; metadata: JSON values by key."""
    import pyarrow
    import pyarrow.parquet

    arrays: dict[str, Any] = {"path": pyarrow.array(list(names), pyarrow.string())}
    for name, x in columns.items():
        # a view of permuted axes would be written in the order of its memory
        flat = pyarrow.array(np.ascontiguousarray(x, dtype=np.float32).ravel())
        arrays[name] = pyarrow.FixedSizeListArray.from_arrays(flat, x.shape[1])
    table = pyarrow.table(arrays).replace_schema_metadata({key: json.dumps(value) for key, value in metadata.items()})
    # the digits of features do not compress
    compression = {"path": "zstd"} | {f"{name}.list.element": "none" for name in columns}
    options: dict[str, Any] = {"compression": compression, "use_dictionary": False, "write_page_checksum": True}
    pyarrow.parquet.write_table(table, file, row_group_size=ROW_GROUP, **options)
