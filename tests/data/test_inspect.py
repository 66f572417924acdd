"""Triage and channel statistics, against planted images and independent implementations."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import upstep_fast
from upstep_fast.data.curation import perceptual_hash as phash
from upstep_fast.data.curation import survey
from upstep_fast.data.curation.perceptual_hash import near, perceptual_hash
from upstep_fast.data.curation.survey import channel_statistics
from upstep_fast.data.curation.triage import Verdict, triage
from upstep_fast.data.decode.image import decode
from upstep_fast.data.sources.source import open_source
from upstep_fast.data.sources.subset import subset
from upstep_fast.errors import ConfigError, DataError
from upstep_fast.train import loop as trainer


def picture(seed: int, height: int = 60, width: int = 80) -> Image.Image:
    """Return smooth patches of color that depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 8, generator=generator)
    x = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0].clamp(0, 1)
    return Image.fromarray((x * 255).byte().permute(1, 2, 0).numpy())


@pytest.fixture
def folder(tmp_path) -> Path:
    """Folder of 40 different images and of everything that triage finds, with names that sort after the images'."""
    root = tmp_path / "images"
    root.mkdir()
    for i in range(40):
        picture(i).save(root / f"{i:02}.png")
    shutil.copy(root / "03.png", root / "copy_of_file.png")
    picture(7).save(root / "copy_of_pixels.bmp")
    picture(11).save(root / "near_jpeg.jpg", quality=80)
    picture(12).resize((160, 120), Image.Resampling.BICUBIC).save(root / "near_large.png")
    Image.new("RGB", (50, 50), (9, 200, 30)).save(root / "blank.png")
    noise = np.random.default_rng(0).integers(100, 102, (50, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "blank_noise.png")
    picture(50).convert("L").save(root / "odd_gray.png")
    picture(51, 200, 20).save(root / "shape_thin.png")
    picture(52, 12, 12).save(root / "shape_small.png")
    twelve_bits = (np.asarray(picture(53).convert("L")).astype(np.uint16)) << 4
    Image.fromarray(twelve_bits).save(root / "z_twelve_bits.png")
    return root


def by_name(source, rows: dict[int, str]) -> dict[str, str]:
    return {Path(source.name(i)).stem: reason for i, reason in rows.items()}


@pytest.mark.parametrize("num_workers", [0, 3])
def test_triage_finds_every_planted_image_and_no_other(folder, num_workers):
    source = open_source(folder)
    verdict = triage(source, num_workers=num_workers)
    left_out, listed = by_name(source, verdict.left_out), by_name(source, verdict.listed)
    assert left_out == {
        "copy_of_file": f"the same pixels as {folder}/03.png",
        "copy_of_pixels": f"the same pixels as {folder}/07.png",
        "blank": "blank: no channel varies by more than 1 of 255 levels",
        "blank_noise": "blank: no channel varies by more than 1 of 255 levels",
    }
    assert set(listed) == {"near_jpeg", "near_large", "odd_gray", "shape_thin", "shape_small", "z_twelve_bits"}
    assert listed["near_jpeg"].startswith(f"nearly the picture {folder}/11.png")
    assert listed["near_large"].startswith(f"nearly the picture {folder}/12.png")
    assert listed["odd_gray"] == "gray, where 96% of the images are color"
    assert listed["shape_thin"] == "20 x 200 pixels" and listed["shape_small"] == "12 x 12 pixels"
    assert "16-bit values, none above 3583" in listed["z_twelve_bits"] and "16-bit gray" in listed["z_twelve_bits"]
    assert verdict.counts == {
        "images": 50, "exact copies": 2, "blank": 2, "near copies": 2, "wrong bit depth": 1, "odd ones out": 2,
        "odd shapes": 2, "unreadable": 0,
    }  # fmt: skip
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))) == verdict


def test_unreadable_images_are_left_to_the_loader(folder):
    (folder / "05.png").write_bytes(b"<html>")
    verdict = triage(open_source(folder), max_bad_fraction=0.05)
    assert verdict.counts["unreadable"] == 1 and len(verdict.left_out) == 4
    with pytest.raises(DataError, match="1 of 50 images cannot be used"):
        triage(open_source(folder), max_bad_fraction=0.01)


