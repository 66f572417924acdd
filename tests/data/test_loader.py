"""Loader: order, resume, ranks, replacement of bad images (I1, I2, I5), evaluation images against timm."""

from __future__ import annotations

import csv
import io
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from upstep_fast.config.reading import Reading
from upstep_fast.data.loading import fetcher
from upstep_fast.data.loading import loader as loaders
from upstep_fast.data.loading.loader import Loader, load_images, permutation
from upstep_fast.data.loading.ordered_map import ahead, ordered_map
from upstep_fast.data.loading.skipped_images import SkippedImages
from upstep_fast.data.sources.part import Item
from upstep_fast.data.sources.source import open_source
from upstep_fast.data.views.make_views import random_views
from upstep_fast.data.views.view_config import ViewConfig
from upstep_fast.errors import DataError


def write_images(root: Path, count: int, size: tuple[int, int] = (12, 10)) -> Path:
    """Write images whose number can be read from their pixels: image i has the color (i, i // 256, 0)."""
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (i % 256, i // 256, 0)).save(root / f"{i:05d}.png", compress_level=0)
    return root


def spoil(root: Path, *which: int) -> None:
    for i in which:
        (root / f"{i:05d}.png").write_bytes(b"" if i % 2 else b"<html>not found</html>")


def numbers(batch) -> list[int]:
    return [int(image[0, 0, 0]) + 256 * int(image[1, 0, 0]) for image in batch.images]


def take(loader: Loader, steps: int) -> list:
    with loader:
        return [next(loader) for _ in range(steps)]


def data_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("upstep-data")]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 50)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_an_epoch_visits_every_image_once(images, num_workers):
    source = open_source(images)
    batches = take(Loader(source, batch_size=10, seed=3, num_workers=num_workers), 10)
    for epoch in (0, 1):
        part = batches[5 * epoch : 5 * epoch + 5]
        assert sorted(i for b in part for i in b.indices.tolist()) == list(range(50))
        assert {b.epoch for b in part} == {epoch}
    for batch in batches:
        assert numbers(batch) == batch.indices.tolist()
        assert batch.replaced == 0 and batch.indices.dtype == torch.int64
        assert all(image.dtype == torch.uint8 and image.shape == (3, 10, 12) for image in batch.images)
    assert [b.indices.tolist() for b in batches[:5]] != [b.indices.tolist() for b in batches[5:]]


def test_the_number_of_workers_changes_nothing(images):
    source = open_source(images)
    runs = [take(Loader(source, batch_size=7, seed=1, num_workers=n), 15) for n in (0, 2, 5)]
    for a, b, c in zip(*runs, strict=True):
        assert a.indices.tolist() == b.indices.tolist() == c.indices.tolist()
        assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))


def test_permutations_are_uniform():
    n, epochs = 20, 4000
    place = np.stack([permutation(n, 0, e) for e in range(epochs)])
    assert (np.sort(place, 1) == np.arange(n)).all()
    counts = np.stack([np.bincount(place[:, i], minlength=n) for i in range(n)])
    chi2 = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    freedom = (n - 1) ** 2
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)
    assert permutation(5, 0, 0, shuffle=False).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("step", [0, 1, 6, 7, 8, 23])
def test_resume_at_any_step_is_exact(images, step):
    source = open_source(images)
    unbroken = take(Loader(source, batch_size=7, seed=9, num_workers=2), 30)
    resumed = take(Loader(source, batch_size=7, seed=9, num_workers=2, start_step=step), 5)
    loader = Loader(source, batch_size=7, seed=9, num_workers=2)
    with loader:
        next(loader)
        loader.seek(step)
        sought = [next(loader) for _ in range(5)]
    for want, a, b in zip(unbroken[step : step + 5], resumed, sought, strict=True):
        assert want.indices.tolist() == a.indices.tolist() == b.indices.tolist()
        assert want.epoch == a.epoch == b.epoch


def test_resume_far_into_a_large_source_takes_under_a_second():
    class Numbers:
        def __len__(self) -> int:
            return 1_300_000

    # processor time: one thread sorts, and a busy machine must not fail this
    start = time.process_time()
    loader = Loader(Numbers(), batch_size=1000, seed=0, start_step=1_234_567)  # type: ignore[arg-type]
    epoch, indices = loader.indices(loader.step)
    assert time.process_time() - start < 1 and epoch == 1_234_567 // 1300 and len(set(indices)) == 1000


