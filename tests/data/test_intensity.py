"""Intensity: stored values to 8 bits, against the formula in float64 or in exact integers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from upstep_fast.config.reading import Intensity, Reading, intensity_text, parse_bands, parse_intensity, parse_tiles
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