def test_kept_images_form_a_source(folder):
    source = open_source(folder)
    verdict = triage(source)
    kept = subset(source, verdict.kept(len(source)), verdict.problems(source))
    assert len(kept) == 46 and kept.fingerprint() != source.fingerprint()
    names = [Path(kept.name(i)).name for i in range(len(kept))]
    assert names == sorted(set(names)) and "blank.png" not in names and "near_jpeg.jpg" in names
    assert all(kept.read(i) == (folder / name).read_bytes() for i, name in enumerate(names))
    reasons = {Path(name).name: reason for name, reason in kept.problems}
    assert len(reasons) == 10 and reasons["shape_thin.png"] == "kept: 20 x 200 pixels"
    assert not reasons["copy_of_file.png"].startswith("kept")


def test_classes_of_kept_images(tmp_path):
    for i, name in enumerate(("a/1", "a/2", "b/3", "b/4")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(0 if i in (0, 2) else i).save(tmp_path / f"{name}.png")
    source = open_source(tmp_path)
    verdict = triage(source)
    assert subset(source, verdict.kept(4), ()).labels == ["a", "a", "b"] and list(verdict.left_out) == [2]


# near copies


def test_perceptual_hash_is_that_of_the_dct():
    dct = pytest.importorskip("scipy.fft").dctn
    x = decode(_png(picture(3)))
    gray = torch.nn.functional.interpolate(x[None], size=(32, 32), mode="bilinear", antialias=True)[0].double()
    gray = (0.2989 * gray[0] + 0.587 * gray[1] + 0.114 * gray[2]).numpy()
    low = dct(gray, norm="ortho")[1:9, 1:9]
    bits = "".join("01"[int(v > np.sort(low, None)[31])] for v in low.flatten())
    assert perceptual_hash(x) == int(bits, 2) and perceptual_hash(x).bit_count() == 32


def test_near_equals_a_search_over_all_pairs():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 1 << 64, 400, dtype=np.uint64)
    for i in range(200, 400):  # half of them changed by 0 to 4 bits
        hashes[i] = hashes[rng.integers(200)]
        for bit in rng.choice(64, rng.integers(5), replace=False):
            hashes[i] ^= np.uint64(1) << np.uint64(bit)
    first, bits = near(hashes)
    for i, value in enumerate(hashes.tolist()):
        distances = [(value ^ other).bit_count() for other in hashes.tolist()[:i]]
        close = [j for j, distance in enumerate(distances) if distance <= 2]
        assert first[i] == (close[0] if close else -1), i
        assert not close or bits[i] == distances[close[0]]
    assert (first >= 0).sum() > 80
    for count in (0, 1):
        assert near(hashes[:count])[0].tolist() == [-1] * count


