"""Intensity: stored values to 8 bits, against the formula in float64 or in exact integers."""

from __future__ import annotations

import io
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from tiff_files import BLACK_IS_ZERO, DEFLATE, FLOAT, NONE, RGB, SIGNED, UNSIGNED, WHITE_IS_ZERO, Kind, write_tiff

from upstep_fast.config.reading import Intensity, Reading, intensity_text, parse_bands, parse_intensity, parse_tiles
from upstep_fast.data.decode.image import decode
from upstep_fast.data.decode.in_memory import pixels_of
from upstep_fast.data.reading.intensity import to_bytes, to_pixels
from upstep_fast.data.reading.stored import Stored
from upstep_fast.errors import BadImage, ConfigError

FULL = Intensity("full")
INTEGERS = ("u1", "u2", "u4", "i1", "i2", "i4")
SHAPE = (2, 3, 4)


def of_range(low: float, high: float, kind: str = "range") -> Intensity:
    return Intensity(kind, ranges=((low, high),))


def ranged(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """The formula of a range, one value after the other, with Python's round (half to even)."""
    flat = [round(255 * min(max((float(v) - low) / (high - low), 0.0), 1.0)) for v in values.reshape(-1)]
    return np.array(flat, np.uint8).reshape(values.shape)


@given(arrays.arrays(st.sampled_from(("u1", "u2", "u4", "u8")), SHAPE), st.integers(8, 64))
def test_full_is_the_upper_eight_bits_of_unsigned_integers(values, bits):
    bits = min(bits, 8 * values.dtype.itemsize)
    values = values >> np.array(8 * values.dtype.itemsize - bits, values.dtype)
    got = to_bytes(Stored(values, 0, (1 << bits) - 1), FULL)
    assert np.array_equal(got.numpy(), values >> np.array(bits - 8, values.dtype))


@given(arrays.arrays(st.sampled_from(INTEGERS), SHAPE), st.data())
def test_full_of_any_integers_is_their_place_in_the_declared_range(values, data):
    info = np.iinfo(values.dtype)
    low, high = sorted(data.draw(st.tuples(*[st.integers(int(info.min), int(info.max))] * 2)))
    assume(low < high)
    levels = high - low + 1
    places = [min(max(int(v), low), high) - low for v in values.reshape(-1)]
    want = [256 * p // levels if levels >= 256 else 255 * p // (levels - 1) for p in places]
    got = to_bytes(Stored(values, low, high), FULL)
    assert got.flatten().tolist() == want


@given(
    arrays.arrays(st.sampled_from((*INTEGERS, "f4", "f8", "i8", "u8")), SHAPE),
    st.floats(-1e6, 1e6),
    st.floats(1e-3, 1e6),
    st.booleans(),
)
def test_ranges_are_linear_in_float64(values, low, width, inverted):
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=1, posinf=2, neginf=-2)
    got = to_bytes(Stored(values, inverted=inverted), of_range(low, low + width)).numpy()
    want = ranged(values, low, low + width)
    assert np.array_equal(got, 255 - want if inverted else want)


@given(arrays.arrays("f4", SHAPE), arrays.arrays(bool, SHAPE[1:]), st.booleans())
def test_invalid_values_become_the_median_of_the_valid_ones(values, valid, inverted):
    is_valid = np.isfinite(values) & valid
    stored = Stored(values, valid=valid, inverted=inverted)
    if not is_valid.any((1, 2)).all():
        with pytest.raises(BadImage, match="no valid value"):
            to_bytes(stored, of_range(-1, 1))
        return
    got = to_bytes(stored, of_range(-1, 1)).numpy()
    for band, mask, pixels in zip(values, is_valid, got, strict=True):
        mapped = np.sort(ranged(band[mask], -1, 1))
        median = mapped[(len(mapped) - 1) // 2]
        assert np.array_equal(pixels[mask], 255 - ranged(band[mask], -1, 1) if inverted else ranged(band[mask], -1, 1))
        assert (pixels[~mask] == (255 - median if inverted else median)).all()


def test_auto_leaves_eight_bits_and_maps_the_rest_by_the_measured_range():
    eight, twelve = Stored(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), 0, 255), np.array([[[0, 2000, 4000]]])
    measured = of_range(1000, 3000, "auto")
    assert to_bytes(eight, measured).flatten().tolist() == list(range(256))
    assert to_bytes(Stored(twelve.astype(np.uint16), 0, 65535), measured).flatten().tolist() == [0, 128, 255]
    # before a range is measured: the declared one
    assert to_bytes(Stored(twelve.astype(np.uint16), 0, 4095), Intensity()).flatten().tolist() == [0, 125, 250]
    # an explicit range is one of all values, those of 8 bits included
    assert to_bytes(Stored(np.array([[[0, 64, 128]]], np.uint8), 0, 255), of_range(0, 128)).flatten().tolist() == [
        *(0, 128, 255)
    ]


def test_floats_without_a_range_are_refused_with_the_cure():
    values = np.array([[[0.0, 0.5, 1.0]]], np.float32)
    with pytest.raises(BadImage, match="no declared range: give --intensity range:LO,HI"):
        to_bytes(Stored(values), FULL)
    assert to_bytes(Stored(values, 0, 1), FULL).flatten().tolist() == [0, 128, 255]


def test_bands_are_chosen_by_number_and_must_fit_the_channels():
    values = np.arange(4, dtype=np.uint8).reshape(4, 1, 1)
    four = Stored(values, 0, 255)
    assert to_pixels(four, Reading(bands=(4, 3, 2)), 3).flatten().tolist() == [3, 2, 1]
    assert to_pixels(four, Reading(bands=(2,)), 3).flatten().tolist() == [1, 1, 1]
    assert to_pixels(four, Reading(), 4).flatten().tolist() == [0, 1, 2, 3]
    with pytest.raises(BadImage, match=r"has 4 bands, 3 were asked for; give --bands 1,2,3 or --in-chans 4"):
        to_pixels(four, Reading(), 3)
    with pytest.raises(BadImage, match=r"has 4 bands; --bands asks for number 5"):
        to_pixels(four, Reading(bands=(5,)), 1)
    per_band = Intensity("range", ranges=((0, 10), (0, 100)))
    two = np.full((2, 1, 1), 5, np.uint16)
    assert to_bytes(Stored(two, 0, 65535), per_band).flatten().tolist() == [128, 13]
    with pytest.raises(BadImage, match="2 ranges of --intensity for 4 bands"):
        to_bytes(four, per_band)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("auto", Intensity()),
        ("full", FULL),
        ("percentile:1,99.5", Intensity("percentile", (1, 99.5))),
        ("range:-1000,3000", of_range(-1000, 3000)),
        ("window:40,400", of_range(-160, 240)),
        ("auto:120,3890.25", of_range(120, 3890.25, "auto")),
        ("range:0,1e-3;5,6", Intensity("range", ranges=((0, 1e-3), (5, 6)))),
    ],
)
def test_intensity_is_parsed_and_written(text, want):
    assert parse_intensity(text) == want
    assert parse_intensity(intensity_text(want)) == want


