"""A run's folder or an adapter's folder names its model, size, channels, mean and std; contradictions are refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import upstep_fast
from upstep_fast.cli.commands import main
from upstep_fast.config.adapter_folder import model_flags
from upstep_fast.errors import ConfigError
from upstep_fast.model import peft_format
from upstep_fast.model.pooling import features

LINEAR = ["--method", "linear", "--epochs", "1", "--device", "cpu"]
OWN = ["--img-size", "48", "--mean", "0.4", "0.5", "0.6", "--std", "0.3"]


@pytest.fixture(scope="module")
def run(short_run, model, photos, tmp_path_factory):
    """A run with an input size, mean and std of its own."""
    own = dict(img_size=48, mean=(0.4, 0.5, 0.6), std=(0.3,))
    out = tmp_path_factory.mktemp("run") / "adapted"
    upstep_fast.adapt(model, photos, out, **short_run | own | {"steps": 2, "lr": 0.1, "report_images": False})
    return out


@pytest.fixture(scope="module")
def expected(run, model, photos, tmp_path_factory):
    """The features with all flags written out."""
    out = tmp_path_factory.mktemp("expected") / "f.npy"
    embed("--model", model, "--adapter", run / "adapter", *OWN, "--data", photos, "--out", out)
    return np.load(out)


def embed(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(["embed", *map(str, arguments), "--device", "cpu", "--precision", "fp32", "--num-workers", "0"])
    assert stop.value.code == 0


def refused(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("case", ["run", "adapter", "alone", "without a record", "--adapter", "--model"])
def test_a_folder_is_enough(run, photos, expected, tmp_path, case):
    folder = run
    if case == "adapter":
        folder = run / "adapter"
    elif case == "alone":  # away from its run
        folder = shutil.copytree(run / "adapter", tmp_path / "moved")
    elif case == "without a record":  # of an earlier version
        folder = shutil.copytree(run, tmp_path / "older")
        files = peft_format.read_files(run / "adapter")
        config = json.loads(files["adapter_config.json"])
        vit = upstep_fast.load_adapted(run, merged=False)
        adapters = {name: vit.get_submodule(name) for name in config["target_modules"]}
        peft_format.save_adapter(folder / "adapter", adapters, config["base_model_name_or_path"])
    flag = [case] if case.startswith("--") else []
    embed(*flag, folder, "--data", photos, "--out", tmp_path / "f.npy")
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), expected, rtol=0, atol=1e-6)


def test_python_takes_the_folder_as_the_model(run, photos, expected, tmp_path):
    out = upstep_fast.embed(run, photos, tmp_path / "f.npy", device="cpu", precision="fp32", num_workers=0)
    assert np.array_equal(np.load(out), expected)


def test_load_adapted_takes_the_folder_alone(run, model):
    images = torch.rand(2, 3, 48, 48)
    by_name = features(upstep_fast.load_adapted(model, run / "adapter", img_size=48), images)
    for folder in (run, str(run / "adapter")):
        assert torch.equal(features(upstep_fast.load_adapted(folder), images), by_name)
    larger = upstep_fast.load_adapted(run, img_size=64)  # a flag overrides
    assert larger.patch_embed.img_size == (64, 64)


def test_every_command_takes_a_run(run, photos, tmp_path, capsys):
    for split in ("train", "test"):
        for name in ("red", "blue"):
            (tmp_path / "labeled" / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (48, 48), name).save(tmp_path / "labeled" / split / name / f"{i}{split}.png")
    commands = (
        ["eval", run, "--data", tmp_path / "labeled", "--device", "cpu", "--json", tmp_path / "scores.json"],
        ["export", run, "--out", tmp_path / "exported"],
        ["finetune", "--adapter", run, "--data", tmp_path / "labeled", "--out", tmp_path / "classifier", *LINEAR],
        ["report", run / "adapter"],
    )
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main([*map(str, command)])
        assert stop.value.code == 0, (command, capsys.readouterr().err)
    assert "adapted" in json.loads((tmp_path / "scores.json").read_text())
    exported = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert exported["pretrained_cfg"]["mean"] == [0.4, 0.5, 0.6]
    assert upstep_fast.load_finetuned(tmp_path / "classifier" / "model").vit.patch_embed.img_size == (48, 48)
    assert (run / "report.html").is_file() and not (run / "adapter" / "report.html").exists()


@pytest.mark.parametrize("flags", [["--mean", "0.1"], ["--std", "0.3", "0.3", "0.2"], ["--in-chans", "1"]])
def test_a_contradiction_is_refused_unless_asked_for(run, photos, tmp_path, capsys, flags):
    out = tmp_path / "f.npy"
    text = refused(capsys, "embed", run, "--data", photos, "--out", out, *flags)
    field = flags[0][2:].replace("-", "_")
    assert f"{field}: got {' '.join(flags[1:])}, but the adapter in {run / 'adapter'} was trained with" in text
    assert "--any-base" in text
    embed(run, "--data", photos, "--out", out, *flags, "--any-base")


def test_the_same_values_in_another_form_are_no_contradiction(run, photos, tmp_path):
    embed(run, "--data", photos, "--out", tmp_path / "f.npy", "--std", "0.3", "0.3", "0.3", "--in-chans", "3")


def test_folders_that_lack_what_is_needed(run, photos, tmp_path, capsys):
    def text(folder, *flags):
        return refused(capsys, "embed", folder, "--data", photos, "--out", tmp_path / "f.npy", *flags)

    assert "adapter: no folder at" in text(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "holds no adapter_config.json" in text(tmp_path / "empty")
    (tmp_path / "empty" / "config.toml").write_text("")
    assert "holds a run without an adapter" in text(tmp_path / "empty")
    as_model = refused(capsys, "embed", "--model", tmp_path / "empty", "--data", photos, "--out", tmp_path / "f.npy")
    assert f"{tmp_path / 'empty'} holds a run without an adapter; complete it with adapt --resume" in as_model
    further = refused(capsys, "adapt", "--model", tmp_path / "empty", "--data", photos, "--out", tmp_path / "more")
    assert "holds a run without an adapter" in further
    (tmp_path / "empty" / "model").mkdir()
    (tmp_path / "empty" / "model" / "trained.safetensors").touch()
    as_model = refused(capsys, "eval", "--model", tmp_path / "empty", "--data", photos)
    assert "is a run of finetune; upstep_fast.load_finetuned reads its model/" in as_model
    nameless = shutil.copytree(run / "adapter", tmp_path / "nameless")
    config = json.loads((nameless / "adapter_config.json").read_text())
    for name, wanted in (
        (None, "does not name its base model"),
        ("local-dir:/nowhere", "there is no such folder here"),
    ):
        (nameless / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
        assert wanted in text(nameless)
        with pytest.raises(ConfigError, match=wanted):
            upstep_fast.load_adapted(nameless)
    embed(nameless, "--model", model_flags(run / "adapter")["model"], "--data", photos, "--out", tmp_path / "f.npy")
    assert "both give it" in text(run, "--adapter", run)


def test_a_config_of_another_program_beside_an_adapter_is_left_alone(run, tmp_path):
    folder = shutil.copytree(run / "adapter", tmp_path / "adapter")
    (tmp_path / "config.toml").write_text('model = "theirs"\nimg_size = "large"\n')
    assert model_flags(folder) == model_flags(run / "adapter")


def test_the_included_model_is_no_folder_of_that_name(run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    embed("--model", "demo", "--data", photos, "--out", tmp_path / "alone.npy")
    shutil.copytree(run, tmp_path / "demo")
    embed("--model", "demo", "--data", photos, "--out", tmp_path / "beside.npy")
    assert np.array_equal(np.load("alone.npy"), np.load("beside.npy"))
    embed("./demo", "--data", photos, "--out", tmp_path / "run.npy")
    assert np.load("run.npy").shape != np.load("alone.npy").shape
