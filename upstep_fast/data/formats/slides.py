"""Whole slides by OpenSlide: .ndpi, .mrxs, .scn, .vms, .svslide, .bif; Aperio's .svs are read by tiff_windows.py.

RGB of 8 bits. What OpenSlide returns as transparent, outside of the scanned areas, is white. It cuts 16 bits to 8
without a word, so slides that state more are refused. One handle per file is shared by threads, which OpenSlide allows.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np
from PIL import Image

from upstep_fast.data.reading.recent import Recent
from upstep_fast.data.reading.regular import read_at, version_of
from upstep_fast.data.reading.stored import File, Layout, Piece, Stored
from upstep_fast.data.reading.tiff_header import TIFF, read_pages
from upstep_fast.errors import BadImage

_HANDLES = 16  # files that are kept open
_opened_files = Recent(_HANDLES)  # each counts as 1
_MAX_LEVELS = 64
OF_FILES = (".vms", ".vmu")  # slides whose pixels lie in pictures beside them
_MAX_TEXT = 1 << 20  # bytes of a .vms file


def layout(file: File) -> Layout:
    """Return size, levels and resolution of a slide. Raises BadImage, OSError."""
    slide = _open(file)
    sizes = tuple((height, width) for width, height in slide.level_dimensions[:_MAX_LEVELS])
    vendor = slide.properties.get("openslide.vendor", "unknown")
    what = f"{vendor} slide"
    return Layout("CYX", (3, *sizes[0]), what, sizes if len(sizes) > 1 else (), _mpp(slide))


def read(file: File, piece: Piece) -> Stored:
    """Return a window of a level, uint8 [3, H, W]. Raises BadImage, OSError."""
    import openslide

    slide = _open(file)
    top, left, rows, columns = layout(file).window(piece)
    width, height = slide.level_dimensions[piece.level]
    # read_region takes the corner in pixels of level 0
    factors = [full / size for full, size in zip(slide.level_dimensions[0], (width, height), strict=True)]
    corner = round(left * factors[0]), round(top * factors[1])
    try:
        region = slide.read_region(corner, piece.level, (columns, rows))
    except openslide.OpenSlideError as error:
        _opened_files.clear()  # a handle that has failed once refuses everything
        raise BadImage(f"cannot be decoded: {str(error)[:120]}") from error
    white = Image.alpha_composite(Image.new("RGBA", region.size, "white"), region).convert("RGB")
    return Stored(np.moveaxis(np.asarray(white), -1, 0), 0, 255)


def _open(file: File) -> Any:
    if not isinstance(file, str):
        raise BadImage("a slide in an archive or data set is not read; give the slide's own file in a folder")
    try:
        import openslide
    except ImportError:
        raise BadImage("slides need openslide: pip install 'upstep_fast[slides]'") from None

    def make() -> tuple[Any, int]:
        _check_companions(file)
        _check_bits(file)
        try:
            return openslide.OpenSlide(file), 1
        except openslide.OpenSlideError as error:
            raise BadImage(f"not a slide that OpenSlide reads: {str(error)[:160]}") from error

    return _opened_files.get(version_of(file), make)


def companions(path: str) -> list[str]:
    """Return the other files of a slide, by their paths relative to its folder. Raises BadImage, OSError."""
    folder, name = os.path.split(path)
    stem, suffix = os.path.splitext(name)
    if suffix.lower() in OF_FILES:
        return _values(path, ("ImageFile", "MapFile", "OptimisationFile", "MacroImage"))
    if suffix.lower() != ".mrxs":
        return []
    inside = os.path.join(folder, stem)
    if not os.path.isdir(inside):
        raise BadImage(f"a MIRAX slide without its folder {stem}/; copy it beside the .mrxs file")
    index = os.path.join(inside, "Slidedat.ini")
    stated = _values(index, ("FILE_", "INDEXFILE")) if os.path.isfile(index) else []
    return [stem, *(os.path.join(stem, other) for other in (*os.listdir(inside), *stated))]


def _check_companions(path: str) -> None:
    """Raise BadImage if a slide's other files are missing or lie elsewhere than beside it."""
    folder = os.path.dirname(path)
    top = os.path.realpath(folder or ".")
    for other in companions(path):
        beside = os.path.normpath(os.path.join(top, other))
        is_link = os.path.realpath(os.path.join(folder, other)) != beside
        if is_link or os.path.commonpath((top, beside)) != top or beside == top:
            raise BadImage(
                f"its file {other[:200]} lies outside of its folder, or is a link; copy the file beside the slide"
            )


def _values(path: str, keys: tuple[str, ...]) -> list[str]:
    """Return the values of the lines KEY...=VALUE of a text file, for keys that start so. Raises BadImage, OSError."""
    text = bytes(read_at(path, 0, min(os.path.getsize(path), _MAX_TEXT))).decode("latin-1")
    lines = (line.partition("=") for line in text.splitlines())
    values = [value.strip() for key, _, value in lines if key.strip().startswith(keys) and value.strip()]
    if bad := next((value for value in values if "\0" in value or "\\" in value), None):
        raise BadImage(f"it names a file {bad[:80]!r}; a slide's files lie beside it")
    return values


def _check_bits(path: str) -> None:
    """Raise BadImage for a TIFF of more than 8 bits."""
    if os.path.getsize(path) == 0:
        raise BadImage("the file is empty")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        try:
            bits = max(read_pages(view, max_pages=1)[0][0].bits) if bytes(view[:4]) in TIFF else 8
        except BadImage:  # NDPI's own form of offsets beyond 4 GB; OpenSlide says what is wrong
            bits = 8
        finally:
            view.release()
    if bits > 8:
        raise BadImage(f"{bits} bits a channel, of which OpenSlide gives 8; convert it to OME-TIFF")


def _mpp(slide: Any) -> float | None:
    try:
        size = float(slide.properties.get("openslide.mpp-x", ""))
    except ValueError:
        return None
    return size if 0 < size < 1e9 else None