@given(st.lists(st.tuples(st.floats(-1e300, 1e300), st.floats(-1e300, 1e300)), min_size=1, max_size=4))
def test_any_range_survives_being_written(pairs):
    pairs = [tuple(sorted(pair)) for pair in pairs]
    assume(all(low < high and math.isfinite(high - low) for low, high in pairs))
    intensity = Intensity("range", ranges=tuple(pairs))
    assert parse_intensity(intensity_text(intensity)) == intensity


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bright",
        "full:1,2",
        "range",
        "range:1",
        "range:2,1",
        "range:1,1",
        "range:a,b",
        "range:1,2,3",
        "range:nan,1",
        "window:40,0",
        "window:40,-1",
        "percentile:-1,50",
        "percentile:50,101",
        "percentile:60,50",
        "range:0,inf",
        "percentile:1,2;3,4",
        "auto:",
        "range:-1e308,1e308",
        "range:0,1;",
    ],
)
def test_other_intensities_are_refused_in_one_line(text):
    with pytest.raises(ConfigError, match=r"^intensity: got .*") as error:
        parse_intensity(text)
    assert "\n" not in str(error.value)


def test_bands_and_tiles_are_parsed():
    assert parse_bands("3,2,1") == (3, 2, 1) and parse_bands(None) == ()
    assert (
        parse_tiles("224") == (224, None) and parse_tiles("224:112") == (224, 112) and parse_tiles(None) == (None,) * 2
    )
    for text in ("", "0", "1,0", "a", "1,", "1 2", "-1"):
        with pytest.raises(ConfigError, match=r"^bands: "):
            parse_bands(text)
    for text in ("", "0", "224:0", "224:", "a", "224:112:1", "-5", "1.5"):
        with pytest.raises(ConfigError, match=r"^tiles: "):
            parse_tiles(text)


