"""Images in .npy files: arrays [H, W], [H, W, C] or [C, H, W] of integers or floating-point numbers."""

from __future__ import annotations

import io

import numpy as np

from upstep_fast.config.reading import Reading
from upstep_fast.data.reading.stored import Stored, Values
from upstep_fast.errors import BadImage

NPY = b"\x93NUMPY"


def plan_npy(data: bytes | memoryview, channels: int, max_pixels: int, reading: Reading) -> Values:
    """Return how the values of a .npy file are read. Raises BadImage, or numpy's error for a broken header.

    The declared range is that of uint8 or uint16; other types have none.
    """
    file = io.BytesIO(data)
    shape, fortran_order, dtype = npy_header(file)
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        raise BadImage(f"an array of {dtype}; convert it to uint8, uint16 or float32")
    axis = _band_axis(shape, channels, reading)
    count = int(np.prod(shape, dtype=object))
    if count > max_pixels * (1 if axis is None else shape[axis]):
        raise BadImage(f"{count} values, above the limit of {max_pixels} pixels")
    size = len(data) - file.tell()
    if size != count * dtype.itemsize:
        raise BadImage(f"{'truncated' if size < count * dtype.itemsize else 'damaged'}: {size} bytes of {count} values")
    start = file.tell()

    def read() -> Stored:
        array = np.frombuffer(data, dtype, count, start).reshape(shape, order="F" if fortran_order else "C")
        array = array[None] if axis is None else np.moveaxis(array, axis, 0)
        return stored_array(np.array(array, dtype.newbyteorder("=")))

    return Values(3 * len(data), read)


def stored_array(values: np.ndarray) -> Stored:
    """Return values [bands, H, W] with the range that their type declares: that of uint8 and uint16, else none."""
    if values.dtype in (np.uint8, np.uint16):
        return Stored(values, 0, int(np.iinfo(values.dtype).max))
    return Stored(values)


def npy_header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, whether the order is Fortran's, and dtype of a .npy file; leaves `file` at its first value."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _band_axis(shape: tuple[int, ...], channels: int, reading: Reading) -> int | None:
    """Return the axis of the bands, None for [H, W]. Raises BadImage for what is no image of `channels` bands."""
    if len(shape) not in (2, 3) or 0 in shape:
        raise BadImage(f"an array of shape {shape}; use [H, W], [H, W, C] or [C, H, W]")
    if reading.axes is not None:
        return _named_axis(shape, reading.axes)
    if len(shape) == 2:
        return None
    if reading.bands and shape[0] != shape[2]:
        return 0 if shape[0] < shape[2] else 2
    for bands in (channels, 1, 3) if channels == 1 else (channels, 1):
        axes = [axis for axis in (2, 0) if shape[axis] == bands]
        if len(axes) == 2 and shape[1] > 1:
            raise BadImage(
                f"an array of shape {shape}: [H, W, C] and [C, H, W] cannot be told apart; give --axes YXC or CYX"
            )
        if axes:
            return axes[0]
    raise BadImage(f"an array of shape {shape}; {channels} channels were asked for")


def _named_axis(shape: tuple[int, ...], axes: str) -> int | None:
    if axes not in ("YX", "YXC", "CYX") or len(axes) != len(shape):
        raise BadImage(f"an array of shape {shape}; --axes {axes} does not fit, use YX, YXC or CYX")
    return axes.find("C") if "C" in axes else None
