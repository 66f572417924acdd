"""Memory of decoded images: large ones are decoded at a fraction, and what waits or is decoded at once is bounded."""

from __future__ import annotations

import io
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from tiff_files import Kind, write_tiff

from upstep_fast.data.decode import image as decode_module
from upstep_fast.data.decode.image import decode
from upstep_fast.data.decode.size import image_size
from upstep_fast.data.loading import fetcher
from upstep_fast.data.loading import loader as loaders
from upstep_fast.data.loading.loader import Loader
from upstep_fast.data.loading.ordered_map import ordered_map
from upstep_fast.data.reading.budget import Budget
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import ConfigError
from upstep_fast.train.memory import images


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "npy":
        np.save(out, pixels)
    elif kind == "planar TIFF":
        return write_tiff([pixels.astype(int) * 257], Kind(16, 2, planar=True))
    else:
        Image.fromarray(pixels).save(out, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "PPM", "npy", "planar TIFF"])
@pytest.mark.parametrize(("size", "min_side", "factor"), [((96, 130), 20, 4), ((97, 131), 48, 2), ((95, 400), 48, 1)])
def test_large_images_of_any_format_are_means_over_blocks(kind, size, min_side, factor):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    got = decode(encoded(pixels, kind), min_side=min_side).permute(1, 2, 0).numpy()
    height, width = (-(-side // factor) for side in size)
    assert got.shape == (height, width, 3) and min(height, width) >= min(min_side, *size)
    if factor == 1:
        assert np.array_equal(got, pixels)
        return
    whole = pixels[: size[0] // factor * factor, : size[1] // factor * factor].astype(float)
    means = whole.reshape(size[0] // factor, factor, size[1] // factor, factor, 3).mean((1, 3))
    assert np.abs(got[: means.shape[0], : means.shape[1]] - means).max() <= 0.51


def test_gray_and_turned_images_are_shrunk_alike():
    gray = np.random.default_rng(0).integers(0, 256, (64, 96), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.fromarray(gray).save(out, "PNG", exif=exif)
    got = decode(out.getvalue(), min_side=16)
    assert got.shape == (3, 24, 16) and got.stride(0) == 0
    means = np.rot90(gray, -1).reshape(24, 4, 16, 4).mean((1, 3))
    assert np.abs(got[0].numpy() - means).max() <= 0.51


@pytest.mark.parametrize("side", [2_000, pytest.param(10_000, marks=pytest.mark.long)])
def test_many_megapixels_stay_small(side):
    """A picture of 316 kB took 300 MB per copy: a batch of them must not take gigabytes."""
    out = io.BytesIO()
    Image.new("L", (side, side), 77).save(out, "PNG")
    got = decode(out.getvalue(), min_side=side // 18)
    assert got.shape == (3, side // 16, side // 16) and (got == 77).all()
    assert got.untyped_storage().nbytes() == (side // 16) ** 2


def test_images_decoded_at_one_time_are_bounded(monkeypatch):
    """Twelve threads, memory for three images: never more at a time, and one larger than all of it runs alone."""
    width, height = 40, 30
    budget = Budget(3 * decode_module.BYTES_PER_PIXEL * width * height)
    monkeypatch.setattr(decode_module, "decoding", budget)
    real = decode_module._to_array

    def slow(*arguments):
        time.sleep(0.01)
        return real(*arguments)

    monkeypatch.setattr(decode_module, "_to_array", slow)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    large = np.random.default_rng(0).integers(0, 256, (3 * height, 2 * width, 3), np.uint8)
    files = [encoded(pixels if i % 12 else large, "PNG") for i in range(36)]
    results = list(ordered_map(decode, files, 12, ahead=36))
    assert all(x.shape[1:] == ((height, width) if i % 12 else (3 * height, 2 * width)) for i, x in enumerate(results))
    assert budget.held == 0 and budget.peak == 6 * decode_module.BYTES_PER_PIXEL * width * height
    with pytest.raises(KeyError), budget.hold(5):
        raise KeyError("released after an error as well")
    assert budget.held == 0


def _peak_of_a_run(source, monkeypatch) -> tuple[int, list[list[int]]]:
    """Return the most decoded images alive at one time, and the batches' indices."""
    alive, most, lock = 0, 0, threading.Lock()
    real = fetcher.read_image

    def freed() -> None:
        nonlocal alive
        with lock:
            alive -= 1

    def read(*arguments, **options):
        nonlocal alive, most
        image = real(*arguments, **options)
        with lock:
            alive += 1
            most = max(most, alive)
        weakref.finalize(image, freed)
        return image

    monkeypatch.setattr(fetcher, "read_image", read)
    monkeypatch.setattr(loaders, "CACHE_BYTES", 0)
    order = []
    with Loader(source, batch_size=8, seed=0, num_workers=2) as loader:
        for _ in range(6):
            batch = next(loader)
            order.append(batch.indices.tolist())
            time.sleep(0.05)  # the threads get ahead
            del batch
    monkeypatch.setattr(fetcher, "read_image", real)
    return most, order


def test_images_that_wait_are_bounded_by_bytes(tmp_path, monkeypatch):
    for i in range(16):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
    source = open_source(tmp_path)
    unbounded, order = _peak_of_a_run(source, monkeypatch)
    monkeypatch.setattr(loaders, "MAX_AHEAD_BYTES", 4 * 3 * 64 * 64)
    bounded, same = _peak_of_a_run(source, monkeypatch)
    assert order == same
    limit = 2 * 8 + 4 + 2  # the batch in use and the next, four that wait, one in each thread
    assert bounded <= limit < unbounded  # up to three batches and the one in use, as far as the threads get


def test_few_items_are_in_flight_while_their_size_is_unknown():
    started, release = [], threading.Event()

    def work(i: int) -> torch.Tensor:
        started.append(i)
        release.wait(5)
        return torch.zeros(1000, dtype=torch.uint8)

    results = ordered_map(work, range(100), 2, 50, lambda x: x.nbytes, 10_000)
    threading.Timer(0.1, release.set).start()
    assert len(next(results)) == 1000 and len(started) <= 3
    time.sleep(0.05)
    next(results)
    time.sleep(0.05)
    assert 5 <= len(started) <= 13  # ten of 1,000 bytes fit
    assert sum(1 for _ in results) == 98


def test_the_plan_counts_what_the_loader_holds(tmp_path, monkeypatch):
    """The closed form, from headers alone, and a refusal that names the cure where memory does not suffice."""
    for i in range(4):
        Image.new("RGB", (400, 300), (i, 0, 0)).save(tmp_path / f"{i}.png")
    source = open_source(tmp_path)
    options = {"channels": 3, "batch": 4, "num_workers": 2, "device": torch.device("cpu")}
    full, half = (images.estimate(source, min_side=side, **options) for side in (None, 100))
    assert full.mean == 3 * 400 * 300 and half.mean == 3 * 200 * 150
    # in use and the next; three batches that wait; the cache; two threads
    assert full.needed == (2 + 3 + 1) * 4 * full.mean + 2 * 12 * 400 * 300
    assert images.estimate(source, min_side=None, **{**options, "device": torch.device("cuda")}).needed == (
        full.needed + 2 * 4 * full.mean
    )
    monkeypatch.setattr(loaders, "MAX_AHEAD_BYTES", 5 * full.mean)
    monkeypatch.setattr(loaders, "CACHE_BYTES", 0)
    bounded = images.estimate(source, min_side=None, **options)
    assert bounded.needed == (2 * 4 + 5) * full.mean + 2 * 12 * 400 * 300
    images.check(bounded, [None, bounded.needed], 1)
    images.check(bounded, [None], 1)
    with pytest.raises(ConfigError, match=r"decoded images need about .* 4 a step, 2 ranks\).* lower --batch-size"):
        images.check(bounded, [2 * bounded.needed - 1, 1 << 60], 2)


def test_sizes_from_headers():
    pixels = np.zeros((30, 50, 3), np.uint8)
    for kind in ("PNG", "BMP", "TIFF", "WEBP", "PPM", "npy", "planar TIFF", "JPEG", "GIF"):
        assert image_size(encoded(pixels, kind)) == (30, 50), kind
    assert image_size(b"text") is None and image_size(b"") is None and image_size(b"II*\0") is None