def test_ranks_share_a_batch_without_overlap(images):
    source = open_source(images)
    whole = take(Loader(source, batch_size=12, seed=0), 6)
    parts = [take(Loader(source, batch_size=12, seed=0, rank=r, world_size=3), 6) for r in range(3)]
    for step, want in enumerate(whole):
        assert want.indices.tolist() == [i for part in parts for i in part[step].indices.tolist()]


def test_without_drop_last_the_rest_is_a_smaller_batch(images):
    batches = take(Loader(open_source(images), batch_size=20, seed=0, drop_last=False), 4)
    assert [len(b.images) for b in batches] == [20, 20, 10, 20] and [b.epoch for b in batches] == [0, 0, 0, 1]
    with Loader(open_source(images), batch_size=80, seed=0, drop_last=False) as loader:
        assert len(next(loader).images) == 50


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 51}, "above the 50 images"),
        ({"batch_size": 9, "world_size": 2}, "multiple of world_size 2"),
        ({"batch_size": 8, "world_size": 2, "rank": 2}, "rank"),
        ({"batch_size": 8, "world_size": 2, "drop_last": False}, "drop_last"),
        ({"batch_size": 8, "start_step": -1}, "step"),
    ],
)
def test_wrong_arguments_are_named(images, options, words):
    with pytest.raises(ValueError, match=words):
        Loader(open_source(images), seed=0, **options)


# bad images


@pytest.mark.parametrize("num_workers", [0, 3])
def test_bad_images_are_replaced_counted_and_listed(tmp_path, num_workers):
    source = open_source(write_images(tmp_path / "i", 50))
    spoil(tmp_path / "i", 4, 17, 33)
    options = {"batch_size": 10, "seed": 2, "num_workers": num_workers, "max_bad_fraction": 0.1}
    loader = Loader(source, **options)
    batches = take(loader, 10)
    for epoch in (0, 1):
        part = batches[5 * epoch : 5 * epoch + 5]
        assert sum(b.replaced for b in part) == 3
        planned = [i for t in range(5 * epoch, 5 * epoch + 5) for i in loader.indices(t)[1].tolist()]
        got = [i for b in part for i in b.indices.tolist()]
        changed = [i for i, j in zip(planned, got, strict=True) if i != j]
        assert sorted(changed) == [4, 17, 33] and not {4, 17, 33} & set(got)
    assert all(numbers(b) == b.indices.tolist() for b in batches)
    assert {Path(name).name: reason for name, reason in loader.skipped.items()} == {
        "00004.png": "not an image in a known format (it holds HTML or XML)",
        "00017.png": "the file is empty",
        "00033.png": "the file is empty",
    }
    # equal in a repeated run, and in a resumed one that has not met the bad images yet
    again = take(Loader(source, **{**options, "start_step": 7}), 3)
    assert [b.indices.tolist() for b in again] == [b.indices.tolist() for b in batches[7:]]
    assert [b.replaced for b in again] == [b.replaced for b in batches[7:]]


def test_replacements_are_spread_over_the_source(tmp_path):
    """Over many epochs an image's replacements are uniform over all other images."""
    source = open_source(write_images(tmp_path / "i", 20))
    spoil(tmp_path / "i", 5)
    with Loader(source, batch_size=20, seed=0, max_bad_fraction=0.1) as loader:
        drawn = []
        for _ in range(600):
            batch = next(loader)
            planned = loader.indices(loader.step - 1)[1].tolist()
            drawn += [j for i, j in zip(planned, batch.indices.tolist(), strict=True) if i != j]
    counts = np.bincount(drawn, minlength=20)
    assert counts[5] == 0 and counts.sum() == 600
    chi2 = ((np.delete(counts, 5) - 600 / 19) ** 2 / (600 / 19)).sum()
    assert chi2 < 18 + 5 * np.sqrt(2 * 18)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_bad_images_end_the_run(tmp_path, num_workers):
    source = open_source(write_images(tmp_path / "i", 40))
    spoil(tmp_path / "i", *range(10, 16))
    loader = Loader(source, batch_size=8, seed=0, num_workers=num_workers, max_bad_fraction=0.1)
    with loader, pytest.raises(DataError) as caught:
        for _ in range(20):
            next(loader)
    message = str(caught.value)
    assert "of 40 images" in message and "10.00% allowed" in message and "--max-bad-fraction" in message
    assert next(iter(loader.skipped)) in message and "\n" not in message
    assert not data_threads()


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_the_run_ends_at_the_batch_that_has_one_too_many(tmp_path, num_workers):
    """Bad images of batches decoded ahead do not count yet: the end does not depend on the number of threads."""
    source = open_source(write_images(tmp_path / "i", 60))
    order = permutation(60, 0, 0)
    spoil(tmp_path / "i", *order[[2, 33, 34, 52, 53]].tolist())  # two may be bad: the third is in the fourth batch
    with Loader(source, batch_size=10, seed=0, num_workers=num_workers, max_bad_fraction=0.034) as loader:
        seen = [len(next(loader).images) for _ in range(3)]
        time.sleep(0.2)
        assert seen == [10, 10, 10] and len(loader.skipped) == 1
        with pytest.raises(DataError, match="3 of 60"):
            next(loader)
    with Loader(source, batch_size=10, seed=0, num_workers=num_workers, max_bad_fraction=0.05) as loader:
        assert [len(next(loader).images) for _ in range(5)] == [10] * 5
        with pytest.raises(DataError, match="5 of 60"):
            next(loader)


