"""The whitening in the folder of a run: against scikit-learn's OAS in float64, what uses it, and when there is none."""

import shutil

import numpy as np
import pytest
import torch
from photos import save_photos
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.covariance import OAS

import upstep_fast
from upstep_fast.cli.commands import main
from upstep_fast.errors import ConfigError
from upstep_fast.evaluation import whitening
from upstep_fast.evaluation.features import ensemble
from upstep_fast.train import run_whitening

CPU = dict(device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return save_photos(tmp_path_factory.mktemp("many"), 110)


@pytest.fixture(scope="module")
def run(short_run, model, many, tmp_path_factory):
    """A finished run on all images, each of which its whitening is fitted to."""
    out, more = tmp_path_factory.mktemp("run") / "out", dict(steps=18, batch_size=64, lr=0.02, verdict="off")
    upstep_fast.adapt(model, many, out, **short_run | more | {"gate": "none", "report_images": False})
    return out


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


@torch.no_grad()
def oracle_parts(vit, images):
    """Unit features and mean patch tokens by timm alone, float64 [2, N, D]."""
    tokens = vit.double().forward_features(images.double())
    parts = torch.stack([vit.forward_head(tokens, pre_logits=True), tokens[:, 1:].mean(1)])
    return (parts / parts.norm(dim=-1, keepdim=True)).numpy()


def oracle_phi(parts):
    """[x / sqrt(2), w(x) / 2, w(p) / 2] by scikit-learn's OAS and numpy's eigenvalues."""
    columns = [parts[0] / 2**0.5]
    for part in parts:
        fitted = OAS().fit(part)
        values, vectors = np.linalg.eigh(fitted.covariance_)
        w = (part - fitted.location_) @ (vectors / np.sqrt(values)) @ vectors.T
        columns.append(w / np.linalg.norm(w, axis=1, keepdims=True) / 2)
    return np.concatenate(columns, 1)


@pytest.fixture(scope="module")
def expected(run, model, many):
    """The whitened features of the images, by "base" and "adapted"."""
    base = upstep_fast.load(model, device="cpu")
    images = torch.stack([base.transform(path) for path in base.paths(many)])
    vits = {"base": base.vit, "adapted": upstep_fast.load_adapted(run)}
    return {name: oracle_phi(oracle_parts(vit, images)) for name, vit in vits.items()}


def test_the_best_measured_form_is_the_default(run, many, expected, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(f"embed {run} --data {many} --out {tmp_path / 'f.npy'} --device cpu --precision fp32".split())
    written = np.load(tmp_path / "f.npy")
    assert stop.value.code == 0 and written.shape == (110, 3 * 48)
    assert "f.npy  (adapted, whitened features appended; 110 x 144)" in capsys.readouterr().out
    np.testing.assert_allclose(written, expected["adapted"], rtol=0, atol=2e-4)
    in_memory = upstep_fast.load(run, **CPU)
    np.testing.assert_array_equal(in_memory.embed(many), written)
    np.testing.assert_array_equal(upstep_fast.load(run / "adapter", whiten=True, **CPU).embed(many), written)
    assert "whitened, D = 144" in repr(in_memory)
    both = upstep_fast.embed(run, many, tmp_path / "both.npy", ensemble=True, **CPU)
    oracle = ensemble(torch.from_numpy(expected["base"]), torch.from_numpy(expected["adapted"]))
    np.testing.assert_allclose(np.load(both), oracle, rtol=0, atol=2e-4)


def test_the_plain_form_by_a_flag(run, many, expected, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(f"embed {run} --data {many} --out {tmp_path / 'f.npy'} --form plain --device cpu --precision fp32".split())
    plain = np.load(tmp_path / "f.npy")
    assert "(adapted, plain; 110 x 48)" in capsys.readouterr().out
    np.testing.assert_allclose(plain, expected["adapted"][:, :48] * 2**0.5, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(upstep_fast.load(run, whiten=False, **CPU).embed(many), plain)
    with pytest.raises(ConfigError, match="form: plain features have no whitening"):
        upstep_fast.embed(run, many, tmp_path / "g.npy", form="plain", fit_whitening=tmp_path / "w")


def test_the_transformer_fits_its_own(run, many, expected):
    embedder = upstep_fast.Embedder(run, **CPU)
    np.testing.assert_allclose(embedder.fit_transform(many), expected["adapted"], rtol=0, atol=2e-4)
    assert upstep_fast.Embedder(run, whiten=False, **CPU).fit_transform(many).shape == (110, 48)


def test_runs_without_one_give_plain_features(copy, many, tmp_path, caplog):
    (copy / whitening.FILE).unlink()
    caplog.set_level("INFO")
    assert np.load(upstep_fast.embed(copy, many, tmp_path / "f.npy", **CPU)).shape == (110, 48)
    assert f"form: plain, as {copy} holds no whitening.safetensors" in caplog.text
    assert upstep_fast.load(copy, **CPU).dim == 48


def test_one_of_another_adapter_or_input_is_left_out(copy, run, caplog):
    assert upstep_fast.load(run, img_size=40, **CPU).dim == 48
    assert "form: plain: whitening: " in caplog.text and "was not fitted to this base model" in caplog.text
    config = copy / "adapter" / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    caplog.clear()
    assert upstep_fast.load(copy, **CPU).dim == 48 and "was not fitted to this adapted model" in caplog.text
    (copy / whitening.FILE).write_bytes(b"\x08")
    with pytest.raises(ConfigError, match="cannot be read"):
        upstep_fast.load(copy)
    assert upstep_fast.load(copy, whiten=False, **CPU).dim == 48


def test_a_refused_run_keeps_the_base(copy, many, expected, tmp_path, caplog):
    """What `adapt` leaves behind after the verdict worse."""
    (copy / "adapter").rename(copy / "adapter-refused")
    base = np.load(upstep_fast.embed(copy, many, tmp_path / "f.npy", **CPU))
    np.testing.assert_allclose(base, expected["base"], rtol=0, atol=2e-4)
    assert f"adapter: that of {copy} was refused, as it made the features worse: base model used" in caplog.text
    m = upstep_fast.load(copy, **CPU)
    assert m.adapter is None and np.array_equal(m.embed(many), base)
    assert upstep_fast.load(copy, whiten=False, **CPU).dim == 48
    all_the_same = upstep_fast.load(copy / "adapter-refused", **CPU)
    np.testing.assert_allclose(all_the_same.embed(many), expected["adapted"], rtol=0, atol=2e-4)
    with pytest.raises(ConfigError, match=r"ensemble: the adapter of .* was refused"):
        upstep_fast.embed(copy, many, tmp_path / "e.npy", ensemble=True)
    for act in (upstep_fast.load_adapted, lambda folder: upstep_fast.evaluate(folder, many)):
        with pytest.raises(ConfigError, match=r"adapter: .* adapter was refused, .* or .*adapter-refused all the same"):
            act(copy)


def test_a_whitening_of_another_form_is_refused(copy):
    with safe_open(copy / whitening.FILE, "pt") as file:
        metadata = file.metadata()
    assert metadata[whitening.FORM] == whitening.APPENDED
    save_file(load_file(copy / whitening.FILE), copy / whitening.FILE, metadata | {whitening.FORM: "[y]"})
    with pytest.raises(ConfigError, match=r"is for features of the form \[y\]; update upstep-fast"):
        upstep_fast.load(copy, **CPU)


@pytest.mark.parametrize(
    ("available", "trained", "expected"),
    [(300, 9000, 300), (10**6, 400 * 256, 2048), (10**6, 3840, 384), (50, 900, 50)],
)
def test_the_number_of_images_is_bounded_by_the_run(available, trained, expected):
    assert run_whitening.num_images(available, trained) == expected


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"whitening": "off"}, ""),
        ({"steps": 2}, "whitening: none: the run is too short"),
        ({"data": "PHOTOS"}, "whitening: none: 24 images are too few"),
    ],
)
def test_short_runs_and_few_images_have_none(options, photos, many, caplog, more, reason):
    caplog.set_level("INFO")
    more = {key: photos if value == "PHOTOS" else value for key, value in more.items()}
    short = {"data": many, "steps": 16, "batch_size": 64, "verdict": "off", "gate": "none", "report_images": False}
    upstep_fast.adapt(**options | short | more)
    assert not (options["out"] / whitening.FILE).exists() and reason in caplog.text
