from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from upstep_fast.config.reading import Reading
from upstep_fast.data.reading import tiles
from upstep_fast.data.reading.recent import Recent
from upstep_fast.data.reading.stored import Layout, Piece, Stored
from upstep_fast.errors import BadImage


def of_array(*levels: np.ndarray, low=0, high=255):
    """Return a reader of pictures [H, W, C] that are the levels of a file."""

    def read(file, piece: Piece) -> Stored:
        values = np.moveaxis(levels[piece.level], -1, 0)
        top, left, height, width = piece.window or (0, 0, *values.shape[1:])
        part = values[:, top : top + height, left : left + width]
        assert part.shape[1:] == (height, width)
        return Stored(part, low, high)

    return read


def layout_of(*sizes: tuple[int, int], mpp: float | None = None) -> Layout:
    return Layout("CYX", (3, *sizes[0]), "TIFF", sizes if len(sizes) > 1 else (), mpp)


@given(st.integers(1, 300), st.integers(1, 100), st.integers(1, 100))
@settings(max_examples=200, deadline=None)
def test_tiles_cover_every_pixel_and_end_at_the_edge(size, tile, stride):
    begin = tiles.starts(size, tile, stride)
    side = min(tile, size)
    assert begin[0] == 0 and begin[-1] + side == size and (np.diff(begin) > 0).all()
    assert (begin[:-1] == stride * np.arange(len(begin) - 1)).all()
    if stride <= tile:
        covered = {pixel for start in begin for pixel in range(start, start + side)}
        assert covered == set(range(size))


def test_a_grid_counts_and_places_its_tiles():
    grid = tiles.grid(layout_of((500, 300)), Reading(tile=224, stride=100))
    places = [(0, 0), (0, 76), (100, 0), (100, 76), (200, 0), (200, 76), (276, 0), (276, 76)]
    assert [piece.window for piece in grid] == [(top, left, 224, 224) for top, left in places]
    assert len(grid) == 8 and tiles.named(grid[-1]) == "level=0,x=76,y=276"
    small = tiles.grid(layout_of((100, 300)), Reading(tile=224))
    assert [piece.window for piece in small] == [(0, 0, 100, 224), (0, 76, 100, 224)]


PYRAMID = layout_of((4000, 6000), (2000, 3000), (1000, 1500), mpp=0.25)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({}, (0, 1.0)),
        ({"level": 2}, (2, 1.0)),
        ({"mpp": 0.25}, (0, 1.0)),
        ({"mpp": 0.26}, (0, 1.04)),
        ({"mpp": 0.49}, (0, 1.96)),
        ({"mpp": 0.5}, (1, 1.0)),
        ({"mpp": 0.75}, (1, 1.5)),
        ({"mpp": 8.0}, (2, 8.0)),
        ({"mpp": 0.24}, (0, 0.96)),  # enlarged by less than a tenth
    ],
)
def test_the_level_is_the_coarsest_that_is_fine_enough(choice, expected):
    assert tiles.level_of(PYRAMID, Reading(tile=224, **choice)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("layout", "choice", "words"),
    [
        (PYRAMID, {"level": 3}, ("--level 3", "levels 0 to 2")),
        (layout_of((10, 10)), {"level": 1}, ("--level 1", "only level 0")),
        (layout_of((10, 10)), {"mpp": 0.5}, ("--mpp 0.5", "does not say", "--level")),
        (PYRAMID, {"mpp": 0.1}, ("--mpp 0.1", "0.25 micrometers", "--mpp 0.25 or more")),
    ],
)
def test_a_level_that_is_not_there_is_refused_in_one_line(layout, choice, words):
    with pytest.raises(BadImage) as error:
        tiles.grid(layout, Reading(tile=224, **choice))
    assert all(word in error.value.reason for word in words) and "\n" not in error.value.reason


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("scale", [0.93, 1.37, 2.5, 6.1])
def test_resized_tiles_are_those_of_the_resized_picture(dtype, scale):
    y, x = np.mgrid[:700, :900]
    smooth = 127 + 50 * np.sin(x / 40)[..., None] + 50 * np.cos(y[..., None] / np.array([31.0, 50, 23]))
    image = (smooth * (257 if dtype == np.uint16 else 1)).astype(dtype)
    size = (int(700 / scale), int(900 / scale))
    # the whole picture by Pillow: one pixel of the result is exactly `scale` pixels of the file
    box = (0, 0, size[1] * scale, size[0] * scale)
    whole = np.stack(
        [
            np.asarray(
                Image.fromarray(image[..., band].astype(np.float32)).resize(
                    size[::-1], Image.Resampling.BILINEAR, box=box
                )
            )
            for band in range(3)
        ]
    )
    layout = Layout("CYX", (3, 700, 900), "TIFF", mpp=1.0)
    grid = tiles.grid(layout, Reading(tile=48, stride=48, mpp=scale))
    assert (grid.height, grid.width) == size
    read = of_array(image, low=None, high=None)
    error = 0.0
    for piece in grid:
        stored = tiles.read_piece(read, b"", piece, layout)
        top, left, height, width = piece.window
        assert stored.values.dtype == dtype and stored.values.shape == (3, height, width)
        part = whole[:, top : top + height, left : left + width]
        error = max(error, float(np.abs(stored.values.astype(np.float64) - part).max()))
    # Pillow rounds 8 bits after each direction
    assert error <= {np.uint8: 1.01, np.uint16: 0.6, np.float32: 1e-3}[dtype]