def test_all_bad_ends_the_run_even_if_all_may_be_bad(tmp_path):
    source = open_source(write_images(tmp_path / "i", 10))
    spoil(tmp_path / "i", *range(10))
    with (
        Loader(source, batch_size=5, seed=0, max_bad_fraction=1.0) as loader,
        pytest.raises(DataError, match="in a row"),
    ):
        next(loader)


def test_a_file_deleted_after_listing_is_replaced(tmp_path):
    source = open_source(write_images(tmp_path / "i", 10))
    (tmp_path / "i" / "00003.png").unlink()
    with Loader(source, batch_size=10, seed=0, max_bad_fraction=0.2) as loader:
        assert next(loader).replaced == 1
    assert list(loader.skipped.values()) == ["cannot be read: No such file or directory"]


def test_skipped_csv(tmp_path):
    root = write_images(tmp_path / "i", 20)
    (root / "dangling.jpg").symlink_to(root / "nowhere")
    bad = root / 'a, "b"\n.png'
    bad.write_bytes(b"no image")
    with Loader(open_source(root), batch_size=21, seed=0, max_bad_fraction=0.2) as loader:
        loader.write_skipped(tmp_path / "empty.csv")
        next(loader)
        loader.write_skipped(tmp_path / "skipped.csv")
    rows = list(csv.reader(io.StringIO((tmp_path / "skipped.csv").read_text())))
    assert rows[0] == ["name", "reason"]
    assert rows[1] == [str(root / "dangling.jpg"), "a link to nothing"]
    assert rows[2][0] == str(bad) and "not an image" in rows[2][1] and len(rows) == 3
    assert (tmp_path / "empty.csv").read_text().startswith("name,reason\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.csv", "i", "skipped.csv"]


# threads


def test_close_ends_the_threads_and_the_loader(images):
    loader = Loader(open_source(images), batch_size=10, seed=0, num_workers=4)
    next(loader)
    assert data_threads()
    loader.close()
    loader.close()
    assert not data_threads()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_an_error_in_a_worker_is_raised_and_does_not_hang(images):
    class Broken:
        problems = ()

        def __len__(self) -> int:
            return 50

        def name(self, index: int) -> str:
            return str(index)

        def item(self, index: int) -> Item:
            raise KeyError("a mistake in the source")

    with Loader(Broken(), batch_size=10, seed=0, num_workers=2) as loader, pytest.raises(KeyError, match="a mistake"):  # type: ignore[arg-type]
        next(loader)
    assert not data_threads()


def test_views_made_by_the_loader_are_those_of_the_batch(images):
    """On a CPU no views are computed ahead: one call of make_views per batch."""
    calls = []

    def make(batch):
        calls.append(batch.indices.tolist())
        return random_views(batch.images, ViewConfig(size=8), seed=0, epoch=batch.epoch, indices=batch.indices)

    source = open_source(images)
    with Loader(source, batch_size=10, seed=0, num_workers=2, make_views=make, device=torch.device("cpu")) as loader:
        for step in range(7):
            batch = next(loader)
            assert len(calls) == step + 1 and calls[-1] == batch.indices.tolist()
            want = random_views(batch.images, ViewConfig(size=8), seed=0, epoch=batch.epoch, indices=batch.indices)
            assert torch.equal(batch.views, want)
    assert not data_threads()


