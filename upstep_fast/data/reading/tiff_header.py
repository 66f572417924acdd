"""Headers of TIFF files: how the samples of each page are stored. Read without a library, from classic and BigTIFF."""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from upstep_fast.data.reading.stored import File
from upstep_fast.errors import BadImage

T = TypeVar("T")
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
_CODES = {1: "u1", 2: "S1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}  # field types that are read
_DESCRIPTION, _DNG_VERSION, _GDAL_METADATA, _GDAL_NODATA = 270, 50706, 42112, 42113
_GEO = {33550, 33922, 34264, 34735, 50844, _GDAL_METADATA, _GDAL_NODATA}  # tags that only GeoTIFFs have
_COMPRESSION, _SHORT, _LERC = 259, 3, 34887
# those before TIFF 6, and deflate under both its numbers: what GDAL, Pillow and tifffile all read
_COMMON_COMPRESSIONS = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946)
THUMBNAIL, MASK = 1, 4  # bits of NewSubfileType
_MAX_PAGES = 1000


@dataclass(frozen=True)
class TiffPage:
    """One page of a TIFF, in the words of the specification."""

    width: int
    height: int
    depth: int
    bits: tuple[int, ...]  # per sample
    samples: int
    formats: tuple[int, ...]  # 1 unsigned, 2 signed, 3 floating point
    photometric: int
    planar: int  # 1: interleaved, 2: one plane per sample; 1 of one sample
    stated_planar: int  # as the file has it
    extra: tuple[int, ...]  # 0 unspecified, 1 associated alpha, 2 unassociated alpha
    compression: int
    orientation: int
    tile: int  # pixels of a tile; 0: strips
    subsampling: tuple[int, ...]
    ink_set: int
    subfile: int
    is_raw: bool  # DNG
    is_sparse: bool  # some strips or tiles are not stored
    order: str  # "<" or ">"
    big: bool
    is_geo: bool  # it has tags of GeoTIFF or GDAL
    is_scaled: bool  # GDAL's metadata have a scale or an offset
    nodata: str  # GDAL_NODATA; empty without it
    is_masked: bool = False  # a later page is its mask; known where all pages are read

    @property
    def kind(self) -> TiffPage:
        """What pages have in common that are bands of one picture."""
        return replace(self, is_sparse=False, is_masked=False)

    @property
    def needs_gdal(self) -> bool:
        """Whether GDAL alone reads it rightly: other readers know no masks, scales, empty tiles, and no NaN in LERC."""
        plain = all(kind in (1, 4) for kind in self.formats) and set(self.bits) in ({1}, {2}, {4}, {8}, {12}, {16})
        special = self.is_scaled or self.is_sparse or self.is_masked or self.compression not in _COMMON_COMPRESSIONS
        return not self.is_raw and (self.compression == _LERC or (self.is_geo and (special or not plain)))


def read_pages(data: bytes | memoryview, max_pages: int = _MAX_PAGES) -> tuple[list[TiffPage], str]:
    """Return the pages of a TIFF, without masks and thumbnails behind the first, and the first one's description.

    Raises BadImage for a broken file.
    """
    view = memoryview(data)
    order = "<" if bytes(view[:2]) == b"II" else ">"
    big = 43 in (view[2], view[3])
    pages: list[TiffPage] = []
    description, is_masked = "", False
    seen: set[int] = set()
    at = _integer(view, 8 if big else 4, order, 8 if big else 4)
    while at and at not in seen and len(seen) < max_pages:
        seen.add(at)
        tags, at = _directory(view, at, order, big)
        page = _page(tags, order, big)
        if not pages:
            description = tags.get(_DESCRIPTION, np.zeros(0, "S1")).tobytes().decode("latin-1")
        elif page.subfile & (THUMBNAIL | MASK):
            is_masked = is_masked or page.subfile == MASK
            continue
        pages.append(page)
    if not pages:
        raise BadImage("a TIFF without a page")
    pages[0] = replace(pages[0], is_masked=is_masked)
    return pages, description


