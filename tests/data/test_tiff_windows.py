from __future__ import annotations

import io
import itertools
import subprocess
import sys

import numpy as np
import pytest
from large_files import halved, picture, tifffile, write_pyramid, write_sparse
from PIL import Image

from upstep_fast.config.reading import Intensity, Reading
from upstep_fast.data.decode.image import decode
from upstep_fast.data.formats import tiff_windows
from upstep_fast.data.reading.intensity import to_pixels
from upstep_fast.data.reading.stored import Piece
from upstep_fast.errors import BadImage

imagecodecs = pytest.importorskip("imagecodecs", reason="install upstep_fast[microscopy]")
H, W = 75, 101
FULL = Reading(intensity=Intensity("full"))
WINDOWS = ((0, 0, H, W), (20, 10, 40, 50), (74, 100, 1, 1), (31, 15, 2, 2))

DTYPES = ("u1", "u2", "u4", "i1", "i2", "f4", "f8")
COMPRESSIONS = (None, "zlib", "lzw", "zstd", "lzma", "packbits")
SEGMENTS = ({"tile": (32, 16)}, {"rowsperstrip": 1}, {"rowsperstrip": 7}, {"rowsperstrip": H})
KINDS = (
    {"photometric": "minisblack"},
    {"photometric": "miniswhite"},
    {"photometric": "rgb", "planarconfig": "contig"},
    {"photometric": "rgb", "planarconfig": "separate"},
    {"photometric": "minisblack", "planarconfig": "contig"},
    {"photometric": "minisblack", "planarconfig": "separate"},
)
ALL = [
    case
    for case in itertools.product(DTYPES, COMPRESSIONS, (False, True), SEGMENTS, KINDS, "<>")
    if not (case[2] and case[1] in (None, "packbits"))
]


def written(array, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, metadata=None, **options)
    return file.getvalue()


def by_pillow(image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "TIFF", **options)
    return file.getvalue()


def check_windows(cases) -> None:
    rng = np.random.default_rng(0)
    for dtype, compression, predictor, segments, kind, order in cases:
        form = kind.get("planarconfig")
        bands = 1 if form is None else 3 if kind["photometric"] == "rgb" else 5
        shape = {None: (H, W), "contig": (H, W, bands), "separate": (bands, H, W)}[form]
        bits = rng.integers(0, 256, (*shape[:-1], shape[-1] * np.dtype(dtype).itemsize), dtype=np.uint8)
        values = bits.view(dtype) if dtype[0] != "f" else rng.normal(size=shape).astype(dtype)
        options = {"compression": compression, "predictor": predictor, "byteorder": order, **segments, **kind}
        try:
            data = written(values, **options)
        except (ValueError, NotImplementedError):  # the writer has no such combination
            continue
        expected = values[None] if form is None else np.moveaxis(values, -1, 0) if form == "contig" else values
        assert tiff_windows.layout(data).shape == (bands, H, W)
        for top, left, height, width in WINDOWS:
            stored = tiff_windows.read(data, Piece(window=(top, left, height, width)))
            part = expected[:, top : top + height, left : left + width]
            assert stored.values.dtype == np.dtype(dtype) and np.array_equal(stored.values, part), options
            assert stored.inverted == (kind["photometric"] == "miniswhite") and stored.valid is None
            limits = None if dtype[0] == "f" else np.iinfo(dtype)
            assert (stored.low, stored.high) == ((None, None) if limits is None else (limits.min, limits.max))


def test_windows_are_the_values_that_were_written():
    check_windows(ALL[::131])


@pytest.mark.long
def test_windows_are_the_values_that_were_written_in_every_combination():
    check_windows(ALL)


COLORS = picture(H, W)
OF_PILLOW = {
    "1 bit": lambda im: by_pillow(im.convert("1")),
    "1 bit, fax": lambda im: by_pillow(im.convert("1"), compression="group4"),
    "palette of 4 bits": lambda im: by_pillow(im.quantize(16)),
    "palette": lambda im: by_pillow(im.quantize(200), compression="tiff_lzw"),
    "CMYK": lambda im: by_pillow(im.convert("CMYK")),
    "JPEG, YCbCr": lambda im: by_pillow(im.convert("YCbCr"), compression="jpeg"),
    "JPEG, RGB": lambda im: by_pillow(im, compression="jpeg"),
    "JPEG, gray": lambda im: by_pillow(im.convert("L"), compression="jpeg"),
}


