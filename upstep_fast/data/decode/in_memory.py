"""Images that are in memory already, PIL's or arrays, as the uint8 [C, H, W] that `decode` gives of files."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from upstep_fast.config.reading import AS_STORED, Reading
from upstep_fast.data.decode.arrays import stored_array
from upstep_fast.data.decode.image import from_pillow
from upstep_fast.data.reading.intensity import to_bytes, to_pixels
from upstep_fast.data.reading.orientation import orientation_of, upright
from upstep_fast.data.reading.out_of_memory import error_of_library
from upstep_fast.data.reading.stored import Stored
from upstep_fast.errors import BadImage

_BY_PILLOW = (1, 3, 4)  # bands: gray, RGB, RGBA


def pixels_of(image: Any, channels: int = 3, reading: Reading = AS_STORED) -> Tensor:
    """Return an image as uint8 [channels, H, W].

    image: a PIL image, or an array [H, W, C] or [H, W] of integers, mapped as those of files (reading/intensity.py:
    uint16 by its high byte without a measured range), or of floating-point values: in 0..1, which are rounded to
    8 bits, or of any range that `reading` gives. Gray, alpha and orientation as of files (`decode`). Raises BadImage.
    """
    if isinstance(image, Image.Image):
        return _of_pillow(image, channels, reading)
    if not isinstance(image, np.ndarray):
        raise BadImage(f"a {type(image).__name__} is no image; give a path, a PIL image or an array [H, W, C]")
    bands = 1 if image.ndim == 2 else image.shape[2] if image.ndim == 3 else 0
    if bands == 0 or image.size == 0:
        raise BadImage(f"an array of shape {image.shape}; an image is [H, W, C] or [H, W]")
    values = np.moveaxis(image.reshape(*image.shape[:2], bands), -1, 0)
    if reading.bands:
        return to_pixels(_stored(values, reading), reading, channels)
    x = to_bytes(_stored(values, reading), reading.intensity)
    if bands == channels:
        return x
    if bands in _BY_PILLOW and channels in _BY_PILLOW:
        array = np.ascontiguousarray(x[0] if bands == 1 else x.permute(1, 2, 0).numpy())
        return _converted(Image.fromarray(array), channels)
    hint = "; [C, H, W] is read as [H, W, C]: transpose it" if image.shape[0] == channels else ""
    raise BadImage(f"an array of shape {image.shape}; the model takes {channels} channels{hint}")


def _of_pillow(image: Image.Image, channels: int, reading: Reading) -> Tensor:
    ranges = reading.intensity.ranges
    if ranges and image.mode[0] in "IF":  # 16 or 32 bits, gray
        stored = stored_array(np.array(image)[None])
        return upright(to_pixels(stored, reading, channels), orientation_of(image))
    if reading.keeps_photographs:
        return _converted(image, channels)
    pixels = _converted(image, max(3, *reading.bands) if reading.bands else channels)
    return to_pixels(Stored(pixels.numpy(), 0, 255), reading, channels)


def _converted(image: Image.Image, channels: int) -> Tensor:
    try:
        image.load()
        return from_pillow(image, channels)
    except BadImage:
        raise
    except Exception as error:  # a file that PIL opened is decoded only now: OSError, SyntaxError and others
        raise error_of_library(error, "cannot be decoded") from error


def _stored(values: np.ndarray, reading: Reading) -> Stored:
    """Return values with the range of their type; that of floating-point ones is 0 to 1 without a range to map by."""
    needs_range = values.dtype.kind in "ui" and values.dtype not in (np.uint8, np.uint16)
    if values.dtype.kind not in "uif" or (needs_range and not reading.intensity.ranges):
        raise BadImage(f"an array of {values.dtype}; give uint8, or floating-point values in 0..1")
    if values.dtype.kind != "f" or reading.intensity.ranges:
        return stored_array(np.array(values, values.dtype.newbyteorder("=")))
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise BadImage(
            "floating-point values outside 0..1; divide by the largest possible value, or give a range of intensity"
        )
    return Stored(values, 0, 1)
