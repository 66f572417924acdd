"""Whitened features against scikit-learn, their identities, and the whitening file."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.covariance import OAS
from timm.models.vision_transformer import VisionTransformer

from upstep_fast import embed, evaluate
from upstep_fast.cli import demo
from upstep_fast.engine import vit as engine
from upstep_fast.errors import ConfigError
from upstep_fast.evaluation import whitening
from upstep_fast.evaluation.features import append_whitened, ensemble, unwhitened
from upstep_fast.model import backbone, pooling
from upstep_fast.train.adapt import adapt


def unit(n, width=24, seed=0):
    """Return unit vectors with a nonzero mean that vary about ten times more in some directions than in others."""
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, width, generator=g) * torch.linspace(0.3, 1, width) + 0.3, dim=-1)


def parts(n, seed=0):
    """Features and mean patch tokens, [N, 2, D]."""
    return torch.stack([unit(n, seed=seed), unit(n, seed=seed + 100)], 1)


@pytest.mark.parametrize("n", [2, 10, 400])
def test_the_covariance_matches_scikit_learns_oas(n):
    x = parts(n)
    found = whitening.fit(x)
    assert found.mean.shape == (2, 24) and found.matrix.shape == (2, 24, 24)
    for part, mean, matrix in zip(x.unbind(1), found.mean, found.matrix.double(), strict=True):
        oracle = OAS().fit(part.double().numpy())
        assert mean.numpy() == pytest.approx(oracle.location_, abs=1e-6)
        # the matrix is the inverse root: applied twice it is the inverse, scikit-learn's precision
        squared = (matrix @ matrix).numpy()
        assert np.abs(squared - oracle.precision_).max() < 1e-5 * np.abs(oracle.precision_).max()
        eigenvalues = torch.linalg.eigvalsh(torch.cov(part.double().T, correction=0)).clamp_min(0)
        assert whitening.shrinkage(eigenvalues, n) == pytest.approx(oracle.shrinkage_, rel=1e-6)


def test_with_many_images_the_whitened_covariance_is_the_identity():
    x = unit(20_000)
    found = whitening.fit(x[:, None])
    covariance = torch.cov(((x - found.mean[0]) @ found.matrix[0]).double().T)
    assert (covariance - torch.eye(24)).abs().max() < 0.02
    before = torch.cov(x.double().T).diagonal()
    assert before.max() > 8 * before.min()


@pytest.mark.parametrize("num", [1, 2])
def test_similarity_is_half_unwhitened_and_half_whitened(num):
    x, queries = parts(300)[:, :num], parts(7, seed=1)[:, :num]
    by = whitening.fit(x)
    both = whitening.append_whitened(queries, by)
    assert both.shape == (7, (1 + num) * 24) and both.norm(dim=-1) == pytest.approx(torch.ones(7))
    expected = queries[:, 0].double() @ queries[:, 0].double().T / 2
    for part, mean, matrix in zip(queries.unbind(1), by.mean.double(), by.matrix.double(), strict=True):
        whitened = F.normalize((part.double() - mean) @ matrix, dim=-1)
        expected += whitened @ whitened.T / (2 * num)
    assert (both @ both.T - expected).abs().max() < 1e-5


def test_similarities_are_invariant_to_rotation():
    x = parts(300)
    turn = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(3)))[0]
    found, turned = (whitening.append_whitened(y, whitening.fit(y)) for y in (x, x @ turn))
    assert (found @ found.T - turned @ turned.T).abs().max() < 1e-4


def test_equal_features_are_not_whitened_and_a_warning_is_logged(caplog):
    x = F.normalize(torch.ones(5, 2, 8), dim=-1)
    nearly = F.normalize(x + 1e-7 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), dim=-1)
    for same in (x, x[:1], nearly):
        caplog.clear()
        both = whitening.append_whitened(same, whitening.fit(same))
        assert f"the features of all {len(same)} images are equal" in caplog.text
        assert torch.equal(both[:, :8], same[:, 0] / 2**0.5) and not both[:, 8:].any()


def test_the_ensemble_concatenates_all_features():
    x = {"base": parts(50), "adapted": parts(50, seed=1)}
    by = {name: whitening.fit(value) for name, value in x.items()}
    found = append_whitened(x, by)
    assert torch.equal(found["ensemble"], ensemble(found["base"], found["adapted"]))
    assert found["ensemble"].shape == (50, 6 * 24) and found.keys() == {"base", "adapted", "ensemble"}
    assert torch.equal(unwhitened(x)["ensemble"], ensemble(x["base"][:, 0], x["adapted"][:, 0]))
    assert (
        append_whitened({"base": x["base"]}, {"base": by["base"]}).keys()
        == unwhitened({"base": x["base"]}).keys()
        == {"base"}
    )


@pytest.mark.parametrize(("pool", "num"), [("token", 2), ("avg", 1), ("map", 2)])
def test_the_engine_pools_as_the_model_does(pool, num):
    torch.manual_seed(0)
    options = dict(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3)
    vit = VisionTransformer(global_pool=pool, class_token=pool == "token", **options).eval().requires_grad_(False)
    images = torch.randn(3, 3, 16, 16)
    tokens = vit.forward_features(images)
    found = pooling.pooled_and_patch_mean(vit, tokens)
    assert found.shape == (3, num, 32) and pooling.num_parts(vit) == num
    assert torch.equal(found[:, 0], pooling.features(vit, images))
    if num == 2:
        assert torch.equal(found[:, 1], tokens[:, vit.num_prefix_tokens :].mean(1))
    with torch.no_grad():
        ours = engine.build(vit, torch.float32, pool=pooling.pooled_and_patch_mean).features(images)
    assert (ours - found).abs().max() < 1e-5


def test_real_signs_and_their_own_domain(shared):
    model, data = demo.assets()
    scores = evaluate(model, data, source=shared / "source_64.tar", device="cpu")
    assert scores["base"]["knn_whitened"] > scores["base"]["knn"] + 1
    assert scores["source_whitened"].keys() == {"base"}
    # with the whitening of the signs: that of the domain itself would gain there, the signs' must not cost much
    assert -3 < scores["source_whitened"]["base"] - scores["source"]["base"] < 1.5


@pytest.fixture
def adapter(options):
    adapt(**options | dict(steps=2, gate="none", report_images=False))
    return options["out"] / "adapter"


@pytest.fixture
def common(adapter):
    return dict(adapter=adapter, device="cpu", precision="fp32")


def test_queries_are_whitened_as_the_bank(model, photos, common, tmp_path):
    def features(name, **more):
        return load_file(embed(model, photos, tmp_path / f"{name}.safetensors", **common | more))["features"]

    unwhitened_features, kept = features("plain"), str(tmp_path / "whitening.safetensors")
    D = unwhitened_features.shape[1]
    bank = features("bank", fit_whitening=kept)
    assert bank.shape == (24, 3 * D) and (bank[:, :D] * 2**0.5 - unwhitened_features).abs().max() < 1e-6
    assert bank.norm(dim=-1) == pytest.approx(torch.ones(24), abs=1e-5)
    by = whitening.read(kept, {"base": backbone.fingerprint(backbone.load(model).vit)})["base"]
    again = features("again", whitening=kept)
    assert torch.equal(bank, again)
    assert features("ensemble", whitening=kept, ensemble=True).shape == (24, 6 * D)
    # without the adapter the file still has the base model's part
    of_base = features("base", whitening=kept, adapter=None)
    x = features("base as it is", adapter=None)
    whitened = F.normalize((x - by.mean[0]) @ by.matrix[0], dim=-1)
    assert (of_base[:, D : 2 * D] - whitened / 2).abs().max() < 1e-5


def test_a_whitening_of_another_model_or_a_damaged_file_is_refused(model, photos, adapter, tmp_path):
    def refused(file, match, **more):
        with pytest.raises(ConfigError, match=match):
            embed(model, photos, tmp_path / "out.npy", whitening=str(file), device="cpu", **more)
        assert not (tmp_path / "out.npy").exists()

    kept = tmp_path / "whitening.safetensors"
    embed(model, photos, tmp_path / "base.npy", fit_whitening=str(kept), device="cpu")
    refused(kept, "was not fitted to this adapted model", adapter=adapter)
    save_file({"base.mean": torch.zeros(2, 48)}, kept)
    refused(kept, "was not fitted to this base model")
    kept.write_bytes(b"\x08")
    refused(kept, "cannot be read")
    refused(tmp_path / "nothing", "nothing: No such file")


def test_whitening_files_are_checked_before_images_are_read(model, photos, tmp_path):
    there = tmp_path / "there"
    there.write_bytes(b"precious")
    for path, match in ((there, "fit_whitening: .* exists"), (tmp_path / "no" / "w", "fit_whitening: no folder")):
        with pytest.raises(ConfigError, match=match):
            embed(model, tmp_path / "no images", tmp_path / "out.npy", fit_whitening=str(path), device="cpu")
    assert there.read_bytes() == b"precious"
    for name in ("out.npy", "out.txt"):  # the second is where the names of the first stand
        with pytest.raises(ConfigError, match="need names that differ"):
            embed(model, photos, tmp_path / "out.npy", fit_whitening=str(tmp_path / name), device="cpu")
    with pytest.raises(ConfigError, match="not both"):
        embed(model, photos, tmp_path / "out.npy", fit_whitening="a", whitening="b")


def test_a_whitening_that_cannot_be_one_is_refused(model, photos, tmp_path):
    kept = tmp_path / "whitening.safetensors"
    embed(model, photos, tmp_path / "base.npy", fit_whitening=str(kept), device="cpu")
    with safe_open(kept, "pt") as file:
        metadata = file.metadata()
    good = load_file(kept)
    mean, matrix = good["base.mean"], good["base.matrix"]
    turned = matrix.clone()
    turned[:, 0, 1] += 1
    cases = {
        "not finite": [{"base.mean": mean * torch.nan}, {"base.matrix": matrix * torch.inf}],
        "mean .*longer": [{"base.mean": mean * 100}],
        "not symmetric": [{"base.matrix": turned}],
        # all but the last broadcast
        r"this model needs \[2, 48\] and \[2, 48, 48\]": [
            {"base.mean": torch.zeros(1)},
            {"base.mean": torch.tensor(0.0)},
            {"base.mean": mean[:1], "base.matrix": matrix[:1]},
            {"base.mean": mean.double(), "base.matrix": matrix.double()},
            {"base.matrix": matrix[:, :, :10].contiguous()},
        ],
        "does not contain": [{"base.mean": None}],
    }
    for match, changes in cases.items():
        for change in changes:
            save_file({k: v for k, v in (good | change).items() if v is not None}, kept, metadata)
            with pytest.raises(ConfigError, match=f"whitening: .*{match}") as error:
                embed(model, photos, tmp_path / "out.npy", whitening=str(kept), device="cpu")
            assert "\n" not in str(error.value) and not (tmp_path / "out.npy").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_as_whitening_file_is_refused_without_waiting(model, photos, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"whitening: .*pipe is a named pipe"):
        embed(model, photos, tmp_path / "out.npy", whitening=str(tmp_path / "pipe"), device="cpu")


@pytest.mark.parametrize("n", [3, 20])
def test_with_fewer_images_than_dimensions_new_images_stay_bounded(n):
    """A PCA whitening divides by the root of eigenvalues that are rounding; OAS keeps them at rho times the mean."""
    x, new = unit(n, width=64), unit(200, width=64, seed=5)
    found, oracle = whitening.fit(x[:, None]), OAS().fit(x.double().numpy())
    ours = ((new - found.mean[0]) @ found.matrix[0]).double().square().sum(1)
    assert ours.numpy() == pytest.approx(oracle.mahalanobis(new.double().numpy()), rel=1e-3)
    assert found.matrix.abs().max() < 100