def is_special(data: bytes | memoryview) -> bool:
    """Return whether the first page of a TIFF has tags of GeoTIFF or GDAL, or LERC's compression.

    No values are read: for plain TIFFs, which are most, `read_pages` takes several times as long. Raises BadImage for a
    broken file.
    """
    view = memoryview(data)
    order, big = "<" if bytes(view[:2]) == b"II" else ">", 43 in (view[2], view[3])
    link, head, entry = (8, 8, "HHQH6x") if big else (4, 2, "HHIH2x")
    at = _integer(view, 8 if big else 4, order, link)
    end = at + head + struct.calcsize(order + entry) * _integer(view, at, order, head)
    if end > len(view):
        return True  # `read_pages` says what is wrong
    entries = struct.iter_unpack(order + entry, view[at + head : end])
    return any(
        tag in _GEO or (tag == _COMPRESSION and (kind != _SHORT or value == _LERC)) for tag, kind, _, value in entries
    )


def first_page(file: File) -> TiffPage:
    """Return the first page of a TIFF; `is_masked` is known of those with tags of GeoTIFF. Raises BadImage, OSError."""
    return _mapped(file, _first_page)


def needs_gdal(file: File) -> bool:
    """Return whether GDAL alone reads a TIFF rightly (`TiffPage.needs_gdal`). Raises BadImage, OSError."""
    return _mapped(file, lambda view: is_special(view) and _first_page(view).needs_gdal)


def _first_page(view: bytes | memoryview) -> TiffPage:
    page = read_pages(view, max_pages=1)[0][0]
    return read_pages(view)[0][0] if page.is_geo else page


def is_stack(file: File, any_pages: bool = False) -> bool:
    """Return whether a file is a TIFF whose description names planes: of ImageJ, of OME, or axes of tifffile.

    any_pages: other TIFFs of several pages count as well. Raises BadImage, OSError.
    """

    def look(view: bytes | memoryview) -> bool:
        if bytes(view[:4]) not in TIFF:
            return False
        pages, description = read_pages(view, max_pages=1 + any_pages)
        if any_pages and len(pages) > 1:
            return True
        if description.startswith("{"):
            axes, sizes = shaped_axes(description)
            return any(axis not in "YXSC" and size > 1 for axis, size in zip(axes, sizes, strict=True))
        if description.startswith("ImageJ="):
            return stated_planes(description) > 1
        is_set = "<OME" in description[:2000] and ("<BinaryOnly" in description or description.count("<Image ") > 1)
        return is_set or stated_planes(description) > max(1, pages[0].samples)  # SizeC counts samples

    return _mapped(file, look)


def shaped_axes(description: str) -> tuple[str, tuple[int, ...]]:
    """Return axes and sizes that tifffile's own description states, as JSON; empty without them."""
    axes = re.search(r'"axes": "([A-Z]{2,16})"', description)
    shape = re.match(r'\{"shape": \[([0-9, ]+)\]', description)
    sizes = tuple(int(size) for size in shape[1].split(",") if size.strip()) if shape else ()
    return (axes[1], sizes) if axes and len(axes[1]) == len(sizes) else ("", ())


def _mapped(file: File, read: Callable[[bytes | memoryview], T]) -> T:
    """Return what `read` makes of a file's content, which is mapped into memory. Raises as it, BadImage, OSError."""
    if not isinstance(file, str):
        return read(file)
    with open(file, "rb") as stream:
        if not os.fstat(stream.fileno()).st_size:
            raise BadImage("the file is empty")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:
            try:
                return read(view)
            except BadImage as error:
                raise BadImage(error.reason) from None  # whose traceback would hold the mapping


def stated_planes(description: str) -> int:
    """Return the number of planes that ImageJ's or OME's description states; 0 without one."""
    if description.startswith("ImageJ="):
        match = re.search(r"^images=(\d{1,9})", description, re.MULTILINE)
        return int(match[1]) if match else 1
    if "<OME" not in description[:2000]:
        return 0
    sizes = [re.search(rf'Size{axis}="(\d{{1,9}})"', description) for axis in "CZT"]
    return int(np.prod([int(size[1]) if size else 1 for size in sizes], dtype=object))


