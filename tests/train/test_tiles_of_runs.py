"""Tiles in the commands: adapt, eval, embed and predict on slides, with names that tell the place."""

from __future__ import annotations

import csv
import json
import logging
import shutil

import numpy as np
import pytest
from large_files import picture, write_pyramid
from safetensors import safe_open

import upstep_fast
from upstep_fast.cli import main
from upstep_fast.config.adapter_folder import reading_flags
from upstep_fast.config.base import DataConfig, reading_of
from upstep_fast.config.reading import merged

QUICK = {"device": "cpu", "precision": "fp32", "num_workers": 1}


def command(*words):
    """Return the exit code of a command."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code or 0


@pytest.fixture(scope="module")
def slide_folder(tmp_path_factory):
    """Two classes of two slides each; a quarter of each slide is blank."""
    folder = tmp_path_factory.mktemp("slides")
    for name, shift in (("a/0.svs", 0), ("a/1.tif", 40), ("b/2.svs", 80), ("b/3.tif", 120)):
        (folder / name).parent.mkdir(exist_ok=True)
        image = np.roll(picture(128, 128), shift, 0)
        image[:64, :64] = 245
        form = "aperio" if name.endswith("svs") else "subifds"
        write_pyramid(folder / name, image, form, levels=2, tile=(32, 32), compression="zlib")
    return folder


@pytest.fixture(scope="module")
def run(short_run, model, slide_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    upstep_fast.adapt(model, slide_folder, out, **short_run | {"tiles": "32", "batch_size": 8, "verdict": "off"})
    return out


PLACES = [f"level=0,x={x},y={y}" for y in (0, 32, 64, 96) for x in (0, 32, 64, 96) if x >= 64 or y >= 64]
FILES = ["a/0.svs", "a/1.tif", "b/2.svs", "b/3.tif"]
NAMES = [f"{file}#{place}" for file in FILES for place in PLACES]


def test_adapt_trains_on_tiles_and_records_them(run):
    config = (run / "config.toml").read_text()
    assert 'tiles = "32"' in config
    assert not (run / "skipped.csv").is_file() or len((run / "skipped.csv").read_text().splitlines()) == 1


def test_embed_names_tiles(run, slide_folder, tmp_path):
    out = tmp_path / "features.safetensors"
    assert command("embed", run, "--data", slide_folder, "--out", out, "--tiles", "32", "--device", "cpu") == 0
    with safe_open(out, "np") as file:
        names = json.loads(file.metadata()["paths"])
        assert len(file.get_tensor("features")) == 48
    assert names == [f"{slide_folder}/{name}" for name in NAMES]


def test_eval_holds_out_whole_files(run, slide_folder, capsys):
    words = ("--data", slide_folder, "--tiles", "32", "--device", "cpu", "--test-fraction", "0.5")
    assert command("eval", run, *words) == 0
    out = capsys.readouterr().out
    assert "24 train, 24 test" in out  # one file of each class
    assert "note: the 24 measured images are pictures of 2 files or series: the 95 % intervals count" in out


def test_predict_names_tiles(model, slide_folder, tmp_path):
    options = {"method": "linear", "epochs": 1, "batch_size": 8, "preset_views": "none", "tiles": "32", **QUICK}
    upstep_fast.finetune(model, slide_folder, tmp_path / "run", **options)
    out = tmp_path / "predictions.csv"
    assert command("predict", tmp_path / "run", "--data", slide_folder, "--tiles", "32", "--out", out) == 0
    with open(out, newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert [row[0] for row in rows] == [f"{slide_folder}/{name}" for name in NAMES]


def test_commands_read_by_the_tiles_of_the_run(run, slide_folder, tmp_path, capsys, caplog):
    """A flag overrides them: four whole pictures."""
    caplog.set_level(logging.INFO, "upstep_fast")
    assert len(np.load(upstep_fast.embed(run, slide_folder, tmp_path / "f.npy", form="plain", **QUICK))) == 48
    assert f"data: read as in training: --tiles 32 (recorded in {run}" in caplog.text
    caplog.clear()
    whole = upstep_fast.embed(run, slide_folder, tmp_path / "w.npy", form="plain", tiles="none", **QUICK)
    assert len(np.load(whole)) == 4 and "as in training" not in caplog.text
    for given, count in (({}, 48), ({"tiles": "none"}, 4)):
        loaded = upstep_fast.load(run, device="cpu", precision="fp32", **given)
        assert len(loaded.paths(slide_folder)) == count
    assert command("eval", run, "--data", slide_folder, "--test-fraction", "0.5", "--device", "cpu") == 0
    assert "24 train, 24 test" in capsys.readouterr().out


def test_finetune_takes_the_tiles_of_its_adapter_and_predict_those_of_the_classifier(run, slide_folder, tmp_path):
    options = {"method": "linear", "epochs": 1, "batch_size": 8, "preset_views": "none", **QUICK}
    upstep_fast.finetune(None, slide_folder, tmp_path / "run", adapter=run, **options)
    assert json.loads((tmp_path / "run/model/config.json").read_text())["reading"]["tiles"] == "32"
    for words, count in (((), 48), (("--tiles", "none"), 4)):
        out = tmp_path / f"{count}.csv"
        assert command("predict", tmp_path / "run", "--data", slide_folder, "--out", out, *words) == 0
        assert len(out.read_text().splitlines()) == 1 + count
    assert len(upstep_fast.load_finetuned(tmp_path / "run").predict(str(slide_folder))) == 48


def test_an_adapted_run_and_an_export_carry_the_tiles(run, model, short_run, slide_folder, tmp_path):
    """The comparison of an export without data is on the package's photographs, read as they are."""
    options = short_run | {"batch_size": 8, "verdict": "off"}
    upstep_fast.adapt(None, slide_folder, tmp_path / "next", from_=run, **options)
    assert 'tiles = "32"' in (tmp_path / "next/config.toml").read_text()
    assert command("export", run, "--out", tmp_path / "exported", "--format", "peft") == 0
    assert "| parts of files | `--tiles 32` |" in (tmp_path / "exported/README.md").read_text()
    assert reading_flags(tmp_path / "exported")["tiles"] == "32"


