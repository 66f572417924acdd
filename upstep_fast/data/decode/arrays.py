"""Images with any number of bands: .npy files, and through tifffile the TIFFs that Pillow cannot read.

uint8, or uint16 of which the high byte is kept; [H, W], [H, W, C] or [C, H, W]. A TIFF's bands may be samples of one
page, interleaved or planar, or pages of their own. Compressions other than deflate and LZMA need imagecodecs.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import TiffImagePlugin
from torch import Tensor

from upstep_fast.errors import BadImage

NPY = b"\x93NUMPY"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
BITS_PER_SAMPLE, SAMPLES_PER_PIXEL, EXTRA_SAMPLES, ALPHA = 258, 277, 338, (1, 2)


def decode_npy(data: bytes | memoryview, channels: int, max_pixels: int) -> Tensor:
    """Decode a .npy file: uint8 [channels, H, W]. Raises BadImage, or numpy's error for a broken header."""
    file = io.BytesIO(data)
    shape, fortran_order, dtype = npy_header(file)
    _check(shape, dtype, channels, max_pixels)
    count = int(np.prod(shape, dtype=object))
    values = np.frombuffer(data, dtype=dtype, offset=file.tell())
    if len(values) != count:
        raise BadImage(f"truncated: {len(values)} of {count} values")
    return _to_tensor(values.reshape(shape, order="F" if fortran_order else "C"), channels)


def npy_header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, whether the order is Fortran's, and dtype of a .npy file; leaves `file` at its first value."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def decode_tiff_bands(data: bytes | memoryview, channels: int, max_pixels: int) -> Tensor:
    """Decode the first series of a TIFF, bands as stored: uint8 [channels, H, W].

    Raises BadImage, or tifffile's error for a broken file.
    """
    try:
        import tifffile
    except ImportError:
        raise BadImage(
            f"a TIFF of {channels} bands needs the package tifffile: pip install 'upstep_fast[data]', or use .npy"
        ) from None
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series: Any = file.series[0]
        _check(series.shape, np.dtype(series.dtype), channels, max_pixels)
        for page in series.pages:
            _check_page(page, len(data), channels * max_pixels)
        return _to_tensor(series.asarray(maxworkers=1), channels)


def tiff_bands(data: bytes | memoryview) -> tuple[int, bool]:
    """Return a TIFF's samples per pixel, and whether one of them is transparency; (0, False) if it is broken."""
    tags = _tags(data)
    return int(tags.get(SAMPLES_PER_PIXEL, (0,))[0]), any(kind in ALPHA for kind in tags.get(EXTRA_SAMPLES, ()))


def tiff_bits(data: bytes | memoryview) -> int:
    """Return the bits per sample of a TIFF, the most of all bands; 0 if it is broken."""
    return max(_tags(data).get(BITS_PER_SAMPLE, (0,)))


def _tags(data: bytes | memoryview) -> dict[int, tuple[int, ...]]:
    try:
        file = io.BytesIO(data)
        directory = TiffImagePlugin.ImageFileDirectory_v2(file.read(8) + (file.read(8) if data[2] == 43 else b""))
        file.seek(directory.next)
        directory.load(file)
        defaults = {SAMPLES_PER_PIXEL: 1, BITS_PER_SAMPLE: 1, EXTRA_SAMPLES: ()}
        values = {tag: directory.get(tag, default) for tag, default in defaults.items()}
        return {tag: value if isinstance(value, tuple) else (value,) for tag, value in values.items()}
    except Exception:  # Pillow raises many kinds on a broken directory
        return {}


def _check(shape: tuple[int, ...], dtype: np.dtype, channels: int, max_pixels: int) -> None:
    if dtype.kind != "u" or dtype.itemsize > 2:
        raise BadImage(f"an array of {dtype}; convert it to uint8 or uint16")
    if len(shape) not in (2, 3) or 0 in shape:
        raise BadImage(f"an array of shape {shape}; use [H, W], [H, W, C] or [C, H, W]")
    if len(shape) == 3 and channels not in (shape[0], shape[2]):
        raise BadImage(f"an array of shape {shape}; {channels} channels were asked for")
    count = int(np.prod(shape, dtype=object))
    if count > max_pixels * channels:
        raise BadImage(f"{count} values, above the limit of {max_pixels} pixels")


def _check_page(page: Any, size: int, limit: int) -> None:
    """Raise BadImage if a strip or tile of a page lies outside the file or unpacks to more than `limit` values."""
    if page is None:
        raise BadImage("truncated TIFF: a page is missing")
    if int(np.prod(page.chunks, dtype=object)) > limit:
        raise BadImage(f"its tiles are of {page.chunks} values, above the limit of {limit}")
    chunks = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    if len(chunks) != int(np.prod(page.chunked, dtype=object)) or any(
        count <= 0 or offset + count > size for offset, count in chunks
    ):
        raise BadImage("truncated TIFF: its data ends before its last pixel")


def _to_tensor(array: np.ndarray, channels: int) -> Tensor:
    array = (array >> 8).astype(np.uint8) if array.dtype.itemsize == 2 else np.array(array)
    x = torch.from_numpy(array)
    if x.ndim == 2:
        return x[None].expand(channels, -1, -1)
    return x.permute(2, 0, 1) if x.shape[2] == channels else x