def stated_stack(description: str) -> str:
    """Return what ImageJ's or OME's description says the pages are, other than channels: "3 slices (Z)"; else ""."""
    of_imagej, of_ome = description.startswith("ImageJ="), "<OME" in description[:2000]
    for word, axis in (("slices", "Z"), ("frames", "T")):
        pattern = rf"^{word}=(\d{{1,9}})" if of_imagej else rf'Size{axis}="(\d{{1,9}})"'
        size = re.search(pattern, description, re.MULTILINE) if of_imagej or of_ome else None
        if size and int(size[1]) > 1:
            return f"{size[1]} {word} ({axis})"
    return ""


def _page(tags: dict[int, np.ndarray], order: str, big: bool) -> TiffPage:
    def values(tag: int, default: tuple[int, ...]) -> tuple[int, ...]:
        stored = tags.get(tag)
        return default if stored is None or stored.dtype.kind != "u" else tuple(stored[:64].tolist())

    def value(tag: int, default: int) -> int:
        return (values(tag, ()) or (default,))[0]

    samples = value(277, 1)
    stored = [tags[tag] for tag in (273, 279, 324, 325) if tag in tags]  # offsets and byte counts
    return TiffPage(
        width=value(256, 0),
        height=value(257, 0),
        depth=value(32997, 1),
        bits=values(258, (1,)),
        samples=samples,
        formats=values(339, (1,)),
        photometric=value(262, 1),
        planar=value(284, 1) if samples > 1 else 1,
        stated_planar=value(284, 1),
        extra=values(338, ()),
        compression=value(259, 1),
        orientation=value(274, 1),
        tile=value(322, 0) * value(323, 0),
        subsampling=values(530, (2, 2)),
        ink_set=value(332, 1),
        subfile=value(254, 0),
        is_raw=_DNG_VERSION in tags,
        is_sparse=any(len(part) == 0 or part.min() == 0 for part in stored if part.dtype.kind == "u"),
        order=order,
        big=big,
        is_geo=not _GEO.isdisjoint(tags),
        is_scaled=bool(re.search(rb"role=.(scale|offset)", _text(tags, _GDAL_METADATA))),
        nodata=_text(tags, _GDAL_NODATA).strip(b"\0 ").decode("latin-1"),
    )


def _text(tags: dict[int, np.ndarray], tag: int) -> bytes:
    stored = tags.get(tag)
    return b"" if stored is None or stored.dtype.kind != "S" else stored.tobytes()


def _directory(view: memoryview, at: int, order: str, big: bool) -> tuple[dict[int, np.ndarray], int]:
    """Return the tags of the directory at this offset and the offset of the next one."""
    link, head, entry = (8, 8, 20) if big else (4, 2, 12)
    count = _integer(view, at, order, head)
    end = at + head + entry * count
    following = _integer(view, end, order, link)  # checks that all entries lie in the file
    tags = {}
    for start in range(at + head, end, entry):
        tag, kind = struct.unpack_from(order + "HH", view, start)
        number = _integer(view, start + 4, order, link)
        if kind not in _CODES:
            tags[tag] = np.zeros(0, "S1")  # that it is there
            continue
        dtype = np.dtype(order + _CODES[kind])
        where = start + 4 + link
        if number * dtype.itemsize > link:
            where = _integer(view, where, order, link)
        if where + number * dtype.itemsize > len(view):
            raise BadImage("truncated TIFF: a part of its header lies behind its end")
        tags[tag] = np.frombuffer(view, dtype, number, where) if number else np.zeros(0, dtype)
    return tags, following


def _integer(view: memoryview, at: int, order: str, size: int) -> int:
    if at + size > len(view):
        raise BadImage("truncated TIFF: its header lies behind its end")
    return int.from_bytes(view[at : at + size], "little" if order == "<" else "big")
