"""TIFFs: which reader gives a file's pixels as they are stored, and what no reader gives is refused by name.

    samples       unsigned, of 1, 2, 4, 8, 12 or 16 bits; above 8 the upper eight of the declared bits, below stretched
    photometric   white or black is zero, RGB, palette, CMYK, YCbCr, Lab
    bands         samples of one page, interleaved or planar, or gray pages of equal size
    alpha         associated: composited on white. Unassociated: left out, since GDAL tags any fourth band as such

Pillow reads most kinds, through libtiff. The rest goes to tifffile, among it what Pillow 13 reads wrongly: planar
16-bit samples without compression (low bytes, an error for gray), planar gray with alpha, planar Lab.
"""

from __future__ import annotations

import functools
import io
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upstep_fast.data.reading.intensity import gray_of
from upstep_fast.data.reading.tiff_header import MASK, THUMBNAIL, TiffPage, read_pages, stated_planes, stated_stack
from upstep_fast.errors import BadImage

log = logging.getLogger(__name__)
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, _PALETTE, _CMYK, _YCBCR, _LAB = 0, 1, 2, 3, 5, 6, 8
_NAMES = {_PALETTE: "palette", _CMYK: "CMYK", _YCBCR: "YCbCr", _LAB: "Lab"}
ASSOCIATED, UNASSOCIATED = 1, 2
_UNCOMPRESSED, _JPEG = 1, 7