# files: the same values in every kind that holds more than 8 bits

RANGE = Reading(of_range(500, 3500))


def mapped(values: np.ndarray, low: float = 500, high: float = 3500) -> np.ndarray:
    return ranged(values, low, high)


def pnm(values: np.ndarray, largest: int, magic: bytes) -> bytes:
    plain = " ".join(map(str, values.reshape(-1).tolist())).encode()
    body = plain if magic in (b"P2", b"P3") else values.astype(">u2").tobytes()
    return b"%s # a comment\n%d %d\n#another\n%d\n" % (magic, values.shape[1], values.shape[0], largest) + body


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def files_of(values: np.ndarray) -> dict[str, bytes]:
    """Return files of uint16 [H, W, C] up to 4095, C = 1 or 3."""
    imagecodecs = pytest.importorskip("imagecodecs")
    squeezed = values[..., 0] if values.shape[2] == 1 else values
    binary, plain = (b"P5", b"P2") if values.shape[2] == 1 else (b"P6", b"P3")
    photometric = BLACK_IS_ZERO if values.shape[2] == 1 else RGB
    files = {
        "png": imagecodecs.png_encode(squeezed),
        "pnm": pnm(values, 4095, binary),
        "plain pnm": pnm(values, 4095, plain),
        "npy": npy(squeezed),
        "npy, big-endian": npy(squeezed.astype(">u2")),
        "npy, signed": npy(squeezed.astype(np.int16)),
        "npy, float32": npy(squeezed.astype(np.float32)),
        "npy, float64": npy(squeezed.astype(np.float64)),
    }
    for order in "<>":
        kinds = [
            (16, UNSIGNED, ""),
            (16, SIGNED, ", signed"),
            (32, UNSIGNED, ""),
            (32, SIGNED, ", signed"),
            (32, FLOAT, ", float"),
        ]
        for (bits, sample_format, word), planar, compression in itertools.product(
            kinds, (False, True), (NONE, DEFLATE)
        ):
            if planar and values.shape[2] == 1:
                continue
            kind = Kind(bits, photometric, sample_format, planar, (), order, compression)
            files[f"tiff, {bits} bits{word}, {order}, planar {planar}, {compression}"] = write_tiff([values], kind)
    return files


@pytest.mark.parametrize("bands", [1, 3])
def test_every_kind_of_file_is_mapped_by_its_values(bands):
    values = np.random.default_rng(0).integers(0, 4096, (9, 7, bands)).astype(np.uint16)
    want = mapped(values.transpose(2, 0, 1))
    for name, data in files_of(values).items():
        got = decode(data, channels=bands, reading=RANGE).numpy()
        assert np.array_equal(got, want), name
        assert np.array_equal(decode(data, reading=RANGE).numpy(), np.broadcast_to(want, (3, 9, 7))), name
        chosen = Reading(RANGE.intensity, bands=(bands, 1))
        assert np.array_equal(decode(data, channels=2, reading=chosen).numpy(), want[[bands - 1, 0]]), name
        with pytest.raises(BadImage, match=rf"has {bands} bands?; --bands asks for number 4"):
            decode(data, reading=Reading(bands=(4,)))


def test_white_is_zero_is_inverted_once_after_the_map():
    values = np.array([[0, 1000, 65535]], np.uint16)[..., None]
    eight = write_tiff([np.array([[0, 100, 255]], np.uint8)[..., None]], Kind(8, WHITE_IS_ZERO))
    got = decode(eight, channels=1, reading=Reading(of_range(0, 200))).flatten().tolist()
    assert got == [255, 255 - 128, 0]  # and not the range of pixels that are turned already
    assert decode(eight, channels=1).flatten().tolist() == [255, 155, 0]
    for bits, order, compression in itertools.product((12, 16), "<>", (NONE, DEFLATE)):
        data = write_tiff([values & (1 << bits) - 1], Kind(bits, WHITE_IS_ZERO, order=order, compression=compression))
        got = decode(data, channels=1, reading=Reading(of_range(0, 2000))).flatten().tolist()
        assert got == [255, 255 - 128, 0], (bits, order)
        if bits == 16:  # Pillow reads no 12 bits of which white is zero
            assert decode(data, channels=1).flatten().tolist() == [255, 255 - (1000 >> (bits - 8)), 0]


