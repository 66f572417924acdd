"""TIFF headers: what is told of a file before its values are read."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest

from upstep_fast.data.reading import tiff_header

tifffile = pytest.importorskip("tifffile")


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("tags", "compression"),
    [
        ([], None),
        ([], "zlib"),
        ([(33550, "d", 3, (1.0, 1.0, 0.0), True)], None),
        ([(42113, "s", 2, "0", True)], "zlib"),
    ],
)
def test_tiffs_with_tags_of_gdal_are_told_without_their_values(big, order, tags, compression):
    file = io.BytesIO()
    picture = np.arange(64, dtype=np.uint8).reshape(8, 8)
    tifffile.imwrite(file, picture, byteorder=order, bigtiff=big, extratags=tags, compression=compression)
    page = tiff_header.first_page(file.getvalue())
    assert tiff_header.is_special(file.getvalue()) == page.is_geo == bool(tags)


@pytest.mark.parametrize(("kind", "value"), [("H", 34887), ("I", 34887), ("I", 1)])
def test_lerc_is_special(kind, value):
    entry = struct.pack("<HHI", 259, {"H": 3, "I": 4}[kind], 1) + struct.pack(f"<{kind}", value).ljust(4, b"\0")
    data = b"II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    assert tiff_header.is_special(data)  # also where the compression is not of the usual type
    assert tiff_header.first_page(data).needs_gdal == (value == 34887)