@pytest.mark.parametrize("kind", OF_PILLOW)
def test_colors_are_those_of_the_whole_picture_by_pillow(kind):
    data = OF_PILLOW[kind](Image.fromarray(COLORS))
    whole = decode(data).numpy()
    window = tiff_windows.read(data, Piece(window=(5, 7, 40, 60)))
    assert np.array_equal(to_pixels(window, FULL, 3).numpy(), whole[:, 5:45, 7:67])


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 10, 12, 14, 16])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_packed_bits_become_the_upper_eight(bits, photometric):
    values = np.random.default_rng(bits).integers(0, 1 << bits, (H, W), dtype=np.uint8 if bits <= 8 else np.uint16)
    options = {"bitspersample": bits, "photometric": photometric, "compression": None}
    data = written(values > 0 if bits == 1 else values, **options)
    pixels = to_pixels(tiff_windows.read(data, Piece(window=(3, 4, 20, 30))), FULL, 1).numpy()[0]
    part = values[3:23, 4:34].astype(np.int64)
    expected = part >> (bits - 8) if bits >= 8 else part * 255 // ((1 << bits) - 1)
    assert np.array_equal(pixels, 255 - expected if photometric == "miniswhite" else expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_windows_are_those_of_the_upright_picture(orientation):
    data = written(COLORS, photometric="rgb", tile=(16, 32), extratags=[(274, "H", 1, orientation, True)])
    whole = decode(data).numpy()  # turned by another path
    assert tiff_windows.layout(data).shape == whole.shape
    for top, left, height, width in ((0, 0, *whole.shape[1:]), (5, 7, 40, 60), (60, 2, 3, 9)):
        stored = tiff_windows.read(data, Piece(window=(top, left, height, width)))
        assert np.array_equal(stored.values, whole[:, top : top + height, left : left + width])


def test_alpha_is_put_on_white_where_it_is_associated_and_a_band_otherwise():
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (H, W, 4), dtype=np.uint8)
    colors[..., :3] = colors[..., :3].astype(int) * colors[..., 3:] // 255
    associated = tiff_windows.read(written(colors, photometric="rgb", extrasamples=["assocalpha"]), Piece()).values
    expected = colors[..., :3].astype(int) + 255 - colors[..., 3:]
    assert np.array_equal(associated, np.moveaxis(expected, -1, 0))
    for kind in ("unassalpha", "unspecified"):
        stored = tiff_windows.read(written(colors, photometric="rgb", extrasamples=[kind]), Piece())
        assert np.array_equal(stored.values, np.moveaxis(colors, -1, 0))


@pytest.mark.parametrize("form", ["subifds", "pages", "aperio"])
@pytest.mark.parametrize("compression", [None, "zlib", "jpeg"])
def test_levels_are_found_and_read(tmp_path, form, compression):
    path = str(tmp_path / "slide.tif")
    levels = write_pyramid(tmp_path / "slide.tif", picture(300, 411), form, compression=compression)
    layout = tiff_windows.layout(path)
    assert layout.levels == tuple(level.shape[:2] for level in levels) and layout.shape == (3, 300, 411)
    for k, level in enumerate(levels):
        window = (10, 20, level.shape[0] - 10, level.shape[1] - 20)
        difference = tiff_windows.read(path, Piece(window=window, level=k)).values.astype(int)
        difference -= np.moveaxis(level[10:, 20:], -1, 0)
        assert np.abs(difference).mean() <= (2 if compression == "jpeg" else 0)