@pytest.mark.gpu
def test_views_are_made_on_a_stream_of_their_own(images):
    """Computed ahead of time: equal to those computed in line, complete when the step reads them, errors in order."""
    device = torch.device("cuda")

    def make(batch):
        assert torch.cuda.current_stream() != torch.cuda.default_stream()
        torch.cuda._sleep(10_000_000)  # the event must be waited for
        key = {"seed": 0, "epoch": batch.epoch, "indices": batch.indices}
        return random_views(batch.images, ViewConfig(size=32), **key, device=device)

    source = open_source(images)
    with Loader(source, batch_size=10, seed=0, num_workers=2, make_views=make, device=device) as loader:
        for _ in range(12):
            batch = next(loader)
            key = {"seed": 0, "epoch": batch.epoch, "indices": batch.indices}
            want = random_views(batch.images, ViewConfig(size=32), **key, device=device)
            assert torch.equal(batch.views.clone(), want)
        torch.cuda.synchronize()
        time.sleep(0.5)
        next(loader)
        assert loader.data_wait < 0.05
    assert not data_threads()


def test_ahead_keeps_order_depth_and_the_place_of_an_error():
    made, closed = [], []

    def items():
        try:
            for i in range(5):
                made.append(i)
                yield i
            raise KeyError("the sixth")
        finally:
            closed.append(threading.current_thread().name)

    done = ahead(items(), 2)
    assert next(done) == 0
    time.sleep(0.3)
    assert made == [0, 1, 2, 3]  # two ready, one in hand
    assert [next(done) for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(KeyError, match="sixth"):
        next(done)
    assert closed == ["upstep-data-ahead"] and not data_threads()
    early = ahead((i for i in range(10**9)), 2)
    assert next(early) == 0
    early.close()
    assert not data_threads() and list(ahead((i for i in range(3)), 1)) == [0, 1, 2]


def test_ordered_map_keeps_order_and_limit():
    running, most, started = 0, 0, 0
    lock = threading.Lock()

    def work(i: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.001 * (i % 5))
        with lock:
            running -= 1
        return i

    def items():
        nonlocal started
        for i in range(1000):
            started = i + 1
            yield i

    done = ordered_map(work, items(), 4, ahead=8)
    assert [next(done) for _ in range(50)] == list(range(50))
    assert started <= 58 and 2 <= most <= 4
    done.close()


def test_data_wait_is_measured(images):
    class Gated:
        problems = ()
        open, read_so_far = threading.Event(), 0
        source, reading = open_source(images), Reading()

        def __len__(self) -> int:
            return 50

        def name(self, index: int) -> str:
            return self.source.name(index)

        def item(self, index: int) -> Item:
            self.open.wait(10)
            self.read_so_far += 1
            return self.source.item(index)

    gated = Gated()
    with Loader(gated, batch_size=10, seed=0, num_workers=1) as loader:  # type: ignore[arg-type]
        threading.Timer(0.2, gated.open.set).start()
        next(loader)
        assert loader.data_wait >= 0.15
        while gated.read_so_far < 25:  # the second batch is ready
            time.sleep(0.01)
        next(loader)
        assert loader.data_wait < 0.15


def test_small_sources_are_decoded_once(images, monkeypatch):
    read = []
    real = fetcher.read_image
    monkeypatch.setattr(fetcher, "read_image", lambda s, i, **k: (read.append(i), real(s, i, **k))[1])
    take(Loader(open_source(images), batch_size=10, seed=0), 20)
    assert sorted(read) == list(range(50))
    read.clear()
    monkeypatch.setattr(loaders, "CACHE_BYTES", 10 * 3 * 12 * 10)  # room for ten images
    take(Loader(open_source(images), batch_size=10, seed=0), 20)
    assert len(read) == 50 + 3 * 40


def _memory_growth(images: Path, steps: int, monkeypatch) -> float:
    monkeypatch.setattr(loaders, "CACHE_BYTES", 0)
    with Loader(open_source(images), batch_size=25, seed=0, num_workers=2) as loader:
        tracemalloc.start()
        for _ in range(20):  # from now on as many batches are in flight as ever
            next(loader)
        start = tracemalloc.get_traced_memory()[0]
        for _ in range(steps):
            next(loader)
        growth = tracemalloc.get_traced_memory()[0] - start
        tracemalloc.stop()
    return growth / (25 * steps)


def test_memory_is_flat(images, monkeypatch):
    assert _memory_growth(images, 200, monkeypatch) < 30, "bytes a sample"


@pytest.mark.long
def test_memory_is_flat_over_a_hundred_thousand_samples(images, monkeypatch, record_property):
    growth = _memory_growth(images, 4000, monkeypatch)
    record_property("samples", 4000 * 25)
    record_property("bytes_a_sample", round(growth, 3))
    assert growth < 1.5, "bytes a sample"


def test_large_jpegs_are_decoded_at_a_fraction_for_small_views(tmp_path):
    Image.new("RGB", (1600, 1200), (9, 90, 200)).save(tmp_path / "large.jpg")
    source = open_source(tmp_path)
    for side, want in ((None, (1200, 1600)), (150, (150, 200)), (151, (300, 400)), (600, (600, 800))):
        image = take(Loader(source, batch_size=1, seed=0, min_side=side), 1)[0].images[0]
        assert image.shape[1:] == want
    # a crop of the least area and the narrowest shape still has as many pixels as the view
    config = ViewConfig(size=224, crop_scale=(0.25, 1.0), crop_ratio=(3 / 4, 4 / 3))
    assert config.min_side == 518 and (config.min_side**2 * 0.25 * 0.75) ** 0.5 >= 224


# evaluation


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "crop_pct"), [(64, 1.0), (64, 0.875), (96, 0.95), ((48, 80), 0.9)])
def test_evaluation_images_equal_timms(tmp_path, shared, size, crop_pct, interpolation):
    from timm.data import create_transform

    rng = np.random.default_rng(0)
    for n, (h, w) in enumerate([(64, 64), (60, 100), (150, 71), (33, 40), (500, 400), (80, 81)]):
        blocks = Image.fromarray(rng.integers(0, 255, (h // 8 + 1, w // 8 + 1, 3), np.uint8))
        blocks.resize((w, h), Image.Resampling.BICUBIC).save(tmp_path / f"{n}.png")
    real = open_source(shared / "pacs_cartoon_64.tar", "test")
    hw = (size, size) if isinstance(size, int) else size
    transform = create_transform(
        input_size=(3, *hw),
        crop_pct=crop_pct,
        interpolation=interpolation,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        is_training=False,
    )
    for source, indices in ((open_source(tmp_path), None), (real, range(0, 200, 20))):
        seen = 0
        for found, x in load_images(
            source, indices, size=size, interpolation=interpolation, crop_pct=crop_pct, batch_size=4
        ):
            for i, got in zip(found.tolist(), x, strict=True):
                with Image.open(io.BytesIO(source.read(i))) as image:
                    want = transform(image.convert("RGB"))
                assert got.shape == want.shape and (got - want * 255).abs().max() <= 2.01, source.name(i)
                seen += 1
        assert seen == (len(source) if indices is None else len(indices))


def test_evaluation_skips_counts_and_refuses(tmp_path):
    source = open_source(write_images(tmp_path / "i", 30))
    spoil(tmp_path / "i", 0, 8, 9, 10, 11, 29)
    skipped = SkippedImages()
    options = {"size": 8, "batch_size": 4, "skipped": skipped}
    batches = list(load_images(source, max_bad_fraction=0.3, num_workers=2, **options))
    assert [i for found, _ in batches for i in found.tolist()] == [
        i for i in range(30) if i not in (0, 8, 9, 10, 11, 29)
    ]
    assert all(x.shape == (len(found), 3, 8, 8) and x.dtype == torch.uint8 for found, x in batches)
    assert all(x[0, 0, 0, 0] == found[0] for found, x in batches)
    assert sorted(Path(name).name for name in skipped) == [f"{i:05d}.png" for i in (0, 8, 9, 10, 11, 29)]
    with pytest.raises(DataError, match="raise --max-bad-fraction"):
        list(load_images(source, size=8))
    assert not data_threads()
    with pytest.raises(ValueError, match="interpolation"):
        list(load_images(source, [1], size=9, interpolation="nearest"))


def test_the_real_images(shared):
    source = open_source(shared / "sign_digits_64.tar", "train")
    with Loader(source, batch_size=256, seed=0, num_workers=2) as loader:
        batch = next(loader)
    assert torch.stack(batch.images).shape == (256, 3, 64, 64) and batch.replaced == 0 and not loader.skipped