@dataclass(frozen=True)
class TiffPlan:
    """How a TIFF is read."""

    page: TiffPage  # the first
    num_pages: int  # that are bands; 1: the bands are samples
    by_pillow: bool
    keep_alpha: bool  # composite on white; otherwise alpha is left out

    @property
    def num_bytes(self) -> int:
        """Memory that decoding takes at most: the file's samples, three copies of 8 bits."""
        page = self.page
        samples = page.width * page.height * page.samples * self.num_pages
        return samples * (max(1, page.bits[0] // 8) + 3)

    @property
    def inverted(self) -> bool:
        """Whether Pillow leaves 0 as white."""
        return self.page.photometric == WHITE_IS_ZERO and self.page.bits[0] > 8


def plan_tiff(data: bytes | memoryview, channels: int, max_pixels: int, *, any_numbers: bool = False) -> TiffPlan:
    """Return how a TIFF is read as `channels` bands. Raises BadImage, naming what cannot be read.

    any_numbers: signed, 32-bit and floating-point samples are read too, as values (tiff_values.py).
    """
    pages, description = read_pages(data)
    page = pages[0]
    _check_kind(page, max_pixels)
    if not (any_numbers and is_number(page)):
        _check_samples(page)
    bands = [other for other in pages if other.kind == page.kind] if _is_gray(page) and max(page.bits) > 1 else [page]
    stated = stated_planes(description) if _is_gray(page) else 0
    if stated > len(bands) and not description.startswith("ImageJ="):
        raise BadImage(f"one file of an OME-TIFF of {stated} planes in several files; join them, e.g. by Fiji")
    num_pages = max(len(bands), stated)
    if any(other.is_sparse for other in bands):
        raise BadImage("a sparse TIFF: some of its strips or tiles are not stored; write it again without SPARSE_OK")
    if num_pages > 1:
        _check_pages(num_pages, description, channels)
        return TiffPlan(page, num_pages, by_pillow=False, keep_alpha=False)
    return TiffPlan(page, 1, _pillow_reads(page, channels), keep_alpha=page.extra[:1] == (ASSOCIATED,))


def decode_tiff_bands(data: bytes | memoryview, plan: TiffPlan, channels: int, max_pixels: int) -> Tensor:
    """Decode by tifffile what Pillow does not: uint8 [channels, H, W], not turned.

    Raises BadImage, or tifffile's error for a broken file.
    """
    page = plan.page
    if page.photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB) or page.bits[0] not in (8, 16):
        raise BadImage(f"{_described(page)} is not read; convert it to 8-bit RGB or to .npy")
    array = read_bands(data, plan, channels * max_pixels)
    if array.dtype.itemsize == 2:
        array = array >> 8
    x = torch.from_numpy(np.ascontiguousarray(array, dtype=np.uint8))
    return _select(255 - x if page.photometric == WHITE_IS_ZERO else x, plan, channels)


def read_bands(data: bytes | memoryview, plan: TiffPlan, limit: int) -> np.ndarray:
    """Return all bands as stored, by tifffile, [bands, H, W]. limit: values of a tile.

    Raises BadImage, or tifffile's error for a broken file.
    """
    page = plan.page
    try:
        import tifffile
    except ImportError:
        raise BadImage(
            f"{_described(page)} needs the package tifffile: pip install 'upstep_fast[data]', or use .npy"
        ) from None
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            return _read_bands(file, len(data), plan, limit)
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise
        raise BadImage(
            f"{_described(page)}, compression {page.compression}, needs the package imagecodecs: "
            "pip install imagecodecs, or write it again without compression"
        ) from None


def _read_bands(file: Any, size: int, plan: TiffPlan, limit: int) -> np.ndarray:
    """Return all bands as stored, [bands, H, W]. size: of the file; limit: values of a tile. Raises BadImage."""
    page = plan.page
    stored = [p for p in file.pages if not int(p.subfiletype) & (THUMBNAIL | MASK)][: plan.num_pages]
    for part in stored:
        check_page(part, size, limit)
    if len(stored) == plan.num_pages:
        return np.concatenate([_planes(part, page) for part in stored])
    series = file.series[0]  # ImageJ: one page stands for all of a large stack
    if series.shape != (plan.num_pages, page.height, page.width):
        raise BadImage(f"truncated TIFF: {len(stored)} of {plan.num_pages} pages")
    return series.asarray(maxworkers=1)


def check_page(page: Any, size: int, limit: int) -> None:
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


def tiff_bits(data: bytes | memoryview) -> int:
    """Return the bits per sample of a TIFF, the most of all bands; 0 if it is broken."""
    try:
        return max(read_pages(data, max_pages=1)[0][0].bits)
    except BadImage:
        return 0


@functools.cache
def say_alpha_left_out() -> None:
    """Log, once a process, that unassociated alpha in a TIFF is no transparency here."""
    log.info("decode: TIFFs with a band tagged as unassociated alpha: colors are read as stored, not put on white")


def _check_kind(page: TiffPage, max_pixels: int) -> None:
    """Raise BadImage for a kind of page that cannot be read rightly."""
    if page.is_raw:
        raise BadImage("a raw photograph (DNG), of which only a thumbnail could be read; develop it to 16-bit TIFF")
    if page.width < 1 or page.height < 1 or page.depth != 1 or page.samples < 1 or not page.bits:
        raise BadImage(f"a TIFF of {page.width} x {page.height} x {page.depth} pixels and {page.samples} bands")
    if page.subfile & THUMBNAIL:
        raise BadImage("a TIFF whose first page is a thumbnail; write the picture itself as the first page")
    if page.width * page.height > max_pixels:
        raise BadImage(f"{page.width} x {page.height} pixels, above the limit of {max_pixels}; give --tiles 224")
    if page.tile > max_pixels:
        raise BadImage(f"its tiles are of {page.tile} pixels, above the limit of {max_pixels}")


def is_number(page: TiffPage) -> bool:
    """Return whether all samples are of one signed, unsigned or floating-point type that numpy has."""
    kind, bits = page.formats[0], page.bits[0]
    known = {1: (8, 16, 32, 64), 2: (8, 16, 32, 64), 3: (16, 32, 64), 4: (8, 16, 32, 64)}.get(kind, ())
    return len(set(page.formats)) == 1 and len(set(page.bits)) == 1 and bits in known


def _check_samples(page: TiffPage) -> None:
    """Raise BadImage unless the samples are unsigned and of a number of bits that is read."""
    bits = page.bits[0]
    formats = [kind for kind in page.formats if kind not in (1, 4)]  # 4, undefined, is taken as unsigned
    if formats or bits > 16:
        name = {2: "int", 3: "float"}.get(formats[0], "complex") if formats else "uint"
        why = {"int": "signed", "float": "floating-point"}.get(name, f"{bits}-bit")
        raise BadImage(f"an array of {name}{bits}: {why} pixels have no defined range; give --intensity range:LO,HI")
    if len(set(page.bits)) > 1 or bits not in (1, 2, 4, 8, 12, 16):
        raise BadImage(f"samples of {', '.join(map(str, page.bits))} bits; convert it to 8 or 16 bits")


def _check_pages(pages: int, description: str, channels: int) -> None:
    """Raise BadImage unless gray pages can be bands: those of a stack are only by an explicit --in-chans above 3."""
    stack = stated_stack(description)
    if stack and channels in (1, 3):
        raise BadImage(
            f"a stack of {stack}, no channels; write each to a file of its own, its channels to .npy, "
            "or read it with --slice all"
        )
    if pages != channels and channels in (1, 3):
        raise BadImage(
            f"a TIFF of {pages} bands (gray pages), {channels} were asked for; "
            f"give --in-chans {pages}, --axes ZYX if they are slices, or keep one page"
        )
    _check_bands(pages, channels)
    if channels == 3 and stated_planes(description) < 2:
        _say_pages_are_bands()


@functools.cache
def _say_pages_are_bands() -> None:
    """Log, once a process, that three gray pages are read as red, green and blue."""
    log.info("decode: TIFFs of three gray pages: the pages are read as red, green and blue; keep one page to read it")


def _check_bands(bands: int, channels: int) -> None:
    if bands not in (1, channels):
        raise BadImage(
            f"a TIFF of {bands} bands, {channels} were asked for; give --in-chans {bands}"
            if channels in (1, 3)
            else f"a TIFF of {bands} bands; {channels} channels were asked for"
        )


def _is_gray(page: TiffPage) -> bool:
    return page.samples == 1 and page.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO)