def test_pages_that_are_no_levels_are_not_taken_for_them(tmp_path):
    path = tmp_path / "stack.tif"
    with tifffile.TiffWriter(path) as file:
        for page in (picture(64, 64), picture(64, 64), picture(32, 32)):
            file.write(page, photometric="rgb", metadata=None)  # not marked as reduced
        file.write(np.zeros((32, 32), bool), subfiletype=5, metadata=None)  # the mask of a reduced picture
        file.write(picture(32, 20), photometric="rgb", subfiletype=1, metadata=None)  # another shape: a label
    assert tiff_windows.layout(str(path)).levels == ()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER"}, 0.25),
        ({"resolution": (50_800, 50_800), "resolutionunit": "INCH"}, 0.5),
        ({"resolution": (50_800, 50_800), "resolutionunit": "NONE"}, None),
        ({}, None),
        ({"description": "ImageJ=1.53\nunit=micron\n", "resolution": (4, 4)}, 0.25),
        ({"description": '<OME><Pixels PhysicalSizeX="0.5"/></OME>'}, 0.5),
        ({"description": '<OME><Pixels PhysicalSizeX="250" PhysicalSizeXUnit="nm"/></OME>'}, 0.25),
        ({"description": '<OME><Pixels PhysicalSizeX="1" PhysicalSizeXUnit="pixel"/></OME>'}, None),
        ({"description": "Aperio Image Library v1\r\nx|MPP = 0.4990|AppMag = 20"}, 0.499),
    ],
)
def test_micrometers_per_pixel(options, expected):
    if "resolution" not in options:
        options = {**options, "resolution": (1, 1), "resolutionunit": "NONE"}
    file = written(COLORS, photometric="rgb", tile=(16, 16), **options)
    assert tiff_windows.layout(file).mpp == (None if expected is None else pytest.approx(expected))


def test_what_is_not_stored_is_nodata(tmp_path):
    rng = np.random.default_rng(0)
    tile = rng.integers(0, 255, (256, 256, 3), dtype=np.uint8)
    write_sparse(tmp_path / "s.tif", 1000, {(1, 2): tile})
    path = str(tmp_path / "s.tif")
    stored = tiff_windows.read(path, Piece(window=(250, 500, 100, 300)))
    assert np.array_equal(stored.values[:, 6:, 12:268], np.moveaxis(tile[:94], -1, 0))
    assert stored.valid[6:, 12:268].all() and stored.valid.sum() == 94 * 256
    assert tiff_windows.has_data(path, Piece(window=(250, 500, 7, 13)))
    assert not tiff_windows.has_data(path, Piece(window=(250, 500, 6, 300)))


def test_stated_nodata_is_masked():
    values = np.arange(H * W, dtype=np.int16).reshape(H, W)
    values[10:20, 30:50] = -9999
    data = written(values, extratags=[(42113, "s", 0, "-9999", True)])
    stored = tiff_windows.read(data, Piece(window=(5, 25, 30, 40)))
    assert np.array_equal(stored.valid, values[5:35, 25:65] != -9999)


def test_aperio_jpeg_2000_of_ycbcr_becomes_rgb():
    image = picture(128, 128)
    ycbcr = np.asarray(Image.fromarray(image).convert("YCbCr"))
    data = written(
        ycbcr, photometric="rgb", tile=(64, 64), compression="aperio_jp2000_ycbc", compressionargs={"mct": False}
    )
    difference = tiff_windows.read(data, Piece()).values.astype(int) - np.moveaxis(image, -1, 0)
    assert np.abs(difference).max() <= 3


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _with_tag(data: bytes, tag: int, value: int) -> bytes:
    """Return a little-endian TIFF with another value of a tag of its first page."""
    start = int.from_bytes(data[4:8], "little")
    for k in range(int.from_bytes(data[start : start + 2], "little")):
        at = start + 2 + 12 * k
        if int.from_bytes(data[at : at + 2], "little") == tag:
            return data[: at + 8] + value.to_bytes(4, "little") + data[at + 12 :]
    raise AssertionError(f"no tag {tag}")


