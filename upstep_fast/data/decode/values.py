"""Values of images of more than 8 bits as their files store them, for the maps of --intensity.

    PNG, 16 bits         torchvision's decoder: of colors, Pillow keeps the high byte only
    TIFF                 above 8 bits, signed or floating point (tiff_values.py)
    PNM above 255        as stored: Pillow stretches them to 65535, colors to 255 (pnm.py)
    .npy                 any number type (arrays.py)

Alpha and a transparent gray level are composited on white, the largest value; with chosen bands alpha is one of them.
"""

from __future__ import annotations

import importlib
import io

import numpy as np
import torch
from PIL import Image

from upstep_fast.config.reading import Reading
from upstep_fast.data.decode import png, pnm
from upstep_fast.data.decode.arrays import NPY, plan_npy
from upstep_fast.data.decode.tiff_values import plan_tiff_values
from upstep_fast.data.reading.orientation import orientation_of, upright_array
from upstep_fast.data.reading.stored import Stored, Values
from upstep_fast.data.reading.tiff_header import TIFF, read_pages
from upstep_fast.errors import BadImage

START = 26  # bytes of a file that tell whether it may hold more than 8 bits
_WHITE = 0xFFFF  # of 16 bits
_EXIF_MARKS = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # of a PNG
_BYTES_PER_PIXEL = 40  # four samples of 16 bits, and 32 bits each while alpha is composited
_COLORS = {0: 1, 2: 3, 4: 1, 6: 3}  # PNG's color type -> samples besides alpha


def plan_values(data: bytes | memoryview, channels: int, max_pixels: int, reading: Reading) -> Values | None:
    """Return how an image's values are read; None for images of 8 bits and less but .npy files.

    They are upright, as bands that make `channels`, or all bands where the user chose some. Raises BadImage for a
    header that says no image.
    """
    start = bytes(data[:START])
    if not may_be_deep(start):
        return None
    if start.startswith(NPY):
        return plan_npy(data, channels, max_pixels, reading)
    if start[:4] in TIFF:
        return plan_tiff_values(data, channels, max_pixels, reading)
    if start.startswith(png.SIGNATURE):
        return _plan_png(data, channels, max_pixels, reading)
    return pnm.plan_pnm(data, max_pixels)


def may_be_deep(start: bytes) -> bool:
    """Return whether a file that starts with these START bytes may hold more than 8 bits."""
    if start.startswith(png.SIGNATURE):
        return start[24:25] == b"\x10"
    return start.startswith(NPY) or start[:4] in TIFF or start[:2] in pnm.KINDS


def bands_of(data: bytes | memoryview, reading: Reading) -> int:
    """Return the number of bands of an image of 8 bits: alpha is one where the user chose it."""
    if bytes(data[:4]) in TIFF:
        pages, _ = read_pages(data)
        return pages[0].samples if pages[0].samples > 1 else len(pages)
    with Image.open(io.BytesIO(data)) as image:
        count = {"1": 1, "L": 1, "LA": 4, "PA": 4, "RGBA": 4}.get(image.mode, 3)
    return min(count, max(3, *reading.bands))


def _plan_png(data: bytes | memoryview, channels: int, max_pixels: int, reading: Reading) -> Values:
    png.check(data)
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise BadImage(f"{width} x {height} pixels, above the limit of {max_pixels}")
        if "transparency" in image.info:
            png.scale_transparent_color(data, image)  # refuses what is ambiguous
        # asked for EXIF, Pillow decodes the picture to look behind it
        has_exif = any(mark in bytes(data) for mark in _EXIF_MARKS)
        orientation, clear = orientation_of(image) if has_exif else 1, image.info.get("transparency")
    count = _COLORS[data[25]]

    def read() -> Stored:
        values = _samples(data)
        if clear is not None and len(values) == count:
            values = np.where(values == clear, np.uint16(_WHITE), values)
        if len(values) > count and not reading.bands and len(values) != channels:
            values = _on_white(values[:count], values[count:])
        return Stored(upright_array(values, orientation), 0, _WHITE)

    return Values(_BYTES_PER_PIXEL * width * height, read)


def _samples(data: bytes | memoryview) -> np.ndarray:
    """Return the samples of a 16-bit PNG, uint16 [C, H, W]."""
    importlib.import_module("torchvision.io")  # registers the op
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return np.asarray(torch.ops.image.decode_png(encoded, 0, False).numpy())  # 0: as stored


def _on_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composite uint16 [C, H, W] on white by alpha [1, H, W]: (c a + w (w - a)) / w, rounded; fits in 32 bits."""
    c, a, white = colors.astype(np.uint32), alpha.astype(np.uint32), np.uint32(_WHITE)
    return ((c * a + white * (white - a) + white // np.uint32(2)) // white).astype(np.uint16)