def _pillow_reads(page: TiffPage, channels: int) -> bool:
    """Return whether Pillow gives the bands asked for rightly. Raises BadImage if the file does not have them."""
    readable = not (page.big and page.order == ">")
    if _is_gray(page):
        bits, inverted = page.bits[0], page.photometric == WHITE_IS_ZERO
        # what Pillow reads in little-endian order only: 12 bits, and 16 bits with white as zero
        stumbles = bits == 16 and page.stated_planar == 2 and page.compression == _UNCOMPRESSED
        return readable and not stumbles and (bits <= 8 or page.order == "<" or (bits == 16 and not inverted))
    if page.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO):
        if page.samples == 2 and page.extra[:1] in ((ASSOCIATED,), (UNASSOCIATED,)) and channels in (1, 3):
            return readable and page.planar == 1 and page.bits[0] == 8 and page.extra == (UNASSOCIATED,)
        _check_bands(page.samples, channels)
        return False
    reads = _reads_rgb if page.photometric == RGB else _reads_other
    return reads(page, channels, readable)


def _reads_rgb(page: TiffPage, channels: int, readable: bool) -> bool:
    if page.samples < 3 or channels not in (1, 3, page.samples):
        _check_bands(page.samples, channels)
    is_planar = page.planar == 2
    if channels not in (1, 3):
        return readable and not is_planar and page.extra == (UNASSOCIATED,) and page.samples == 4
    right_planes = page.samples == 3 and (page.bits[0] == 8 or page.compression != _UNCOMPRESSED)
    return readable and (right_planes if is_planar else True)


def _reads_other(page: TiffPage, channels: int, readable: bool) -> bool:
    if page.photometric not in _NAMES:
        raise BadImage(f"a TIFF of photometric interpretation {page.photometric}; convert it to RGB")
    if channels not in (1, 3):
        raise BadImage(f"a TIFF of {_NAMES[page.photometric]} pixels; {channels} channels were asked for")
    planar, bits = page.planar == 2, page.bits[0]
    is_right = {
        _PALETTE: bits <= 8 and not planar,
        _CMYK: page.ink_set == 1 and (not planar or (page.samples == 4 and (bits == 8 or page.compression != 1))),
        _YCBCR: page.compression == _JPEG or (not planar and page.subsampling == (1, 1)),
        _LAB: bits == 8 and not planar,
    }[page.photometric]
    if not (is_right and readable):
        raise BadImage(f"{_described(page)} is not read; convert it to RGB")
    return True


def _described(page: TiffPage) -> str:
    name = {WHITE_IS_ZERO: "gray", BLACK_IS_ZERO: "gray", RGB: "RGB", **_NAMES}[page.photometric]
    return f"{page.bits[0]}-bit {'planar ' if page.planar == 2 else ''}{name}{' of ' + str(page.samples) + ' samples'}"


def _planes(part: Any, page: TiffPage) -> np.ndarray:
    """Return one page's samples, [samples, H, W]."""
    array = part.asarray(maxworkers=1)
    shape = (page.samples, page.height, page.width)
    if page.planar == 1:
        array = np.moveaxis(array.reshape(page.height, page.width, page.samples), -1, 0)
    return array.reshape(shape)


def _select(x: Tensor, plan: TiffPlan, channels: int) -> Tensor:
    """Return the channels asked for out of all bands, uint8 [bands, H, W]."""
    if len(x) == channels:
        return x
    if len(x) == 1:
        return x.expand(channels, -1, -1)
    count = 3 if plan.page.photometric == RGB else 1
    colors = x[:count]
    if plan.keep_alpha:  # colors are multiplied by alpha already
        colors = (colors.int() + 255 - x[count].int()).clamp(0, 255).to(torch.uint8)
    elif plan.page.extra[:1] == (UNASSOCIATED,):
        say_alpha_left_out()
    return gray_of(colors) if channels == 1 and count == 3 else colors.expand(channels, -1, -1)