TILED = {"photometric": "rgb", "tile": (32, 32), "compression": "zlib"}
BAD = {
    "truncated": lambda: _cut(written(picture(256, 256), **TILED)),
    "empty": lambda: b"",
    "text": lambda: b"II*\0 this is text and no TIFF",
    "wide": lambda: _with_tag(written(picture(256, 256), **TILED), 256, 2**31 - 1),
    "tiles": lambda: _with_tag(written(picture(256, 256), **TILED), 322, 2**30),
    "Lab": lambda: by_pillow(Image.fromarray(COLORS).convert("LAB")),
    "YCbCr": lambda: by_pillow(Image.fromarray(COLORS).convert("YCbCr")),
    "complex": lambda: written(COLORS[..., 0].astype(np.complex64)),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_in_one_line(kind, tmp_path):
    path = tmp_path / "bad.tif"
    path.write_bytes(BAD[kind]())
    with pytest.raises(BadImage) as error:
        tiff_windows.layout(str(path))
        tiff_windows.read(str(path), Piece())
    assert "\n" not in error.value.reason


def test_a_damaged_tile_is_refused_and_others_are_read():
    data = bytearray(written(picture(256, 256), **TILED))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        start = file.pages[0].dataoffsets[0]
    data[start : start + 20] = bytes(20)
    with pytest.raises(BadImage, match="cannot be decoded"):
        tiff_windows.read(bytes(data), Piece(window=(0, 0, 10, 10)))
    assert tiff_windows.read(bytes(data), Piece(window=(64, 64, 10, 10))).values.any()


def test_a_replaced_file_is_read_again(tmp_path):
    path = tmp_path / "a.tif"
    for value in (10, 200):
        path.unlink(missing_ok=True)
        path.write_bytes(written(np.full((64, 64 + value), value, np.uint8), tile=(16, 16), compression="zlib"))
        assert (tiff_windows.read(str(path), Piece(window=(0, 0, 8, 8))).values == value).all()


SLIDE = """
import sys
import numpy as np
from upstep_fast.config.reading import Reading
from upstep_fast.data.formats import tiff_windows
from upstep_fast.data.reading import tiles
path = sys.argv[1]
layout = tiff_windows.layout(path)
grid = tiles.grid(layout, Reading(tile=224, mpp=0.25))
kept = tiles.without_blank(grid, layout, lambda p: tiff_windows.read(path, p), lambda p: tiff_windows.has_data(path, p))
for piece in kept:
    assert tiff_windows.read(path, piece).values.shape == (3, 224, 224)
peak = open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]  # ru_maxrss starts with the parent's
print(len(grid), len(kept), int(peak) // 1024)
"""


@pytest.mark.long
def test_a_slide_of_100000_pixels_a_side_takes_less_than_1_gb(tmp_path):
    rng = np.random.default_rng(0)
    stored = {place: rng.integers(0, 255, (256, 256, 3), dtype=np.uint8) for place in ((5, 7), (200, 300), (390, 390))}
    write_sparse(tmp_path / "s.tif", 100_000, stored, resolution=(40_000, 40_000), resolutionunit="CENTIMETER")
    result = subprocess.run(
        [sys.executable, "-c", SLIDE, str(tmp_path / "s.tif")], capture_output=True, text=True, check=True, timeout=200
    )
    tiles, kept, megabytes = map(int, result.stdout.split())
    assert tiles == 447**2 and 3 <= kept <= 12 and megabytes < 1000


def test_halved_levels_are_block_means():
    image = picture(64, 64)
    blocks = image.reshape(32, 2, 32, 2, 3).astype(float).mean((1, 3))
    assert np.abs(halved(image, 1) - blocks).max() <= 0.5


def check_mutations(tmp_path, count) -> None:
    rng = np.random.default_rng(0)
    files = []
    for form, compression in itertools.product(("aperio", "subifds"), ("jpeg", "zlib", "lzw", "zstd", None)):
        write_pyramid(tmp_path / "a.tif", picture(150, 200), form, compression=compression)
        files.append((tmp_path / "a.tif").read_bytes())
    refused = 0
    for k in range(count):
        data = bytearray(files[k % len(files)])
        if k % 4 == 0:
            data = data[: rng.integers(0, len(data))]
        for _ in range(rng.integers(1, 8) if k % 4 else 0):
            start = (0, 0, len(data) - 1500)[k % 3]  # of the header, of all, of the later pages
            data[rng.integers(start, start + 1500 if k % 3 != 1 else len(data))] = rng.integers(256)
        try:
            layout = tiff_windows.layout(bytes(data))
            for level, (height, width) in enumerate(layout.levels or (layout.shape[1:],)):
                tiff_windows.read(bytes(data), Piece(window=(0, 0, min(height, 64), min(width, 64)), level=level))
        except BadImage as error:
            refused += 1
            assert "\n" not in error.reason
    assert refused > count // 4


def test_damaged_files_are_read_or_refused(tmp_path):
    check_mutations(tmp_path, 120)


@pytest.mark.long
def test_many_damaged_files_are_read_or_refused(tmp_path):
    check_mutations(tmp_path, 5000)
