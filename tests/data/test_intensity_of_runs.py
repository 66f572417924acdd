"""Intensity of a data set: measured once, kept in the run, and used again by the commands that read the run."""

from __future__ import annotations

import io
import logging
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import upstep_fast
from upstep_fast.cli import main
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.adapter_folder import adapter_folder, reading_flags
from upstep_fast.config.base import DataConfig, reading_of
from upstep_fast.config.files import to_toml
from upstep_fast.config.finetune import FinetuneConfig
from upstep_fast.config.flat import from_flat, replace_flat
from upstep_fast.config.reading import Intensity, Reading, parse_intensity
from upstep_fast.data.curation.intensity import SAMPLE, measure_intensity
from upstep_fast.data.curation.triage import triage
from upstep_fast.data.decode.image import read_stored
from upstep_fast.data.loading.skipped_images import read_image
from upstep_fast.data.reading.intensity import to_bytes
from upstep_fast.data.reading.stored import Stored
from upstep_fast.data.sources.source import open_configured, open_source
from upstep_fast.errors import ConfigError
from upstep_fast.report.run_record import read_config
from upstep_fast.train.intensity import as_recorded


def write(folder, images, suffix=".npy"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        path = folder / f"{i:03}{suffix}"
        if suffix == ".npy":
            np.save(path, image)
        else:
            Image.fromarray(image).save(path)
    return folder


def twelve_bits(count, *, bands=(), seed=0, size=40):
    rng = np.random.default_rng(seed)
    return [rng.normal(1500, 400, (size, size, *bands)).clip(0, 4095).astype(np.uint16) for _ in range(count)]


def command(*words):
    """Return the exit code of a command."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code or 0


def the_range(source, channels=3):
    return measure_intensity(source, channels=channels).reading.intensity


@pytest.mark.parametrize("suffix", [".npy", ".png", ".tif"])
def test_a_range_is_the_percentiles_of_all_values(tmp_path, caplog, suffix):
    images = twelve_bits(5)
    caplog.set_level(logging.INFO, "upstep_fast")
    measured = the_range(open_source(write(tmp_path, images, suffix)))
    low, high = np.percentile(np.stack(images).astype(np.float64), (0.5, 99.5))
    assert measured.kind == "auto" and measured.ranges == (
        (pytest.approx(low, rel=1e-5), pytest.approx(high, rel=1e-5)),
    )
    assert (
        f"intensity: values {low:,.6g} to {high:,.6g} become 0 to 1 (percentiles 0.5 and 99.5 of 5 images)"
        in caplog.text
    )


def test_large_images_and_many_are_sampled(tmp_path, monkeypatch):
    images = twelve_bits(8, size=300)
    source = open_source(write(tmp_path, images))
    exact = np.percentile(np.stack(images).astype(np.float64), (0.5, 99.5))
    (few,) = the_range(source).ranges
    assert few == pytest.approx(exact, rel=0.02)  # 8 x 16,384 of 90,000 values
    assert the_range(source).ranges == (few,) and SAMPLE == 256
    monkeypatch.setattr("upstep_fast.data.curation.intensity.SAMPLE", 3)
    assert the_range(source).ranges != (few,)


def test_colors_share_a_range_and_bands_have_their_own(tmp_path):
    rng = np.random.default_rng(0)
    scales = np.array([1, 10, 100, 1000])
    images = [(rng.random((30, 30, 4)) * scales).astype(np.float32) for _ in range(4)]
    four = the_range(open_source(write(tmp_path / "four", images)), channels=4)
    assert [round(high / scale, 2) for (_, high), scale in zip(four.ranges, scales, strict=True)] == pytest.approx(
        [1] * 4, abs=0.02
    )
    three = the_range(open_source(write(tmp_path / "three", [image[..., :3] for image in images])))
    assert len(three.ranges) == 1
    chosen = open_source(tmp_path / "four", reading=Reading(bands=(4, 1)))
    assert [round(high) for _, high in the_range(chosen, channels=2).ranges] == [pytest.approx(1000, rel=0.02), 1]


def test_eight_bits_are_left_alone_and_do_not_count(tmp_path):
    rng = np.random.default_rng(0)
    eight = write(tmp_path / "eight", [rng.integers(0, 90, (20, 20)).astype(np.uint8) for _ in range(3)], ".png")
    assert the_range(open_source(eight)) == Intensity()
    mixed = [eight, write(tmp_path / "sixteen", twelve_bits(3))]
    source = measure_intensity(open_source([str(p) for p in mixed]), channels=3)
    assert source.reading.intensity.ranges == the_range(open_source(mixed[1])).ranges
    assert int(read_image(source, 0).max()) < 90
    asked = open_source(eight, reading=Reading(parse_intensity("percentile:0,100")))
    ((low, high),) = the_range(asked).ranges
    assert (low, high) == (0, 89)
    assert int(read_image(measure_intensity(asked, channels=3), 0).max()) == 255


def test_nodata_does_not_count_and_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, "upstep_fast")
    images = [image.astype(np.float32) for image in twelve_bits(4)]
    ((low, high),) = the_range(open_source(write(tmp_path / "whole", images))).ranges
    for image in images:
        image[:10] = np.nan
    images.append(np.full((40, 40), np.nan, np.float32))  # no value at all: the loader refuses it
    ((low_2, high_2),) = the_range(open_source(write(tmp_path / "holes", images))).ranges
    assert (low_2, high_2) == pytest.approx((low, high), rel=0.05)
    assert "intensity: 25.0 % of the values are nodata or not finite; they get their image's median" in caplog.text


def test_constant_images_and_given_ranges(tmp_path):
    source = open_source(write(tmp_path, [np.full((20, 20), 700, np.uint16)] * 2))
    assert the_range(source).ranges == ((700, 701),)
    for number, folder in ((3e9, "large"), (1e17, "vast")):
        constant = open_source(write(tmp_path / folder, [np.full((20, 20), number, np.float32)] * 2, suffix=".npy"))
        ((low, high),) = the_range(constant).ranges
        assert low == np.float32(number) and low < high
    for text in ("full", "range:0,5"):
        given = replace(source, reading=Reading(parse_intensity(text)))
        assert measure_intensity(given, channels=3) is given


def test_a_narrow_range_far_from_zero_keeps_its_ends(tmp_path):
    values = 3_000_000_000 + np.arange(400, dtype=np.uint32).reshape(20, 20)
    ((low, high),) = the_range(open_source(write(tmp_path, [values] * 2, suffix=".npy"))).ranges
    assert (low - 3e9, high - 3e9) == pytest.approx(tuple(np.percentile(np.arange(400), (0.5, 99.5))), abs=0.01)


def test_twelve_bits_in_sixteen_are_no_longer_nearly_black(tmp_path):
    source = open_source(write(tmp_path, twelve_bits(6), ".png"))
    before = [read_image(source, i).float().mean().item() for i in range(6)]
    source = measure_intensity(source, channels=3)
    after = [read_image(source, i).float().mean().item() for i in range(6)]
    assert max(before) < 8 and min(after) > 100
    assert triage(source).counts["wrong bit depth"] == 0
    assert triage(replace(source, reading=Reading(Intensity("full")))).counts["wrong bit depth"] == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"intensity": "range:2,1"}, "intensity: got range:2,1, needs a lower value before a higher one"),
        ({"bands": "0"}, "bands: got 0, must be 1 to 64 numbers of bands, from 1 on"),
        ({"axes": "TZ"}, "axes: got TZ, must be letters"),
        ({"axes": "YXX"}, "axes: got YXX, must be letters"),
        ({"tiles": "0"}, "tiles: got 0, must be a side in pixels"),
        ({"level": -1}, "level: got -1, must be at least 0"),
        ({"mpp": 0.0}, "mpp: got 0.0, must be above 0"),
        ({"mpp": 0.5, "level": 1}, "level and mpp: give one of them"),
    ],
)
def test_flags_of_reading_are_checked(flags, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        DataConfig(("images",), **flags)


def test_flags_of_reading_reach_the_source(tmp_path):
    write(tmp_path, twelve_bits(1, bands=(3,)))
    flags = {"intensity": "window:1000,500", "bands": "3,1", "slice": "max", "tiles": "224:112", "mpp": 0.5}
    want = Reading(parse_intensity("range:750,1250"), None, "max", (3, 1), 224, 112, None, 0.5)
    assert reading_of(DataConfig((str(tmp_path),), **flags)) == want
    plain = {name: flags[name] for name in ("intensity", "bands")}
    assert open_configured(DataConfig((str(tmp_path),), **plain)).reading.bands == (3, 1)


# runs


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """Return the folder of a run on images of 12 bits, and the images."""
    root = tmp_path_factory.mktemp("intensity")
    for label, seed in (("a", 0), ("b", 1)):
        write(root / "images" / label, twelve_bits(8, seed=seed, size=64))
    assert command("adapt", "--model", model, "--data", root / "images", "--out", root / "run", *SHORT) == 0
    return root / "run", root / "images"


SHORT = ["--steps", "2", "--batch-size", "4", "--no-report-images", "--whitening", "off", "--precision", "fp32"]
SHORT += ["--head-hidden", "32", "--head-dim", "16", "--prototypes", "8"]


def test_the_run_and_its_adapter_keep_the_measured_range(run):
    folder, images = run
    (want,) = the_range(open_source(images)).ranges
    for text in (read_config(folder)["intensity"], reading_flags(adapter_folder(folder))["intensity"]):
        assert parse_intensity(text) == Intensity("auto", ranges=(want,))


def test_commands_read_by_the_range_of_the_run(run, tmp_path, caplog):
    """Images at a tenth of the brightness keep it: features differ from those by a range of their own."""
    folder = run[0]
    dark = write(tmp_path / "dark", [image // 10 for image in twelve_bits(3, size=64)])
    options = {"form": "plain", "precision": "fp32"}

    def embedded(name, **keywords):
        out = tmp_path / f"{name}.npy"
        upstep_fast.embed(folder, dark, out, **options, **keywords)
        return np.load(out)

    caplog.set_level(logging.INFO, "upstep_fast")
    of_run = embedded("run")
    assert "intensity: values" not in caplog.text
    given = read_config(folder)["intensity"].replace("auto", "range")
    assert np.array_equal(of_run, embedded("given", intensity=given))
    assert not np.allclose(of_run, embedded("own", intensity="auto"), atol=1e-3)
    assert "intensity: values" in caplog.text
    in_memory = upstep_fast.load(folder, whiten=False, precision="fp32")
    assert np.allclose(in_memory.embed(str(dark)), of_run, atol=1e-6)
    assert np.allclose(in_memory.embed([str(p) for p in sorted(dark.iterdir())]), of_run, atol=1e-6)
    assert np.allclose(in_memory.embed([np.load(p) for p in sorted(dark.iterdir())]), of_run, atol=1e-6)


def test_an_earlier_adapter_reads_by_the_declared_range(run, tmp_path):
    """Its record and configuration name no intensity."""
    import json
    import shutil

    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "earlier"
    shutil.copytree(run[0], folder)
    weights = folder / "adapter" / "adapter_model.safetensors"
    with safe_open(weights, framework="np") as file:
        metadata = file.metadata()
    record = json.loads(metadata["upstep_fast.model"])
    assert record.pop("intensity").startswith("auto:")
    save_file(load_file(weights), weights, metadata | {"upstep_fast.model": json.dumps(record)})
    config = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(
        "\n".join(line for line in config.splitlines() if not line.startswith("intensity"))
    )
    assert reading_flags(folder / "adapter") == {"intensity": "full"}


def test_another_intensity_is_no_continuation(run, model, capsys):
    folder, images = run
    again = ["adapt", "--model", model, "--data", images, "--out", folder, *SHORT, "--resume"]
    assert command(*again) == 0
    assert command(*again, "--intensity", "full") == 2
    assert "intensity" in capsys.readouterr().err


def test_eval_measures_once_and_reads_both_parts_alike(run, model, caplog):
    folder, images = run
    caplog.set_level(logging.INFO, "upstep_fast")
    of_run = upstep_fast.evaluate(folder, images, k=3, precision="fp32")
    assert "intensity: values" not in caplog.text
    alone = upstep_fast.evaluate(model, images, k=3, precision="fp32")
    assert caplog.text.count("intensity: values") == 1
    assert of_run["n_test"] == alone["n_test"]


def test_a_classifier_predicts_by_the_range_of_its_training(run, model, tmp_path):
    _, images = run
    out = tmp_path / "classifier"
    options = {"epochs": 1, "method": "linear", "precision": "fp32", "batch_size": 4}
    upstep_fast.finetune(model, images, out, **options)
    assert tomllib.loads((out / "config.toml").read_text())["data"]["intensity"].startswith("auto:")
    net = upstep_fast.load_finetuned(out)
    dark = write(tmp_path / "dark", [image // 10 for image in twelve_bits(3, size=64)])
    predict = ["predict", out, "--data", dark, "--precision", "fp32"]
    assert command(*predict, "--out", tmp_path / "p.csv") == 0
    rows = [line.split(",") for line in (tmp_path / "p.csv").read_text().splitlines()[1:]]
    found = net.predict(str(dark))
    assert [row[1] for row in rows] == [p.label for p in found]
    assert [float(row[2]) for row in rows] == pytest.approx([p.probability for p in found], abs=1e-4)
    assert command(*predict, "--out", tmp_path / "own.csv", "--intensity", "auto") == 0
    assert (tmp_path / "own.csv").read_text() != (tmp_path / "p.csv").read_text()


def test_the_loader_and_triage_read_alike(run):
    folder, images = run
    config = DataConfig((str(images),), intensity=read_config(folder)["intensity"])
    first = read_image(open_configured(config), 0)
    measured = measure_intensity(open_source(images), channels=3)
    assert torch.equal(first, read_image(measured, 0))


def test_a_resumed_run_of_an_earlier_version_keeps_the_declared_range(tmp_path):
    for config_class in (AdaptConfig, FinetuneConfig):
        flags = {"model": "demo", "data": (str(tmp_path),), "out": str(tmp_path), "resume": True}
        config = from_flat(config_class, **flags)
        earlier = "\n".join(line for line in to_toml(config).splitlines() if "intensity" not in line)
        (tmp_path / "config.toml").write_text(earlier)
        assert as_recorded(config).data.intensity == "full"
        (tmp_path / "config.toml").write_text(to_toml(replace_flat(config, intensity="auto:1,2")))
        assert as_recorded(config).data.intensity is None
        (tmp_path / "config.toml").unlink()
        assert as_recorded(config).data.intensity is None


def test_tiles_of_pictures_are_measured_by_the_whole_picture(tmp_path):
    images = twelve_bits(2, size=96)
    plain = the_range(open_source(write(tmp_path, images, ".png")))
    tiles = open_source(tmp_path, reading=Reading(tile=32))
    assert len(tiles) == 18
    ((low, high),) = the_range(tiles).ranges
    assert (low, high) == pytest.approx(plain.ranges[0], rel=0.02)
    first = read_image(measure_intensity(tiles, channels=3), 0)
    want = to_bytes(Stored(images[0][None, :32, :32], 0, 65535), Intensity("range", ranges=((low, high),)))
    assert torch.equal(first[:1], want)


def test_values_of_content_are_told_from_its_bytes():
    fits = pytest.importorskip("astropy.io.fits", reason="install upstep_fast[astro]")
    values = np.arange(-6, 6, dtype=np.int16).reshape(3, 4)
    file = io.BytesIO()
    fits.writeto(file, values)
    assert np.array_equal(read_stored(file.getvalue()).values[0], values[::-1])  # the first row is at the bottom
