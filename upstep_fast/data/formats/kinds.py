"""Kinds of files: which module reads each one, and which extra installs its packages. The one table of suffixes.

A kind has one reader. Where the reader's packages are missing, its files are counted and left out, never read by
another library, so a result does not depend on what is installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from upstep_fast.data.reading import axes
from upstep_fast.data.reading.stored import File, Layout, Piece, Stored
from upstep_fast.data.reading.tiff_header import TIFF, is_stack, needs_gdal
from upstep_fast.errors import BadImage


@dataclass(frozen=True)
class Kind:
    """Kind of file with a reader of its own in this package."""

    name: str  # for messages
    module: str  # in upstep_fast.data.formats
    suffixes: tuple[str, ...]
    extra: str  # of pyproject.toml
    packages: tuple[str, ...]  # that are imported


# pictures of one image each that data/decode reads, told apart by their first bytes
PHOTOGRAPHS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm"),
    *(".pnm", ".pbm", ".avif", ".npy"),
)
DICOM = Kind("DICOM", "dicom", (".dcm", ".dicom", ".dic", ".ima"), "medical", ("pydicom",))
NIFTI = Kind("NIfTI", "nifti", (".nii", ".nii.gz", ".mgz", ".mgh"), "medical", ("nibabel",))
FITS = Kind("FITS", "fits", (".fits", ".fit", ".fts", ".fits.gz", ".fit.gz", ".fts.gz", ".fz"), "astro", ("astropy",))
JPEG2000 = Kind("JPEG 2000", "jpeg2000", (".jp2", ".j2k", ".jpx", ".jpc", ".j2c", ".jpf"), "geo", ("rasterio",))
JPEGXL = Kind("JPEG XL", "jpegxl", (".jxl",), "microscopy", ("imagecodecs",))
GEOTIFF = Kind("GeoTIFF", "geotiff", (), "geo", ("rasterio",))  # that GDAL alone reads rightly
SVS = Kind("Aperio slide", "tiff_windows", (".svs",), "microscopy", ("tifffile", "imagecodecs"))
SLIDES = Kind(
    "whole slide", "slides", (".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".bif"), "slides", ("openslide",)
)
# for tiles and levels (--tiles, --level, --mpp) of files that data/decode reads as a whole
TIFF_WINDOWS = Kind("TIFF", "tiff_windows", (), "microscopy", ("tifffile", "imagecodecs"))
STACKS = Kind("TIFF stack", "tiff_stacks", (), "microscopy", ("tifffile",))  # told from the description (is_stack)
ZARR = Kind("OME-Zarr", "ome_zarr", (".zarr",), "microscopy", ("zarr",))  # a folder
ARRAYS = Kind("array", "npy_windows", (), "", ())
ANIMATIONS = Kind("animation", "animations", (), "", ())  # whose frames --slice chooses
PHOTOGRAPH = Kind("photograph", "photographs", (), "", ())  # of which decode/cut.py has the pixels
BY_PATH = (SVS, SLIDES, TIFF_WINDOWS, STACKS, ZARR, GEOTIFF, JPEG2000, ARRAYS)  # read by offset, never as a whole
KINDS = (DICOM, NIFTI, FITS, JPEG2000, JPEGXL, SVS, SLIDES, ZARR)

_CONVERT = "convert it to JPEG or PNG"
_TO_TIFF = "convert it to a 16-bit TIFF or to .npy"
# pictures that nothing here reads, with the cure
NO_READER = {
    **dict.fromkeys((".heic", ".heif"), f"{_CONVERT}, with heif-convert or pillow-heif"),
    **dict.fromkeys((".tga", ".ico", ".psd", ".svg", ".eps", ".pdf"), _CONVERT),
    **dict.fromkeys(
        (".exr", ".hdr", ".pfm", ".nc", ".nc4", ".mrc", ".nrrd", ".nhdr", ".mha", ".mhd", ".img"), _TO_TIFF
    ),
    **dict.fromkeys((".bsq", ".bil", ".bip", ".h5", ".hdf", ".hdf5", ".grib", ".grb", ".ecw", ".sid"), _TO_TIFF),
    ".vrt": "give the files that it names",
    **dict.fromkeys(
        (".czi", ".lif", ".nd2", ".oib", ".oif", ".vsi", ".lsm", ".stk", ".dv", ".ims", ".zvi"),
        "convert it to OME-TIFF, with bioformats2raw or Fiji",
    ),
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf", ".raw"), "develop it to TIFF"),
    **dict.fromkeys((".mp4", ".mov", ".avi", ".mkv", ".webm"), "write its frames as JPEG or PNG"),
}

SUFFIXES = (*PHOTOGRAPHS, *(suffix for kind in KINDS for suffix in kind.suffixes))
START = 400  # bytes of a file that its kind is told from
_BY_SUFFIX = {suffix: kind for kind in KINDS for suffix in kind.suffixes}
_PHOTOGRAPHS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"\x93NUMPY")
_MAGIC = (
    (128, b"DICM", DICOM),
    (344, b"n+1\0", NIFTI),
    (4, b"n+2\0\r\n\x1a\n", NIFTI),
    (0, b"SIMPLE  =", FITS),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", JPEG2000),
    (0, b"\xff\x4f\xff\x51", JPEG2000),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", JPEGXL),
    (0, b"\xff\x0a", JPEGXL),
)


def suffix_of(name: str) -> str:
    """Return a name's suffix in lower case, ".nii.gz" as a whole; empty without one."""
    lower = name.lower()
    stem, last = os.path.splitext(lower)
    both = os.path.splitext(stem)[1] + last
    return both if both in _BY_SUFFIX else last