def test_nodata_does_not_bleed_into_resized_tiles():
    image = np.full((200, 200, 1), 1000, np.uint16)
    image[:, 100:] = 65535
    valid = np.ones((200, 200), bool)
    valid[:, 100:] = False

    def read(file, piece):
        top, left, height, width = piece.window
        part = np.s_[top : top + height, left : left + width]
        return Stored(np.moveaxis(image[part], -1, 0), 0, 65535, valid[part])

    layout = Layout("CYX", (1, 200, 200), "TIFF", mpp=1.0)
    (piece,) = tiles.grid(layout, Reading(tile=100, mpp=2.0))
    stored = tiles.read_piece(read, b"", piece, layout)
    assert (stored.values == 1000).all() and stored.valid[:, :50].all() and not stored.valid[:, 50:].any()


def blank_by_hand(image: np.ndarray, grid: tiles.Grid, limit: float) -> list[int]:
    parts = [image[t : t + h, c : c + w] for t, c, h, w in (piece.window for piece in grid)]
    return [k for k, part in enumerate(parts) if part.reshape(-1, part.shape[-1]).astype(float).std(0).max() >= limit]


@pytest.mark.parametrize("levels", [1, 3, 6])
@pytest.mark.parametrize("stride", [64, 40])
def test_blank_tiles_are_left_out(levels, stride):
    rng = np.random.default_rng(0)
    image = np.full((640, 1000, 3), 240, np.uint8)
    blocks = rng.integers(0, 2, (10, 16)) > 0
    for row, column in zip(*np.nonzero(blocks), strict=True):
        part = image[row * 64 : row * 64 + 64, column * 64 : column * 64 + 64]
        part[...] = np.kron(rng.integers(0, 200, (4, 4, 3)), np.ones((16, 16, 1)))[:, : part.shape[1]]
    pyramid = [np.asarray(Image.fromarray(image).reduce(2**k)) for k in range(levels)]
    layout = layout_of(*(level.shape[:2] for level in pyramid))
    grid = tiles.grid(layout, Reading(tile=64, stride=stride))
    read = of_array(*pyramid)
    kept = tiles.without_blank(grid, layout, lambda piece: read(b"", piece)).kept.tolist()
    by_hand = blank_by_hand(image, grid, 1)
    if levels == 1 or stride == 64:
        assert kept == by_hand  # blocks of 16 pixels are seen at 1/8, where a tile has 8
    else:  # at tiles' edges a coarse level may see a neighbor's pixel
        assert set(by_hand) >= set(kept) - set(by_hand) and len(set(kept) ^ set(by_hand)) <= 0.06 * len(grid)


def test_blank_tiles_of_12_bits_in_16_are_told_by_the_range_of_the_file():
    rng = np.random.default_rng(0)
    image = np.full((256, 256, 1), 300, np.uint16)
    image[:128, :128, 0] += rng.integers(0, 400, (128, 128), dtype=np.uint16)  # far below 1/255 of 16 bits
    layout = Layout("CYX", (1, 256, 256), "TIFF")
    grid = tiles.grid(layout, Reading(tile=64))
    read = of_array(image, high=65535)
    kept = tiles.without_blank(grid, layout, lambda piece: read(b"", piece))
    assert [piece.window[:2] for piece in kept] == [(0, 0), (0, 64), (64, 0), (64, 64)]


def test_tiles_without_bytes_are_not_read():
    layout = layout_of((256, 256))
    grid = tiles.grid(layout, Reading(tile=64))
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    asked = []

    def read(piece):
        asked.append(piece.window)
        return of_array(noise)(b"", piece)

    kept = tiles.without_blank(grid, layout, read, lambda piece: piece.window[0] == 64)
    assert len(kept) == 4 and {window[0] for window in asked} == {64}


def test_recent_values_are_bounded_and_made_once():
    recent, made = Recent(100), []

    def make(key, size=40):
        made.append(key)
        return key.upper(), size

    for key in "abab":
        assert recent.get(key, lambda key=key: make(key)) == key.upper()
    assert made == ["a", "b"]
    recent.get("c", lambda: make("c"))  # the oldest goes
    assert recent.held == 80 and recent.get("a", lambda: make("a")) == "A" and made == ["a", "b", "c", "a"]
    recent.get("large", lambda: make("large", 1000))
    assert recent.held == 1000
    with pytest.raises(OSError):
        recent.get("broken", lambda: (_ for _ in ()).throw(OSError("disk")))
    assert recent.get("broken", lambda: make("broken", 1)) == "BROKEN"
