"""Images that are in memory already, PIL's or arrays, as the uint8 [C, H, W] that `decode` gives of files."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from upstep_fast.data.decode.image import from_pillow
from upstep_fast.data.reading.out_of_memory import is_out_of_memory
from upstep_fast.errors import BadImage

_BY_PILLOW = (1, 3, 4)  # bands: gray, RGB, RGBA


def pixels_of(image: Any, channels: int = 3) -> Tensor:
    """Return an image as uint8 [channels, H, W].

    image: a PIL image, or an array [H, W, C] or [H, W] of uint8, of uint16 (the high byte is kept, as of files), or of
    floating-point values in 0..1, which are rounded to 8 bits. Gray, alpha and orientation as of files (`decode`).
    Raises BadImage.
    """
    if isinstance(image, Image.Image):
        return _converted(image, channels)
    if not isinstance(image, np.ndarray):
        raise BadImage(f"a {type(image).__name__} is no image; give a path, a PIL image or an array [H, W, C]")
    x = _as_bytes(image)
    bands = 1 if x.ndim == 2 else x.shape[2] if x.ndim == 3 else 0
    if bands == 0 or x.size == 0:
        raise BadImage(f"an array of shape {image.shape}; an image is [H, W, C] or [H, W]")
    if bands == channels:
        return torch.from_numpy(np.array(x.reshape(*x.shape[:2], bands))).permute(2, 0, 1)
    if bands in _BY_PILLOW and channels in _BY_PILLOW:
        return _converted(
            Image.fromarray(np.ascontiguousarray(x[..., 0] if x.ndim == 3 and bands == 1 else x)), channels
        )
    hint = "; [C, H, W] is read as [H, W, C]: transpose it" if x.shape[0] == channels else ""
    raise BadImage(f"an array of shape {image.shape}; the model takes {channels} channels{hint}")


def _converted(image: Image.Image, channels: int) -> Tensor:
    try:
        image.load()
        return from_pillow(image, channels)
    except BadImage:
        raise
    except Exception as error:  # a file that PIL opened is decoded only now: OSError, SyntaxError and others
        if is_out_of_memory(error):
            raise MemoryError("out of memory") from error
        raise BadImage(f"cannot be decoded: {type(error).__name__}: {str(error)[:120]}".replace("\n", " ")) from error


def _as_bytes(x: np.ndarray) -> np.ndarray:
    if x.dtype == np.uint8:
        return x
    if x.dtype == np.uint16:
        return (x >> 8).astype(np.uint8)
    if x.dtype.kind != "f":
        raise BadImage(f"an array of {x.dtype}; give uint8, or floating-point values in 0..1")
    if not (np.isfinite(x).all() and (x.size == 0 or (x.min() >= 0 and x.max() <= 1))):
        raise BadImage("floating-point values outside 0..1; divide by the largest possible value, or give uint8")
    return np.rint(x * 255).astype(np.uint8)
