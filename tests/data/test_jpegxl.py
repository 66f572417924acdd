"""JPEG XL: the values that were encoded, with the range of the bits that its header declares."""

import numpy as np
import pytest

from upstep_fast.data.decode.image import decode
from upstep_fast.data.formats import jpegxl
from upstep_fast.data.reading.stored import Piece
from upstep_fast.errors import BadImage

imagecodecs = pytest.importorskip("imagecodecs", reason="needs the extra [microscopy]")


def picture(bits, bands, shape=(30, 41)):
    values = np.random.default_rng(bits).integers(0, 1 << bits, (bands, *shape))
    return values.astype(np.uint8 if bits <= 8 else np.uint16)


def encoded(values, **options):
    array = values[0] if len(values) == 1 else np.ascontiguousarray(np.moveaxis(values, 0, -1))
    return bytes(imagecodecs.jpegxl_encode(array, **{"lossless": True, **options}))


@pytest.mark.parametrize("container", [False, True])
@pytest.mark.parametrize("bits", [1, 4, 7, 8, 9, 10, 12, 14, 16])
def test_values_of_every_depth(bits, container):
    for bands in (1, 2, 3, 4):
        values = picture(bits, bands)
        data = encoded(values, bitspersample=bits, usecontainer=container)
        stored = jpegxl.read(data, Piece())
        assert np.array_equal(stored.values, values) and (stored.low, stored.high) == (0, (1 << bits) - 1)
        assert jpegxl.layout(data).shape == values.shape


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_floats_have_their_nominal_range(dtype):
    values = np.random.default_rng(0).random((3, 20, 20)).astype(dtype)
    stored = jpegxl.read(encoded(values), Piece())
    assert np.array_equal(stored.values, values) and (stored.low, stored.high) == (0, 1)


def test_lossy_pictures_and_their_bits():
    y, x = np.mgrid[:64, :80]
    values = np.stack([y * 12, x * 12, (x + y) * 7]).astype(np.uint16)
    stored = jpegxl.read(encoded(values, lossless=False, distance=0.1, bitspersample=10), Piece())
    assert stored.high == 1023 and abs(stored.values.astype(int) - values).mean() < 6


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (64, 128), (256, 256), (300, 400), (513, 1), (2000, 3), (24, 36)])
def test_sizes_are_read_from_the_header(shape):
    data = encoded(np.zeros((1, *shape), np.uint8))
    assert jpegxl.layout(data).shape == (1, *shape)


def test_windows_and_first_frames(tmp_path):
    frames = np.stack([np.moveaxis(picture(8, 3), 0, -1), np.zeros((30, 41, 3), np.uint8)])
    (tmp_path / "a.jxl").write_bytes(imagecodecs.jpegxl_encode(frames, lossless=True))
    stored = jpegxl.read(str(tmp_path / "a.jxl"), Piece(window=(3, 4, 20, 30)))
    assert np.array_equal(stored.values, picture(8, 3)[:, 3:23, 4:34])


GRAY = encoded(picture(16, 1))
HUGE = b"\xff\x0a" + (3 << 1 | ((1 << 30) - 1) << 3 | 1 << 33).to_bytes(20, "little")  # 1:1, 2^30 rows


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a JPEG XL"),
        (b"<html>" * 20, "not a JPEG XL"),
        (GRAY[:12], "not a JPEG XL"),
        (b"\xff\x0a", "ends early"),
        (GRAY[:-5], "cannot be decoded"),
        (GRAY[: len(GRAY) // 2], "cannot be decoded"),
        (HUGE, "above the limit"),
    ],
)
def test_what_is_not_read_is_refused_in_one_line(data, reason):
    with pytest.raises(BadImage, match=reason) as error:
        jpegxl.read(data, Piece())
    assert "\n" not in error.value.reason and len(error.value.reason) < 250


def test_alpha_is_left_out_unless_all_bands_are_asked_for():
    values = picture(8, 4)
    assert np.array_equal(decode(encoded(values)).numpy(), values[:3])
    assert np.array_equal(decode(encoded(values), channels=4).numpy(), values)
    assert np.array_equal(decode(encoded(values[:2])).numpy(), values[[0, 0, 0]])
