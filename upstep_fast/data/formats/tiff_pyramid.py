"""Headers of large TIFFs by tifffile: the levels of the first picture, and where the segments of each lie.

A segment is a strip or a tile. What a page says is copied out of tifffile's objects, so that a file of 150,000 segments
takes 3 MB and no handle stays open.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from upstep_fast.data.formats.tiff_levels import levels_of, micrometers_per_pixel
from upstep_fast.data.reading.out_of_memory import error_of_library
from upstep_fast.data.reading.recent import Recent
from upstep_fast.data.reading.regular import kept_header
from upstep_fast.data.reading.stored import File
from upstep_fast.errors import BadImage

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
APERIO_YCBCR = 33003  # compression: JPEG 2000 of YCbCr
_JPEG = (6, 7, 34892, 33007)
_NAMES = {PALETTE: "palette colors", CMYK: "CMYK", YCBCR: "YCbCr that is not JPEG", 8: "Lab"}
_ORIENTATION, _NODATA = 274, 42113  # tags
_MAX_SEGMENT = 1 << 28  # values of one strip or tile
_files = Recent(256 << 20)


@dataclass(frozen=True, eq=False)
class Level:
    """One picture of a file: where its segments lie and how they are decoded."""

    height: int  # as stored
    width: int
    samples: int
    dtype: np.dtype
    bits: int
    segment: tuple[int, int]  # height, width
    planar: bool  # one segment per sample
    offsets: np.ndarray  # [N] int64
    counts: np.ndarray  # [N] int64, 0: not stored
    decode: Callable[..., Any]
    tables: bytes | None
    is_plain: bool  # rows lie in a segment as they are
    order: Literal["<", ">"]  # of bytes
    is_sparse: bool  # some segments are not stored

    @cached_property
    def across(self) -> int:
        """Segments beside each other."""
        return math.ceil(self.width / self.segment[1])

    @cached_property
    def per_plane(self) -> int:
        """Segments of a plane, or of all samples where they are interleaved."""
        return self.across * math.ceil(self.height / self.segment[0])


@dataclass(frozen=True, eq=False)
class Pyramid:
    """First picture of a file, with its levels."""

    levels: tuple[Level, ...]
    photometric: int
    compression: int
    orientation: int
    extra: tuple[int, ...]
    colors: np.ndarray | None  # [3, N] uint16, of a palette
    nodata: float | None
    what: str
    mpp: float | None


def open_pyramid(file: File) -> Pyramid:
    """Return the levels of a TIFF's first picture, from its header. Raises BadImage, OSError, MemoryError."""
    return kept_header(_files, file, _parsed, lambda opened: sum(16 * len(x.offsets) + 10_000 for x in opened.levels))


def _parsed(file: str | io.BytesIO, size: int) -> Pyramid:
    try:
        import tifffile
    except ImportError:
        raise BadImage("tiles of TIFFs and slides need tifffile: pip install 'upstep_fast[microscopy]'") from None
    try:
        with tifffile.TiffFile(file) as tiff:
            pages = levels_of(tiff)
            base = pages[0]
            what = f"{'Aperio slide' if tiff.is_svs else 'TIFF'}, {base.bitspersample} bits"
            return pyramid_of(tiff, base, tuple(level_of(page, size) for page in pages), what)
    except (BadImage, MemoryError, OSError):
        raise
    except Exception as error:  # TiffFileError, struct.error, ValueError and others, for broken headers
        raise error_of_library(error, "its TIFF header cannot be read") from error


def pyramid_of(tiff: Any, page: Any, levels: tuple[Level, ...], what: str) -> Pyramid:
    """Return levels with what a page of tifffile says of their colors."""
    return Pyramid(
        levels=levels,
        photometric=int(page.photometric),
        compression=int(page.compression),
        orientation=int(page.tags.valueof(_ORIENTATION, 1)),
        extra=tuple(map(int, page.extrasamples)),
        colors=page.colormap if page.photometric == PALETTE else None,
        nodata=float(page.nodata) if _NODATA in page.tags else None,  # tifffile's is 0 without the tag
        what=what,
        mpp=micrometers_per_pixel(tiff, page),
    )


def level_of(page: Any, size: int) -> Level:
    """Return what is needed of a page of tifffile. size: of the file. Raises BadImage for kinds that are not read."""
    _check(page)
    rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    level = Level(
        height=page.imagelength,
        width=page.imagewidth,
        samples=page.samplesperpixel,
        dtype=np.dtype(page.dtype),
        bits=page.bitspersample,
        segment=(rows if page.is_tiled else min(rows, page.imagelength), columns),
        planar=page.planarconfig == 2 and page.samplesperpixel > 1,
        **segments_of(page),
        decode=page.decode,
        tables=page.jpegtables,
        is_plain=(int(page.compression), page.predictor, page.fillorder, page.bitspersample % 8) == (1, 1, 1, 0),
        order=page.parent.byteorder,
    )
    check_segments(level, size)
    if not level.is_plain and rows * columns * (1 if level.planar else level.samples) > _MAX_SEGMENT:
        raise BadImage(f"its strips or tiles of {rows} x {columns} pixels are too large; write it again in tiles")
    return level


def segments_of(page: Any) -> dict[str, Any]:
    """Return where the segments of a page of tifffile lie, as fields of `Level`; those without bytes are of size 0."""
    offsets, counts = (np.array(part, np.int64) for part in (page.dataoffsets, page.databytecounts))
    if offsets.shape == counts.shape:
        counts = np.where(offsets == 0, 0, counts)
    return {"offsets": offsets, "counts": counts, "is_sparse": not (offsets.all() and counts.all())}


def check_segments(level: Level, size: int) -> None:
    """Raise BadImage unless all segments lie in a file of `size` bytes."""
    expected = level.per_plane * (level.samples if level.planar else 1)
    lengths = {len(level.offsets), len(level.counts)}
    if lengths != {expected} or (level.offsets + level.counts > size).any():
        raise BadImage("truncated TIFF: its data ends before its last pixel")


def _check(page: Any) -> None:
    """Raise BadImage for pixels that are not read rightly."""
    photometric, bits, samples = int(page.photometric), page.bitspersample, page.samplesperpixel
    if page.imagedepth != 1 or 0 in page.shaped or page.dtype is None or page.dtype.kind not in "buif":
        raise BadImage(f"tiles of this kind of TIFF are not read ({page.dtype}, {page.shaped}); convert it to uint8")
    if page.compression == APERIO_YCBCR and (samples, bits) != (3, 8):
        raise BadImage(f"YCbCr pixels of {samples} samples of {bits} bits; convert it to RGB")
    is_read = {
        PALETTE: bits <= 8 and samples == 1,
        CMYK: bits == 8 and samples == 4,
        YCBCR: page.compression in (*_JPEG, APERIO_YCBCR),
    }.get(photometric, photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB))
    if not is_read:
        kind = _NAMES.get(photometric, f"photometric interpretation {photometric}")
        raise BadImage(f"tiles of a TIFF of {kind}, {bits} bits, are not read; convert it to RGB")


def forget() -> None:
    """Forget all headers."""
    _files.clear()
