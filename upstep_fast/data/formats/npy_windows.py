"""Windows of large .npy files, mapped into memory: arrays [H, W], [H, W, C] or [C, H, W]."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from upstep_fast.data.reading.regular import version_of
from upstep_fast.data.reading.stored import File, Layout, Piece, Stored
from upstep_fast.errors import BadImage

_MAX_BANDS = 64


def layout(file: File) -> Layout:
    """Return the size of an array; the shorter one of its first and last axis is that of the bands. Raises BadImage."""
    array = _mapped(file)
    if array.ndim == 2:
        return Layout("YX", array.shape, f"array of {array.dtype}")
    axes = "YXC" if array.shape[2] < array.shape[0] else "CYX"
    return Layout(axes, array.shape, f"array of {array.dtype}")


def read(file: File, piece: Piece) -> Stored:
    """Return a window of an array. Raises BadImage, OSError."""
    form = layout(file)
    top, left, height, width = form.window(piece)
    array = _mapped(file)
    array = array[None] if array.ndim == 2 else np.moveaxis(array, form.axes.index("C"), 0)
    values = np.array(array[:, top : top + height, left : left + width], array.dtype.newbyteorder("="))
    if values.dtype in (np.uint8, np.uint16):
        return Stored(values, 0, int(np.iinfo(values.dtype).max))
    return Stored(values)


def _mapped(file: File) -> np.ndarray:
    """Return the array without reading its values. Raises BadImage."""
    try:
        if isinstance(file, str):
            version_of(file)  # a regular file
            array: Any = np.lib.format.open_memmap(file, mode="r")
        else:
            array = _in_memory(file)
    except (ValueError, EOFError, SyntaxError, TypeError) as error:
        raise BadImage(f"a damaged .npy file: {str(error)[:120]}") from error
    if array.ndim not in (2, 3) or 0 in array.shape or array.dtype.kind not in "uif" or array.dtype.itemsize > 8:
        raise BadImage(f"an array of {array.dtype} of shape {array.shape}; use numbers, [H, W], [H, W, C] or [C, H, W]")
    if array.ndim == 3 and (array.shape[0] == array.shape[2] or min(array.shape[0], array.shape[2]) > _MAX_BANDS):
        raise BadImage(f"an array of shape {array.shape}: its band axis cannot be told; use TIFF")
    return array


def _in_memory(data: bytes | memoryview) -> np.ndarray:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = header(file)
    count = int(np.prod(shape, dtype=object))
    return np.frombuffer(data, dtype, count, file.tell()).reshape(shape, order="F" if fortran_order else "C")
