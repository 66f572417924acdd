"""Clips that cannot be read: left out of their batch, listed, and too many of them end the run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from upstep_fast.data.labeled import video
from upstep_fast.data.labeled.batches import Reader
from upstep_fast.data.labeled.clips import train_and_test_clips
from upstep_fast.data.labeled.reader import ReaderOptions
from upstep_fast.errors import BadImage, DataError

CLIPS, FRAMES = 6, 4


@pytest.fixture
def clips(tmp_path):
    for split in ("train", "test"):
        for clip in range(CLIPS):
            folder = tmp_path / split / "ab"[clip % 2] / f"clip{clip}"
            folder.mkdir(parents=True)
            for frame in range(FRAMES):
                pixels = np.full((12, 12, 3), 10 * clip + frame, np.uint8)
                Image.fromarray(pixels).save(folder / f"{frame}.png")
    return tmp_path


def options(**changes) -> ReaderOptions:
    plain = dict(size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear", crop_pct=1.0, views=None)
    run = dict(batch_size=3, seed=0, num_workers=2, max_bad_fraction=0.4, device=torch.device("cpu"), frames=2)
    return ReaderOptions(**{**plain, **run, **changes})  # type: ignore[arg-type]


def test_a_bad_clip_is_left_out_of_its_batch_and_listed(clips):
    (clips / "train" / "a" / "clip2" / "1.png").write_bytes(b"no image")
    Image.new("RGB", (5, 5)).save(clips / "train" / "b" / "clip5" / "3.png")
    data, _ = train_and_test_clips((str(clips),), 2)
    names = [data.source.name(i).rpartition("/")[2] for i in range(CLIPS)]
    bad = {names.index("clip2"), names.index("clip5")}
    reader = Reader(options())
    batches = list(reader.in_order(data))
    assert [i for indices, _ in batches for i in indices.tolist()] == [i for i in range(CLIPS) if i not in bad]
    assert all(x.shape == (len(indices), 2, 3, 8, 8) for indices, x in batches)
    reasons = {name.rpartition("/")[2]: reason for name, reason in reader.skipped.items()}
    assert reasons["clip2"].startswith("frame ") and "1.png: not an image in a known format" in reasons["clip2"]
    assert reasons["clip5"] == "its frames differ in size" and len(reasons) == 2
    training = reader.training(data, 0)
    sizes = [len(next(training)[1]) for _ in range(2)]  # an epoch
    training.close()
    assert sum(sizes) == CLIPS - len(bad)
    with pytest.raises(BadImage, match=r"frame .*1.png: not an image"):
        data.source.read(names.index("clip2"), [1, 3], 3)


def test_too_many_bad_clips_end_the_run(clips):
    for name in ("a/clip0", "a/clip2", "b/clip1"):
        (clips / "train" / name / "1.png").write_bytes(b"")
    data, _ = train_and_test_clips((str(clips),), 2)
    with pytest.raises(DataError, match=r"3 of 6 images cannot be used, more than the 40.00% allowed"):
        list(Reader(options()).in_order(data))


def test_splits_of_clips_by_the_rule_of_images(clips, monkeypatch):
    """Train/ in any case, and val/ where there is no test/: for folders of frames and for video files."""
    (clips / "train").rename(clips / "Train")
    (clips / "test").rename(clips / "VAL")
    for split in ("Train", "VAL"):
        (clips / split / "a" / "one.mp4").write_bytes(b"not decoded here")
        (clips / split / "stray.mp4").write_bytes(b"outside of a class")
    monkeypatch.setattr(video, "count_frames", lambda path: FRAMES)
    train, test = train_and_test_clips((str(clips),), 2)
    for part, split in ((train, "Train"), (test, "VAL")):
        assert len(part.source) == CLIPS + 1 and part.y.tolist().count(0) == CLIPS // 2 + 1
        assert all(f"/{split}/" in part.source.name(i) for i in range(len(part.source)))
        assert f"{split}/ is read" in part.source.summary