def test_orientation_and_alpha_of_files_of_16_bits():
    imagecodecs = pytest.importorskip("imagecodecs")
    values = np.arange(6, dtype=np.uint16).reshape(2, 3, 1) * 600
    turned = decode(write_tiff([values], Kind(16, orientation=6)), channels=1, reading=RANGE)
    assert np.array_equal(turned[0].numpy(), np.rot90(mapped(values)[..., 0], -1))
    gray = values[..., 0]
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(gray).save(file, "PNG", exif=exif)
    turned = decode(file.getvalue(), channels=1, reading=RANGE)
    assert np.array_equal(turned[0].numpy(), np.rot90(mapped(gray), -1))
    alpha = np.array([[0, 65535, 65535], [32768, 65535, 0]], np.uint16)
    over_white = [
        round((int(v) * int(a) + 65535 * (65535 - int(a))) / 65535) for v, a in zip(gray.flat, alpha.flat, strict=True)
    ]
    want = mapped(np.array(over_white).reshape(2, 3))
    got = decode(imagecodecs.png_encode(np.stack([gray, alpha], -1)), reading=RANGE)
    assert np.array_equal(got[1].numpy(), want)
    rgba = np.stack([gray, gray, gray, alpha], -1)
    assert np.array_equal(decode(imagecodecs.png_encode(rgba), reading=RANGE)[2].numpy(), want)
    assert decode(imagecodecs.png_encode(rgba), channels=4, reading=RANGE)[3].flatten().tolist() == [
        0,
        255,
        255,
        255,
        255,
        0,
    ]


def test_pixels_of_eight_bits_stay_unless_a_range_is_asked_for():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    file = io.BytesIO()
    image.save(file, "PNG")
    for intensity in (Intensity(), FULL, of_range(500, 3500, "auto"), Intensity("percentile")):
        assert torch.equal(decode(file.getvalue(), reading=Reading(intensity)), decode(file.getvalue()))
    got = decode(file.getvalue(), reading=Reading(of_range(0, 47)))
    assert np.array_equal(got.permute(1, 2, 0).numpy(), ranged(np.asarray(image), 0, 47))
    green = decode(file.getvalue(), reading=Reading(bands=(2,)))
    assert np.array_equal(green.numpy(), np.stack([np.asarray(image)[..., 1]] * 3))


def test_images_in_memory_are_mapped_alike():
    values = np.random.default_rng(0).integers(0, 4096, (9, 7, 3))
    for dtype in (np.uint16, ">u2", np.int32, np.float32):
        got = pixels_of(values.astype(dtype), reading=RANGE)
        assert np.array_equal(got.numpy(), mapped(values.transpose(2, 0, 1))), dtype
    gray = values[..., 0]
    for image in (Image.fromarray(gray.astype(np.uint16)), Image.fromarray(gray.astype(np.float32))):
        assert np.array_equal(pixels_of(image, 1, RANGE)[0].numpy(), mapped(gray)), image.mode
    assert np.array_equal(pixels_of(values, 1, Reading(RANGE.intensity, bands=(2,)))[0].numpy(), mapped(values[..., 1]))


def test_npy_axes_are_told_by_the_user():
    values = np.random.default_rng(0).integers(0, 256, (3, 5, 3)).astype(np.uint8)
    with pytest.raises(BadImage, match="cannot be told apart; give --axes YXC or CYX"):
        decode(npy(values))
    assert np.array_equal(decode(npy(values), reading=Reading(axes="CYX")).numpy(), values)
    assert np.array_equal(decode(npy(values), reading=Reading(axes="YXC")).permute(1, 2, 0).numpy(), values)
    with pytest.raises(BadImage, match="--axes YX does not fit"):
        decode(npy(values), reading=Reading(axes="YX"))
