"""Files opened by GDAL through rasterio: one file alone, one driver, no companions, no network.

GDAL looks for files beside a picture (.aux.xml, .ovr, .msk, .wld), which may be a stranger's and change pixels. So
folders are not listed, and only the driver that is named opens the file.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from upstep_fast.data.reading.out_of_memory import is_out_of_memory
from upstep_fast.data.reading.stored import File
from upstep_fast.errors import BadImage, first_line

_OPTIONS = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # no file is beside this one
    "GDAL_PAM_ENABLED": "NO",  # no .aux.xml
    "GDAL_NUM_THREADS": "1",  # images are decoded in threads already
    "GTIFF_IGNORE_READ_ERRORS": "NO",
    "CPL_DEBUG": "OFF",
}
_NAME = re.compile(r"\S*[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\S*")


@contextlib.contextmanager
def opened(file: File, driver: str, **options: Any) -> Iterator[Any]:
    """Open a file as a rasterio dataset by one driver of GDAL. Raises BadImage, also for errors while it is read.

    options: the driver's. A dataset is of one thread; datasets of several threads do not disturb each other.
    """
    rasterio = _rasterio()
    # that a picture lies nowhere on Earth, or has both nodata and alpha, is of no concern here
    _silence(rasterio.errors.NotGeoreferencedWarning, rasterio.errors.NodataShadowWarning)
    options = {"driver": driver, "GEOREF_SOURCES": "NONE", **options}
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(rasterio.Env(**_OPTIONS))
            if isinstance(file, str) and _is_plain(path := os.path.abspath(file)):
                yield stack.enter_context(rasterio.open(path, **options))
            else:
                content = Path(file).read_bytes() if isinstance(file, str) else file
                memory = stack.enter_context(rasterio.io.MemoryFile(content))
                yield stack.enter_context(memory.open(**options))
        except BadImage:
            raise
        except Exception as error:  # rasterio raises its own errors, GDAL's, ValueError and OverflowError
            cause = error.__cause__ or error  # GDAL's own words
            of_machine = isinstance(error, OSError) and error.errno is not None
            if of_machine or is_out_of_memory(error) or is_out_of_memory(cause):
                raise
            raise BadImage(f"cannot be decoded by GDAL: {_without_path(first_line(cause))}") from error


def planes(dataset: Any, window: tuple[int, int, int, int]) -> np.ndarray:
    """Return all bands of a window (top, left, height, width) as stored, [C, H, W]."""
    top, left, height, width = window
    array: np.ndarray = dataset.read(window=((top, top + height), (left, left + width)))
    return array


def num_bits(dataset: Any) -> int:
    """Return the bits per sample that a dataset declares, the most of all bands; those of its type without a word."""
    stated = [dataset.tags(band, ns="IMAGE_STRUCTURE").get("NBITS") for band in dataset.indexes]
    return max(
        int(bits) if bits else 8 * np.dtype(kind).itemsize for bits, kind in zip(stated, dataset.dtypes, strict=True)
    )


def _is_plain(path: str) -> bool:
    """Return whether GDAL takes a path for what it is: it must be UTF-8, and /vsi starts networks and archives."""
    return not path.startswith("/vsi") and os.fsencode(path).decode("utf-8", "ignore") == path


@functools.cache
def _rasterio() -> Any:
    try:
        import rasterio
        import rasterio.errors
        import rasterio.io
    except ImportError:
        raise BadImage("needs the package rasterio: pip install 'upstep_fast[geo]'") from None
    return rasterio


def _silence(*kinds: type[Warning]) -> None:
    """Ignore warnings of these kinds, again where a `warnings.catch_warnings` of another thread has ended that."""
    for kind in kinds:
        if ("ignore", None, kind, None, 0) not in warnings.filters:
            warnings.filterwarnings("ignore", category=kind)


def _without_path(text: str) -> str:
    """Return GDAL's text without the random name that a file in memory has there."""
    return _NAME.sub("", text).strip()[:160]
