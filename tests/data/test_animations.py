"""Frames of animations as images, by `--slice`: the values that were written."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from upstep_fast.config.reading import Reading
from upstep_fast.data.formats import animations
from upstep_fast.data.loading.skipped_images import read_image
from upstep_fast.data.reading.stored import Piece
from upstep_fast.data.sources import open_source
from upstep_fast.errors import BadImage

# three frames [3, 8, 12, 3] of few colors, each of which is the brightest somewhere
COLORS = np.array([[250, 10, 0], [0, 200, 30], [5, 0, 220], [90, 90, 90]], np.uint8)
FRAMES = COLORS[np.random.default_rng(0).integers(0, 4, (3, 8, 12))]
FORMATS = {"gif": {}, "webp": {"lossless": True, "exact": True}, "png": {"format": "PNG"}, "apng": {"format": "PNG"}}


def write(path, frames, **options):
    first, *others = map(Image.fromarray, frames)
    first.save(path, save_all=True, append_images=others, duration=40, **options)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("slices", "expected", "places"),
    [
        ("auto", FRAMES[:1], [""]),
        ("all", FRAMES, ["#f=0", "#f=1", "#f=2"]),
        ("middle", FRAMES[1:2], ["#f=1"]),
        ("max", FRAMES.max(0)[None], [""]),
    ],
)
def test_frames_are_images(tmp_path, suffix, slices, expected, places):
    write(tmp_path / f"film.{suffix}", FRAMES, **FORMATS[suffix])
    Image.fromarray(FRAMES[0]).save(tmp_path / "still.png")
    source = open_source(tmp_path, reading=Reading(slices=slices))
    names = [f"{tmp_path}/film.{suffix}{place}" for place in places]
    assert [source.name(i) for i in range(len(source))] == [*names, f"{tmp_path}/still.png"]
    for index, frame in enumerate([*expected, FRAMES[0]]):
        assert np.array_equal(read_image(source, index).permute(1, 2, 0).numpy(), frame)


def test_transparent_pixels_are_white(tmp_path):
    frames = np.dstack([FRAMES[0], np.full((8, 12), 255, np.uint8)])[None].repeat(2, 0).copy()
    frames[1, :4] = 0
    write(tmp_path / "film.webp", frames, lossless=True, exact=True)
    found = animations.read((tmp_path / "film.webp").read_bytes(), Piece((("F", 1),))).values
    assert (found[:, :4] == 255).all() and np.array_equal(found[:, 4:], FRAMES[0][4:].transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_what_cannot_be_read_is_left_out_with_its_reason(tmp_path, suffix, monkeypatch):
    file = io.BytesIO()
    write(file, FRAMES, **{"format": suffix} | FORMATS[suffix])
    data = file.getvalue()
    for cut in range(0, len(data), 7):  # a BadImage or pixels, never another error
        try:
            for frame in range(animations.layout(data[:cut]).size("F")):
                assert animations.read(data[:cut], Piece((("F", frame),))).values.shape == (3, 8, 12)
        except BadImage:
            pass
    with pytest.raises(BadImage, match="F=3 of a file with 3 along F"):
        animations.read(data, Piece((("F", 3),)))
    monkeypatch.setattr(animations, "MAX_ALL", 200)
    (tmp_path / f"film.{suffix}").write_bytes(data)
    Image.fromarray(FRAMES[0]).save(tmp_path / "still.png")
    source = open_source(tmp_path, reading=Reading(slices="all"))
    ((name, reason),) = source.problems
    assert (
        "film" in name
        and reason.startswith("3 frames of 12 x 8 pixels, in all above the limit of 200")
        and len(source) == 1
    )
