"""Values of TIFFs above 8 bits, signed and floating-point ones too, and of those that name a value for nodata.

Gray and RGB are read, by tifffile or, where it reads 16-bit gray alike, by Pillow; of palettes, CMYK, YCbCr and Lab
there are no values but the 8-bit pixels that `decode` makes. White as zero is left as stored and marked as inverted.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from upstep_fast.config.reading import Reading
from upstep_fast.data.decode.tiff import (
    ASSOCIATED,
    BLACK_IS_ZERO,
    RGB,
    UNASSOCIATED,
    WHITE_IS_ZERO,
    TiffPlan,
    plan_tiff,
    read_bands,
    say_alpha_left_out,
)
from upstep_fast.data.reading.nodata import masked, nodata_masks
from upstep_fast.data.reading.orientation import upright_array
from upstep_fast.data.reading.stored import Stored, Values
from upstep_fast.data.reading.tiff_header import TIFF, TiffPage, is_special, read_pages


def plan_tiff_values(data: bytes | memoryview, channels: int, max_pixels: int, reading: Reading) -> Values | None:
    """Return how a TIFF's values are read, upright; None for 8 bits. Raises BadImage.

    They are bands that make `channels`, or all bands where the user chose some.
    """
    pages, _ = read_pages(data)
    page = pages[0]
    if not _is_deep(page):
        return None
    if reading.bands:
        channels = page.samples if page.samples > 1 else len(pages)
    plan = plan_tiff(data, channels, max_pixels, any_numbers=True)
    high = (1 << page.bits[0]) - 1 if _is_unsigned(page) else None

    def read() -> Stored:
        values = _stored(data, plan, channels * max_pixels)
        if not reading.bands:
            values = _selected(values, plan, channels, high)
        low = None if high is None else 0
        values, valid = masked(values, nodata_masks(values, page.nodata))
        return Stored(values, low, high, valid, inverted=page.photometric == WHITE_IS_ZERO)

    return Values(plan.num_bytes, read)


def _is_deep(page: TiffPage) -> bool:
    is_plain = page.bits and max(page.bits) <= 8 and all(kind in (1, 4) for kind in page.formats)
    is_mapped = bool(page.nodata) or (page.photometric == WHITE_IS_ZERO and page.samples == 1)  # as stored, not turned
    has_values = not is_plain or (is_mapped and set(page.bits) == {8})
    return bool(has_values) and page.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB)


def has_nodata(data: bytes | memoryview) -> bool:
    """Return whether content is a TIFF whose values are needed, as one of them means nodata."""
    if bytes(data[:4]) not in TIFF or not is_special(data):
        return False
    page = read_pages(data, max_pages=1)[0][0]
    return bool(page.nodata) and _is_deep(page)


def _is_unsigned(page: TiffPage) -> bool:
    """Return whether samples are of 1 to 16 bits without a sign, whose range is declared."""
    return page.formats[0] in (1, 4) and page.bits[0] <= 16


def _stored(data: bytes | memoryview, plan: TiffPlan, limit: int) -> np.ndarray:
    """Return all bands, [bands, H, W], upright, in native byte order."""
    page = plan.page
    turned = page.photometric == WHITE_IS_ZERO and page.bits[0] == 8  # by Pillow
    is_gray = (page.photometric == BLACK_IS_ZERO or turned) and page.samples == 1 and _is_unsigned(page)
    is_color = page.photometric == RGB and page.bits[0] == 8
    if plan.by_pillow and (is_gray or is_color):
        with Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
            image.load()  # and turns it
            values = np.asarray(image).reshape(image.height, image.width, -1)
            values = 255 - values if turned else values
            return np.moveaxis(values, -1, 0).astype(np.uint8 if page.bits[0] == 8 else np.uint16)
    values = read_bands(data, plan, limit)
    return upright_array(np.ascontiguousarray(values, values.dtype.newbyteorder("=")), page.orientation)


def _selected(values: np.ndarray, plan: TiffPlan, channels: int, high: int | None) -> np.ndarray:
    """Return colors without alpha, on white where it is associated; all bands where they are as many as asked for."""
    if len(values) in (1, channels):
        return values
    count = 3 if plan.page.photometric == RGB else 1
    colors, extra = values[:count], plan.page.extra[:1]
    if extra == (ASSOCIATED,) and high is not None:  # colors are multiplied by alpha already
        colors = np.minimum(colors.astype(np.uint32) + (high - values[count].astype(np.uint32)), high)
        colors = colors.astype(values.dtype)
    elif extra in ((ASSOCIATED,), (UNASSOCIATED,)):
        say_alpha_left_out()
    return colors