def test_recompressed_and_scaled_photographs_are_near_and_different_ones_are_not(shared):
    source = open_source(shared / "pacs_cartoon_64.tar", "train")
    images = [decode(source.read(i)) for i in range(0, len(source), 7)][:150]
    hashes = [perceptual_hash(image) for image in images]
    found = 0
    for image, value in zip(images, hashes, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        small = picture.resize((picture.width * 3 // 4, picture.height * 3 // 4), Image.Resampling.BICUBIC)
        found += (perceptual_hash(decode(_jpeg(picture, 75))) ^ value).bit_count() <= phash.NEAR
        found += (perceptual_hash(decode(_png(small))) ^ value).bit_count() <= phash.NEAR
    assert found >= 0.97 * 300
    first, _ = near(np.array(hashes, np.uint64))
    assert (first >= 0).sum() <= 2  # the set holds a few real ones


@pytest.mark.long
def test_a_million_hashes_are_searched_in_a_minute(record_property):
    rng = np.random.default_rng(0)
    for name, hashes in (
        ("near_random_seconds", rng.integers(0, 1 << 64, 10**6, dtype=np.uint64)),
        ("near_worst_seconds", rng.integers(0, 1 << 12, 10**6, dtype=np.uint64)),
    ):
        start = time.process_time()
        near(hashes)
        record_property(name, round(time.process_time() - start, 1))
        assert time.process_time() - start < 60


# statistics


def test_statistics_are_those_of_all_pixels(tmp_path):
    """For images of one size they equal numpy's over all pixels; a small image has the weight of a large one."""
    for i in range(20):
        picture(i).save(tmp_path / f"{i:02}.png")
    source = open_source(tmp_path)
    pixels = np.stack([np.asarray(picture(i)) for i in range(20)]).reshape(-1, 3) / 255
    for num_workers in (0, 2):
        mean, std = channel_statistics(source, num_workers=num_workers)
        assert np.allclose(mean, pixels.mean(0), atol=1e-5) and np.allclose(std, pixels.std(0), atol=1e-5)
    some, _ = channel_statistics(source, sample=7)
    assert some != mean and some == channel_statistics(source, sample=7)[0]


def test_statistics_of_other_numbers_of_channels_and_of_a_constant_one(tmp_path):
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 256, (6, 9, 8, 5), dtype=np.uint8)
    arrays[..., 2] = 51
    for i, array in enumerate(arrays):
        np.save(tmp_path / f"{i}.npy", array)
    mean, std = channel_statistics(open_source(tmp_path), channels=5)
    assert np.allclose(mean, arrays.mean((0, 1, 2)) / 255, atol=1e-5)
    assert mean[2] == 0.2 and std[2] == pytest.approx(1 / 255, abs=1e-5)
    (tmp_path / "0.npy").write_bytes(b"")
    with pytest.raises(DataError, match="1 of 6"):
        channel_statistics(open_source(tmp_path), channels=5)


# a run


@pytest.fixture
def options(model, folder, tmp_path):
    return dict(
        model=model, data=folder, out=tmp_path / "out", steps=5, batch_size=8, prototypes=8, head_hidden=32,
        head_dim=16, lora_r=2, precision="fp32", device="cpu", num_workers=0, triage=True, mean_std="auto",
    )  # fmt: skip


def test_a_run_applies_triage_and_a_resume_reuses_the_verdict(options, tmp_path, monkeypatch, capsys):
    upstep_fast.adapt(**options)
    out = tmp_path / "out"
    rows = dict(list(csv.reader((out / "skipped.csv").open()))[1:])
    assert len(rows) == 10 and sum(reason.startswith("kept: ") for reason in rows.values()) == 6
    found = json.loads((out / survey.TRIAGE).read_text())["found"]
    assert found["counts"]["exact copies"] == 2 and len(found["left_out"]) == 4
    saved = tomllib.loads((out / "config.toml").read_text())
    statistics = json.loads((out / survey.STATISTICS).read_text())["found"]
    assert saved["model"]["mean"] == statistics["mean"] and saved["model"]["std"] == statistics["std"]
    assert saved["data"]["mean_std"] == "given"
    # a run that is stopped in the middle and resumed gives an equal adapter without a second triage
    options["out"] = tmp_path / "again"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        real = trainer.step
        calls = iter(range(100))

        def stopped(*arguments):
            if next(calls) == 3:
                raise KeyboardInterrupt
            return real(*arguments)

        patch.setattr(trainer, "step", stopped)
        upstep_fast.adapt(**options, checkpoint_every=2)

    def never(*_, **__):
        raise AssertionError("inspected again")

    monkeypatch.setattr(survey, "triage", never)
    monkeypatch.setattr(survey, "channel_statistics", never)
    upstep_fast.adapt(**options, checkpoint_every=2, resume=True)
    name = "adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_cached_verdicts_depend_on_the_images(options, folder, tmp_path):
    upstep_fast.adapt(**options)
    picture(99).save(folder / "one_more.png")
    shutil.copy(folder / "one_more.png", folder / "one_more_copy.png")
    upstep_fast.adapt(**options, overwrite=True)
    found = json.loads((tmp_path / "out" / survey.TRIAGE).read_text())["found"]
    assert found["counts"]["exact copies"] == 3 and found["counts"]["images"] == 52
    (tmp_path / "out" / survey.TRIAGE).write_text('{"of": 3')  # damaged: inspected again
    upstep_fast.adapt(**options, overwrite=True)
    assert json.loads((tmp_path / "out" / survey.TRIAGE).read_text())["found"] == found


def test_a_source_without_usable_images_is_refused_before_the_folder_is_touched(options, tmp_path, monkeypatch):
    for path in list(options["data"].iterdir()):
        path.unlink()
    for i in range(5):
        Image.new("RGB", (20, 20), (i, i, i)).save(options["data"] / f"{i}.png")
    with pytest.raises(DataError, match="leaves 0 of 5 images"):
        upstep_fast.adapt(**options)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("a stranger's")
    monkeypatch.setattr(
        survey, "triage", lambda *_, **__: pytest.fail("inspected images for a folder that it may not use")
    )
    with pytest.raises(ConfigError, match="not empty"):
        upstep_fast.adapt(**options)


def test_without_the_flags_no_image_is_inspected(options, tmp_path):
    del options["triage"], options["mean_std"]
    upstep_fast.adapt(**options)
    assert not (tmp_path / "out" / survey.TRIAGE).exists() and not (tmp_path / "out" / survey.STATISTICS).exists()
    assert (tmp_path / "out" / "skipped.csv").read_text() == "name,reason\n"
    with pytest.raises(ConfigError, match="mean_std"):
        upstep_fast.adapt(**options, overwrite=True, mean_std="auto", mean=(0.5,))


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _jpeg(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()