def test_a_whitening_of_tiles_is_not_used_for_whole_pictures(run, slide_folder, tmp_path, capsys):
    file = tmp_path / "whitening.safetensors"
    upstep_fast.embed(run, slide_folder, tmp_path / "f.npy", fit_whitening=str(file), **QUICK)
    words = ("embed", run, "--data", slide_folder, "--device", "cpu")
    upstep_fast.embed(run, slide_folder, tmp_path / "t.npy", whitening=str(file), **QUICK)
    assert np.array_equal(np.load(tmp_path / "t.npy"), np.load(tmp_path / "f.npy"))
    assert command(*words, "--out", tmp_path / "w.npy", "--whitening", file, "--tiles", "none") == 2
    assert "was fitted to images that were read otherwise: --tiles was 32, is none" in capsys.readouterr().err
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.copy(file, copy)
    upstep_fast.load(copy, tiles="none", device="cpu")
    assert "WARNING form: plain: whitening: " in (said := capsys.readouterr().err) and "--tiles was 32, is none" in said


RECORDED = {"intensity": "full", "slice": "max", "tiles": "224", "mpp": 0.5}


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({}, RECORDED),
        ({"tiles": None, "model": "demo"}, RECORDED),
        ({"tiles": "none", "slice": "auto"}, RECORDED | {"tiles": "none", "slice": "auto"}),
        ({"mpp": "none"}, RECORDED | {"mpp": "none"}),
        ({"level": 2}, {"intensity": "full", "slice": "max", "tiles": "224", "level": 2}),
        ({"level": "none"}, RECORDED | {"level": "none"}),
    ],
)
def test_a_given_flag_takes_the_place_of_the_recorded_one(given, want):
    assert merged(RECORDED, given) == want
    reading = reading_of(DataConfig((), **want))
    assert (reading.tile, reading.level, reading.mpp) == (
        None if want["tiles"] == "none" else 224,
        given.get("level") if given.get("level") != "none" else None,
        0.5 if want.get("mpp") == 0.5 else None,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tiles", "0"), "tiles: got 0"),
        (("--tiles", "32x32"), "tiles: got 32x32"),
        (("--tiles", "32", "--level", "9"), "--level 9"),
        (("--tiles", "32", "--mpp", "0.1"), "--mpp 0.1"),
        (("--level", "1", "--mpp", "1"), "level and mpp"),
    ],
)
def test_a_bad_choice_is_one_line(run, slide_folder, tmp_path, capsys, words, message):
    out = tmp_path / "features.safetensors"
    assert command("embed", run, "--data", slide_folder, "--out", out, *words, "--device", "cpu") in (2, 3)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and len(error) < 600
