"""Images in .npy files: uint8, or uint16 of which the high byte is kept; [H, W], [H, W, C] or [C, H, W]."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor

from upstep_fast.data.decode.tiff import gray_of
from upstep_fast.errors import BadImage

NPY = b"\x93NUMPY"


def decode_npy(data: bytes | memoryview, channels: int, max_pixels: int) -> Tensor:
    """Decode a .npy file: uint8 [channels, H, W]. Raises BadImage, or numpy's error for a broken header.

    Arrays of `channels` bands are taken as they are, gray ones are repeated, and RGB becomes gray for one channel.
    """
    file = io.BytesIO(data)
    shape, fortran_order, dtype = npy_header(file)
    axis = _band_axis(shape, dtype, channels)
    count = int(np.prod(shape, dtype=object))
    if count > max_pixels * (1 if axis is None else shape[axis]):
        raise BadImage(f"{count} values, above the limit of {max_pixels} pixels")
    size = len(data) - file.tell()
    if size != count * dtype.itemsize:
        raise BadImage(f"{'truncated' if size < count * dtype.itemsize else 'damaged'}: {size} bytes of {count} values")
    array = np.frombuffer(data, dtype, count, file.tell()).reshape(shape, order="F" if fortran_order else "C")
    x = torch.from_numpy((array >> 8).astype(np.uint8) if dtype.itemsize == 2 else np.array(array))
    x = x[None] if axis is None else x.permute(2, 0, 1) if axis == 2 else x
    if len(x) == channels:
        return x
    return gray_of(x) if len(x) == 3 else x.expand(channels, -1, -1)


def npy_header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, whether the order is Fortran's, and dtype of a .npy file; leaves `file` at its first value."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _band_axis(shape: tuple[int, ...], dtype: np.dtype, channels: int) -> int | None:
    """Return the axis of the bands, None for [H, W]. Raises BadImage for what is no image of `channels` bands."""
    if dtype.kind != "u" or dtype.itemsize > 2:
        raise BadImage(f"an array of {dtype}; convert it to uint8 or uint16")
    if len(shape) not in (2, 3) or 0 in shape:
        raise BadImage(f"an array of shape {shape}; use [H, W], [H, W, C] or [C, H, W]")
    if len(shape) == 2:
        return None
    for bands in (channels, 1, 3) if channels == 1 else (channels, 1):
        axes = [axis for axis in (2, 0) if shape[axis] == bands]
        if len(axes) == 2 and shape[1] > 1:
            raise BadImage(f"an array of shape {shape}: [H, W, C] and [C, H, W] cannot be told apart; use TIFF")
        if axes:
            return axes[0]
    raise BadImage(f"an array of shape {shape}; {channels} channels were asked for")
