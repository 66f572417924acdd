"""Files of patch tokens: a Zarr store (format 3) of any size, or a .safetensors file of a small set.

    OUT.zarr/tokens   [N, H, W, D] fp32 or fp16, a few images a chunk, with CRC-32C
    OUT.zarr/path     [N] strings, the images' names
    OUT.zarr          attribute "upstep_fast": facts, written last

The fill value is NaN: Zarr reads a lost chunk as the fill value, and 0 would pass for tokens.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upstep_fast.errors import ConfigError, DataError, first_line
from upstep_fast.evaluation.feature_files.table import FACTS
from upstep_fast.input_files import require_regular
from upstep_fast.runtime.atomic_file import write_atomic

TOKENS, PATH = "tokens", "path"
CHUNK_BYTES = 4 << 20  # of a chunk, roughly
DTYPES: dict[str, np.dtype] = {"fp32": np.dtype("float32"), "fp16": np.dtype("float16")}
CURE = "embed them again with --tokens"


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Patch tokens by image. Made by `read_tokens`."""

    path: str
    names: tuple[str, ...]  # as `Source.name` gives them, in order
    x: Any  # [N, H, W, D] fp32 or fp16: an array, or one of Zarr that reads what is asked for
    facts: dict[str, Any]  # model, fingerprint, adapter, form, grid, patch, img_size and others

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens of images start .. stop - 1, fp32 [n, H, W, D].

        Raises DataError where the file is damaged or a token is not finite or is 0.
        """
        try:
            x = np.asarray(self.x[start:stop], dtype=np.float32)
        except Exception as error:  # Zarr, its codecs and the file system each raise their own kinds
            raise DataError(f"tokens: cannot read {self.path}: {first_line(error)}; {CURE}") from error
        norms = np.linalg.norm(x, axis=-1)
        bad = (~np.isfinite(norms) | (norms == 0)).any((1, 2))
        if bad.any():
            name = self.names[start + int(bad.argmax())]
            raise DataError(f"tokens: those of {name} in {self.path} are missing, not finite or 0; {CURE}")
        return x


def read_tokens(path: str | Path) -> TokenTable:
    """Return the tokens in a .zarr folder or a .safetensors file that `embed --tokens` wrote.

    Of a .zarr the tokens themselves are read by `TokenTable.rows`. Raises DataError for what cannot be read or is not
    complete.
    """
    path = Path(path)
    if path.suffix not in (".zarr", ".safetensors"):
        raise DataError(f"tokens: {path} must be a .zarr or .safetensors that embed --tokens wrote")
    try:
        table = _read_zarr(path) if path.suffix == ".zarr" else _read_safetensors(path)
    except ConfigError as error:
        raise DataError(f"tokens: {str(error).removeprefix('tokens: ')}") from error
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"tokens: cannot read {path}: {first_line(error)}; {CURE}") from error
    if table.x.ndim != 4 or table.x.dtype not in DTYPES.values() or len(table.names) != table.x.shape[0]:
        raise DataError(
            f"tokens: {path} holds tokens {list(table.x.shape)} of {table.x.dtype} and {len(table.names)} names; {CURE}"
        )
    return table


def _read_zarr(path: Path) -> TokenTable:
    require_zarr()
    import zarr

    if not path.is_dir():
        raise DataError(f"tokens: there is no folder {path}; write it with embed --tokens")
    group: Any = zarr.open_group(path, mode="r", zarr_format=3)
    x, names, facts = group[TOKENS], group[PATH], group.attrs.get(FACTS)
    if not isinstance(facts, dict):
        raise DataError(f"tokens: {path} is not complete: it states no facts; {CURE}")
    if (lost := x.nchunks - x.nchunks_initialized) or names.nchunks != names.nchunks_initialized:
        raise DataError(f"tokens: {path} is not complete: {lost} of {x.nchunks} chunks are missing; {CURE}")
    return TokenTable(str(path), tuple(map(str, names[:])), x, facts)


def _read_safetensors(path: Path) -> TokenTable:
    from safetensors import safe_open

    with safe_open(require_regular(path, "tokens"), "np") as file:
        metadata, x = file.metadata() or {}, file.get_tensor(TOKENS)
    return TokenTable(str(path), tuple(json.loads(metadata["paths"])), x, json.loads(metadata[FACTS]))


def require_zarr() -> None:
    """Raise ConfigError if zarr is not installed."""
    if importlib.util.find_spec("zarr") is None:
        raise ConfigError('tokens: .zarr needs zarr; pip install "upstep_fast[dense]", or write .safetensors')


def create_zarr(folder: Path, shape: Sequence[int], dtype: np.dtype, ranks: int = 1) -> None:
    """Create an empty store for tokens of `shape`, [N, H, W, D], with a chunk or more for each rank. Raises OSError."""
    import zarr
    from zarr.codecs import Crc32cCodec

    in_memory = CHUNK_BYTES // (int(np.prod(shape[1:])) * dtype.itemsize)
    chunk = max(1, min(in_memory, -(-shape[0] // ranks)))
    zarr.open_group(folder, mode="w", zarr_format=3).create_array(
        TOKENS,
        shape=tuple(shape),
        chunks=(chunk, *shape[1:]),
        dtype=dtype,
        compressors=[Crc32cCodec()],
        fill_value=np.nan,
        dimension_names=("image", "y", "x", "feature"),
    )


def tokens_array(folder: Path) -> Any:
    """Return the array of tokens of a store, to be written to."""
    import zarr

    return zarr.open_group(folder, mode="r+", zarr_format=3)[TOKENS]


def finish_zarr(folder: Path, parts: Sequence[tuple[int, int]], names: Sequence[str], facts: dict[str, Any]) -> None:
    """Close the gaps of unreadable images and write names and facts. Raises OSError.

    parts: (first row, number of rows) that each rank has written, in the order of the ranks.
    """
    import zarr

    x = tokens_array(folder)
    end, chunk = 0, x.chunks[0]
    for start, count in parts:
        for at in range(0, count if start != end else 0, chunk):
            num = min(chunk, count - at)
            x[end + at : end + at + num] = x[start + at : start + at + num]
        end += count
    x.resize((end, *x.shape[1:]))
    group = zarr.open_group(folder, mode="r+", zarr_format=3)
    array = group.create_array(PATH, shape=(end,), dtype="string", chunks=(max(1, min(end, 1 << 16)),))
    array[:] = np.array(names, dtype=object)
    group.attrs[FACTS] = facts


def write_safetensors(path: Path, x: np.ndarray, names: Sequence[str], facts: dict[str, Any]) -> None:
    """Write tokens [N, H, W, D] to one file, atomically. Raises OSError."""
    from safetensors.numpy import save

    metadata = {"paths": json.dumps(list(names)), FACTS: json.dumps(facts)}
    write_atomic(path, lambda file: file.write(save({TOKENS: x}, metadata)))