def kind_of(name: str, start: bytes) -> Kind | None:
    """Return the kind of a file; None for those that data/decode reads, or refuses.

    name: or empty. start: its first START bytes, which decide where they are those of a known kind.
    """
    if start.startswith(b"\x1f\x8b"):
        start = _inflated(start)
    for offset, magic, kind in _MAGIC:
        if start[offset : offset + len(magic)] == magic:
            return kind
    by_suffix = _BY_SUFFIX.get(suffix_of(name))
    if start.startswith(TIFF) and by_suffix not in (SVS, SLIDES):
        return None
    return None if start.startswith(_PHOTOGRAPHS) else by_suffix


def kind_of_content(data: bytes | memoryview) -> Kind | None:
    """Return the kind of encoded content; None for content that data/decode reads, or refuses."""
    start = bytes(data[:START])
    if not start.startswith(TIFF):
        return kind_of("", start)
    return GEOTIFF if _needs_gdal(data) else None


def windowed(kind: Kind | None, start: bytes, file: Callable[[], File]) -> Kind:
    """Return the kind that gives windows of a file. kind, start: as of `kind_of`. Raises OSError as `file` does."""
    if kind is not None:
        return kind
    if start.startswith(TIFF):
        if _states_stack(content := file()):
            return STACKS
        return GEOTIFF if _needs_gdal(content) else TIFF_WINDOWS
    return ARRAYS if start.startswith(b"\x93NUMPY") else PHOTOGRAPH


def stack_of(file: File, any_pages: bool) -> Kind | None:
    """Return the kind of a TIFF whose description names planes; with `any_pages` also of others of several pages."""
    return STACKS if _states_stack(file, any_pages) else None


def _states_stack(file: File, any_pages: bool = False) -> bool:
    try:
        return is_stack(file, any_pages)
    except BadImage:  # whoever reads it says what is wrong
        return False


def _needs_gdal(file: File) -> bool:
    try:
        return needs_gdal(file)
    except BadImage:  # whoever reads it says what is wrong
        return False


def _inflated(start: bytes) -> bytes:
    try:
        return zlib.decompressobj(31).decompress(start, START)
    except zlib.error:
        return b""


@functools.cache
def missing(kind: Kind) -> str:
    """Return the command that installs what a kind's reader needs; empty if it is installed."""
    if all(importlib.util.find_spec(package) for package in kind.packages):
        return ""
    return f"pip install 'upstep_fast[{kind.extra}]'"


def missing_of(suffix: str) -> str:
    """Return the command that installs the reader of a suffix; empty if it is installed, or nothing reads it."""
    kind = _BY_SUFFIX.get(suffix)
    return "" if kind is None else missing(kind)


def module(kind: Kind) -> ModuleType:
    """Return the module that reads a kind. Raises BadImage, naming the extra, if its packages are missing."""
    if command := missing(kind):
        raise BadImage(f"{kind.name} needs {' and '.join(kind.packages)}: {command}")
    return importlib.import_module(f"upstep_fast.data.formats.{kind.module}")


def layout(kind: Kind, file: File) -> Layout:
    """Return the layout of a file from its header. Raises BadImage, or OSError or MemoryError, which may pass."""
    return module(kind).layout(file)


def read(kind: Kind, file: File, piece: Piece) -> Stored:
    """Return one picture of a file. Raises BadImage, or OSError or MemoryError, which may pass."""
    reader = module(kind)
    return axes.read(lambda one: reader.read(file, one), piece)
