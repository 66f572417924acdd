"""JPEG 2000: the values that were encoded, against a second decoder (OpenJPEG by imagecodecs)."""

import struct

import numpy as np
import pytest

from upstep_fast.config.reading import Reading
from upstep_fast.data.decode.image import decode
from upstep_fast.data.formats import jpeg2000
from upstep_fast.data.reading.stored import Piece
from upstep_fast.errors import BadImage

rasterio = pytest.importorskip("rasterio", reason="needs the extra [geo]")
imagecodecs = pytest.importorskip("imagecodecs", reason="the writer, of the extra [microscopy]")


def picture(bits, signed, components, shape=(33, 40)):
    low = -(1 << bits - 1) if signed else 0
    values = np.random.default_rng(bits).integers(low, low + (1 << bits), (components, *shape))
    return values.astype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}")


def encoded(values, bits, container="jp2", **options):
    array = values[0] if len(values) == 1 else np.ascontiguousarray(np.moveaxis(values, 0, -1))
    options = {"level": 0, "reversible": True, "bitspersample": bits, **options}
    return bytes(imagecodecs.jpeg2k_encode(array, codecformat=container, **options))


@pytest.mark.parametrize("container", ["jp2", "j2k"])
@pytest.mark.parametrize("bits", range(1, 17))
def test_values_of_every_depth(bits, container):
    for signed in (False, True)[: 1 + (bits > 8)]:
        for components in (1, 2, 3, 4, 5):
            values = picture(bits, signed, components)
            data = encoded(values, bits, container)
            stored = jpeg2000.read(data, Piece())
            assert np.array_equal(stored.values, values) and stored.values.dtype == values.dtype
            low = -(1 << bits - 1) if signed else 0
            assert (stored.low, stored.high) == (low, low + (1 << bits) - 1)
            second = imagecodecs.jpeg2k_decode(data)
            assert np.array_equal(np.moveaxis(second.reshape(33, 40, components), -1, 0), stored.values)
    layout = jpeg2000.layout(data)
    assert (layout.axes, layout.shape) == ("CYX", (5, 33, 40)) and f"{bits} bits" in layout.what


def test_what_pillow_stretches_is_as_stored():
    values = np.full((1, 40, 40), 2500, np.uint16)
    assert jpeg2000.read(encoded(values, 12), Piece()).values.max() == 2500  # 40000 by Pillow


def test_files_of_gdal_whose_bands_have_no_color():
    values = picture(12, False, 4, (64, 64))
    profile = {"driver": "JP2OpenJPEG", "count": 4, "width": 64, "height": 64, "dtype": "uint16", "nbits": 12}
    with rasterio.io.MemoryFile(ext=".jp2") as memory:
        with memory.open(**profile, quality=100, reversible="yes", ycc="no") as file:
            file.write(values)
        data = memory.read()
    stored = jpeg2000.read(data, Piece())
    assert np.array_equal(stored.values, values) and (stored.low, stored.high) == (0, 4095)
    assert np.array_equal(decode(data, reading=Reading(bands=(4, 3, 2))).numpy(), values[[3, 2, 1]] >> 4)


def test_lossy_pictures_are_those_of_a_second_decoder():
    y, x = np.mgrid[:64, :80]
    values = np.stack([y * 40, x * 40, (x + y) * 20]).astype(np.uint16)
    data = encoded(values, 12, reversible=False, level=40)
    second = np.moveaxis(imagecodecs.jpeg2k_decode(data), -1, 0).astype(int)
    assert abs(jpeg2000.read(data, Piece()).values.astype(int) - second).max() <= 1


def test_windows_and_resolution_levels(tmp_path):
    y, x = np.mgrid[:600, :512]
    values = np.stack([y * 6, x * 8]).astype(np.uint16)
    (tmp_path / "a.jp2").write_bytes(encoded(values, 12, resolutions=5))
    path = str(tmp_path / "a.jp2")
    layout = jpeg2000.layout(path)
    assert layout.levels[:2] == ((600, 512), (300, 256))
    assert np.array_equal(jpeg2000.read(path, Piece(window=(500, 3, 7, 9))).values, values[:, 500:507, 3:12])
    half = jpeg2000.read(path, Piece(level=1)).values
    means = values.reshape(2, 300, 2, 256, 2).mean((2, 4))
    assert (
        half.shape == (2, 300, 256) and abs(half[:, 2:298, 2:254] - means[:, 2:298, 2:254]).max() < 10
    )  # its low pass
    window = Piece(window=(100, 50, 20, 30), level=1)
    assert np.array_equal(jpeg2000.read(path, window).values, half[:, 100:120, 50:80])
    with pytest.raises(BadImage, match="level 9"):
        jpeg2000.read(path, Piece(level=9))


def siz(data, **fields):
    """Return a codestream with other words in its SIZ marker."""
    at = data.index(b"\xff\x4f\xff\x51") + 4
    places = {"width": (4, ">I"), "height": (8, ">I"), "count": (36, ">H"), "depth": (38, "B"), "step": (39, "B")}
    data = bytearray(data)
    for name, value in fields.items():
        offset, code = places[name]
        struct.pack_into(code, data, at + offset, value)
    return bytes(data)


def with_space(data, space):
    """Return a JP2 with another enumerated color space."""
    at = data.index(b"colr") + 4
    return data[: at + 3] + struct.pack(">I", space) + data[at + 7 :]


def with_palette(data):
    """Return a JP2 whose header box has a box of a palette."""
    at = data.index(b"jp2h") - 4
    size = struct.unpack_from(">I", data, at)[0]
    box = struct.pack(">I4s", 12, b"pclr") + bytes(4)
    return data[:at] + struct.pack(">I", size + 12) + data[at + 4 : at + size] + box + data[at + size :]


RGB = encoded(picture(8, False, 3, (256, 300)), 8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a JPEG 2000"),
        (b"<html>" * 100, "not a JPEG 2000"),
        (RGB[:40], "not a JPEG 2000"),
        (RGB[:100], "truncated|cannot be decoded"),
        (RGB[:-2000], "cannot be decoded"),
        (RGB[: len(RGB) // 2], "cannot be decoded"),
        (with_palette(RGB), "a palette"),
        (with_space(RGB, 18), "sYCC"),
        (with_space(RGB, 12), "CMYK"),
        (siz(RGB, step=2), "subsampled"),
        (siz(RGB, depth=9), "several depths"),
        (siz(RGB, count=0), "0 components"),
        (siz(RGB, width=1 << 31, height=1 << 31), "above the limit"),
        (encoded(picture(8, True, 1), 8), "8 bits with a sign"),
        (encoded(np.zeros((1, 20, 20), np.uint32), 20), "20 bits"),
    ],
)
def test_what_is_not_read_is_refused_in_one_line(data, reason):
    with pytest.raises(BadImage, match=reason) as error:
        jpeg2000.read(data, Piece())
    assert "\n" not in error.value.reason and len(error.value.reason) < 250 and "vsimem" not in error.value.reason


def test_alpha_is_left_out_unless_all_bands_are_asked_for():
    values = picture(8, False, 4)
    data = with_space(encoded(values, 8), 16)
    assert np.array_equal(decode(data).numpy(), values[:3])
    assert np.array_equal(decode(data, channels=4).numpy(), values)
    gray = with_space(encoded(values[:2], 8), 17)
    assert np.array_equal(decode(gray).numpy(), values[[0, 0, 0]])
