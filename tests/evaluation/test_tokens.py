"""Patch tokens: those of the plain model, on their grid, in files that are whole or not there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from vit_models import SMALL, randomized, saved, small

import upstep_fast
from upstep_fast.cli.commands import main
from upstep_fast.errors import ConfigError, DataError, RunFailedError
from upstep_fast.evaluation import whitening
from upstep_fast.evaluation.dense import embed_tokens, token_files, token_job
from upstep_fast.evaluation.dense.picture import token_colors, upsampled
from upstep_fast.evaluation.dense.token_files import read_tokens
from upstep_fast.evaluation.dense.tokens import append_whitened, grid_of, on_grid

zarr = pytest.importorskip("zarr")

KINDS = {
    "class token": {},
    "mean pooling": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 4},
    "not square": {"img_size": (24, 40)},
    "dynamic": {"dynamic_img_size": True, "img_size": (40, 24)},
    "padded": {"dynamic_img_size": True, "dynamic_img_pad": True, "img_size": (30, 41)},
}


def eva(**args):
    return timm.create_model("eva02_tiny_patch14_224", **SMALL | {"use_rot_pos_emb": True} | args)


@pytest.fixture(scope="module")
def tiny(model):
    return upstep_fast.load(model, device="cpu", precision="fp32")


def expected(m, images):
    """The definition: tokens after the prefix, of unit length, row by row."""
    height, width = images.shape[-2:]
    down, across = (-(-side // 8) for side in (height, width))  # of the padded input
    with torch.no_grad():
        tokens = m.vit.forward_features(images)[:, -down * across :]
    return F.normalize(tokens, dim=-1).unflatten(1, (down, across)).numpy()


@pytest.mark.parametrize("kind", [*KINDS, "eva"])
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_tokens_are_those_of_the_plain_model(tmp_path, kind, implementation):
    if kind == "eva":
        vit, args = randomized(eva()), SMALL | {"use_rot_pos_emb": True}
    else:
        args = SMALL | KINDS[kind]
        vit = small(**KINDS[kind])
    m = upstep_fast.load(saved(vit, tmp_path, args), device="cpu", precision="fp32", implementation=implementation)
    images = torch.randn(3, 3, *m.backbone.img_size, generator=torch.Generator().manual_seed(0))
    tokens = m.tokens(list(images))
    assert tokens.shape == (3, *grid_of(m.backbone), 48) and tokens.dtype == np.float32
    np.testing.assert_allclose(tokens, expected(m, images), atol=2e-6)


def test_the_grid_is_that_of_the_image(tiny):
    """A change of the pixels in one patch changes the patch embedding there; a model without blocks shows where."""
    vit = timm.create_model("vit_tiny_patch16_224", **SMALL | {"depth": 0, "img_size": (24, 40)}).eval()
    image = torch.zeros(1, 3, 24, 40)
    changed = image.clone()
    changed[:, :, 8:16, 32:40] = 1
    backbone = upstep_fast.model.backbone.Backbone(vit, "x", 48, (24, 40), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
    with torch.no_grad():
        a, b = (on_grid(vit.forward_features(x)[:, 1:], backbone)[0] for x in (image, changed))
    assert (a - b).abs().amax(-1).nonzero().tolist() == [[1, 4]]


def test_tokens_that_are_no_grid_are_refused(tiny):
    with pytest.raises(ConfigError, match=r"gives 15 tokens .* no grid of 4 x 4 patches"):
        on_grid(torch.zeros(2, 15, 48), tiny.backbone)


def test_a_whitening_of_images_leaves_tokens_as_they_are(tiny, photos):
    plain = tiny.tokens(photos)
    assert np.array_equal(tiny.fit_whitening(photos).tokens(photos), plain)
    mean = plain.reshape(24, -1, 48).mean(1)
    unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    assert np.isfinite(unit).all()


@pytest.mark.parametrize("suffix", [".zarr", ".safetensors"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_files_hold_the_tokens_of_the_model(tiny, model, photos, tmp_path, monkeypatch, suffix, dtype):
    monkeypatch.setattr(token_files, "CHUNK_BYTES", 5 * 16 * 48 * 4)  # of 24 images, the last chunk is short
    out = tmp_path / f"t{suffix}"
    upstep_fast.embed(model, photos, out, tokens=True, dtype=dtype, batch_size=7, device="cpu", precision="fp32")
    table = read_tokens(out)
    assert list(table.names) == tiny.paths(photos) and len(table) == 24
    assert table.x.dtype == token_files.DTYPES[dtype]
    x = np.concatenate([table.rows(at, min(at + 10, 24)) for at in range(0, 24, 10)])
    np.testing.assert_allclose(x, tiny.tokens(photos), atol=2e-6 if dtype == "fp32" else 5e-4)
    assert table.facts["grid"] == [4, 4] and table.facts["patch"] == [8, 8] and table.facts["columns"] == {"tokens": 48}
    assert table.facts["preprocessing"]["img_size"] == [32, 32] and "plain" in table.facts["form"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name]


def test_a_store_is_read_by_zarr_alone(model, photos, tmp_path):
    upstep_fast.embed(model, photos, tmp_path / "t.zarr", tokens=True, device="cpu")
    group = zarr.open_group(tmp_path / "t.zarr", mode="r")
    assert group["tokens"].shape == (24, 4, 4, 48) and group["tokens"].metadata.zarr_format == 3
    assert str(group["path"][3]).endswith("03.png") and group.attrs["upstep_fast"]["columns"] == {"tokens": 48}


def test_whitened_tokens_are_fitted_to_single_tokens(tiny, model, photos, tmp_path):
    how = dict(tokens=True, device="cpu", precision="fp32")
    upstep_fast.embed(model, photos, tmp_path / "a.safetensors", fit_whitening=tmp_path / "w.safetensors", **how)
    table = read_tokens(tmp_path / "a.safetensors")
    x = table.rows(0, 24)
    plain = tiny.tokens(photos)
    t = torch.from_numpy(plain).flatten(0, 2)
    np.testing.assert_allclose(x[..., :48] * 2**0.5, plain, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, atol=1e-5)
    # the definition, in float64, without shrinkage's part: S from the file's rho is what `fit` gives
    fitted = whitening.fit(t[:, None])
    w = (t.double() - t.double().mean(0)) @ fitted.matrix[0].double()
    np.testing.assert_allclose(x[..., 48:].reshape(-1, 48) * 2**0.5, F.normalize(w, dim=-1), atol=2e-4)
    np.testing.assert_allclose(append_whitened(torch.from_numpy(plain), fitted), x, atol=1e-5)
    upstep_fast.embed(model, photos, tmp_path / "b.zarr", whitening=tmp_path / "w.safetensors", **how)
    other = read_tokens(tmp_path / "b.zarr")
    assert np.array_equal(other.rows(0, 24), x) and other.facts["fingerprint"] == table.facts["fingerprint"]
    with pytest.raises(ConfigError, match=r"is for single patch tokens .*, not for features of images"):
        upstep_fast.embed(model, photos, tmp_path / "f.npy", whitening=tmp_path / "w.safetensors", device="cpu")
    upstep_fast.embed(model, photos, tmp_path / "f.npy", fit_whitening=tmp_path / "i.safetensors", device="cpu")
    with pytest.raises(ConfigError, match="is for features of images, not for single patch tokens"):
        upstep_fast.embed(model, photos, tmp_path / "c.zarr", whitening=tmp_path / "i.safetensors", **how)


def test_unreadable_images_are_left_out(tiny, model, photos, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(token_files, "CHUNK_BYTES", 5 * 16 * 48 * 4)
    data = Path(shutil.copytree(photos, tmp_path / "data"))
    for name in ("02.png", "20.png"):
        (data / name).write_bytes(b"no image")
    out = tmp_path / "t.zarr"
    upstep_fast.embed(model, data, out, tokens=True, max_bad_fraction=0.5, device="cpu", precision="fp32")
    table = read_tokens(out)
    assert [Path(name).name for name in table.names] == [f"{i:02}.png" for i in range(24) if i not in (2, 20)]
    keep = [i for i in range(24) if i not in (2, 20)]
    np.testing.assert_allclose(table.rows(0, 22), tiny.tokens(photos)[keep], atol=2e-6)
    assert caplog.text.count("skipped") == 2
    for path in data.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of the 24 images could be read"):
        upstep_fast.embed(model, data, tmp_path / "u.zarr", tokens=True, max_bad_fraction=1.0, device="cpu")
    assert not (tmp_path / "u.zarr").exists()


def test_gaps_of_ranks_are_closed(tmp_path):
    """Ranks write whole chunks of the images that are theirs; rows of unreadable ones stay empty until the end."""
    rows = np.random.default_rng(0).normal(size=(10, 2, 3, 4)).astype(np.float32)
    token_files.create_zarr(tmp_path / "t", rows.shape, np.dtype("float32"))
    x = token_files.tokens_array(tmp_path / "t")
    parts = [(0, 2), (4, 4), (8, 1)]  # of chunks of any size
    for start, count in parts:
        x[start : start + count] = rows[start : start + count]
    token_files.finish_zarr(tmp_path / "t", parts, [str(i) for i in range(7)], {})
    (tmp_path / "t").rename(tmp_path / "t.zarr")
    assert np.array_equal(read_tokens(tmp_path / "t.zarr").rows(0, 7), rows[[0, 1, 4, 5, 6, 7, 8]])


@pytest.fixture
def store(model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "CHUNK_BYTES", 5 * 16 * 48 * 4)
    out = tmp_path / "t.zarr"
    upstep_fast.embed(model, photos, out, tokens=True, device="cpu")
    return out


def damaged(store, what):
    chunk = store / "tokens" / "c" / "2" / "0" / "0" / "0"
    if what == "lost chunk":
        chunk.unlink()
    elif what == "cut chunk":
        chunk.write_bytes(chunk.read_bytes()[:-100])
    elif what == "changed chunk":
        raw = bytearray(chunk.read_bytes())
        raw[1000] ^= 1
        chunk.write_bytes(raw)
    elif what == "no facts":
        values = json.loads((store / "zarr.json").read_text())
        values["attributes"] = {}
        (store / "zarr.json").write_text(json.dumps(values))
    elif what == "lost names":
        shutil.rmtree(store / "path" / "c")
    elif what == "no array":
        shutil.rmtree(store / "tokens")
    elif what == "no store":
        (store / "zarr.json").unlink()
    elif what == "no JSON":
        (store / "tokens" / "zarr.json").write_text("{")


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("lost chunk", "is not complete: 1 of 5 chunks are missing"),
        ("cut chunk", "cannot read"),
        ("changed chunk", "cannot read"),
        ("no facts", "is not complete: it states no facts"),
        ("lost names", "is not complete"),
        ("no array", "cannot read"),
        ("no store", "cannot read"),
        ("no JSON", "cannot read"),
    ],
)
def test_a_damaged_store_is_refused_in_one_line(store, what, text):
    damaged(store, what)
    with pytest.raises(DataError, match=text) as error:
        read_tokens(store).rows(0, 24)
    assert "\n" not in str(error.value) and "embed them again" in str(error.value)


def test_a_chunk_that_is_lost_after_the_check_reads_as_no_tokens(store):
    table = read_tokens(store)
    damaged(store, "lost chunk")
    with pytest.raises(DataError, match=r"those of .*10.png in .* are missing, not finite or 0"):
        table.rows(8, 24)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--out", "t.npy"], "out: t.npy must end in .zarr or .safetensors with --tokens"),
        (["--out", "no/t.zarr"], "out: no folder no"),
        (["--out", "no/t.safetensors"], "out: no folder no"),
        (["--out", "t.zarr", "--with-base"], "with_base: is of features of whole images"),
        (["--out", "there.zarr"], "out: there.zarr exists"),
        (["--out", "there.zarr", "--overwrite"], "there.zarr is no store of Zarr, so --overwrite does not replace it"),
        (["--out", "t.zarr", "--dtype", "fp8"], "dtype"),
    ],
)
def test_bad_input_is_one_line(model, photos, tmp_path, monkeypatch, capsys, args, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.zarr").mkdir()
    (tmp_path / "there.zarr" / "mine.txt").write_text("kept")
    with pytest.raises(SystemExit) as stop:
        main(["embed", "--model", model, "--data", str(photos), "--tokens", *args])
    assert stop.value.code == 2 and text in capsys.readouterr().err
    assert (tmp_path / "there.zarr" / "mine.txt").read_text() == "kept"


def test_what_does_not_fit_is_said_before_the_work(model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(embed_tokens, "MAX_IN_MEMORY", 1000)
    with pytest.raises(ConfigError, match=r"a \.safetensors is for at most .*; write \.zarr, or --dtype fp16"):
        upstep_fast.embed(model, photos, tmp_path / "t.safetensors", tokens=True, device="cpu")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ConfigError, match=r"needs 0.1 MB, .* has 0.0 MB free; --dtype fp16 or fewer images"):
        upstep_fast.embed(model, photos, tmp_path / "t.zarr", tokens=True, device="cpu")
    assert not list(tmp_path.iterdir())


def test_a_second_writer_is_refused_and_overwrite_replaces(store, model, photos, tmp_path):
    how = dict(tokens=True, overwrite=True, device="cpu")
    with (
        embed_tokens._locked(store),
        pytest.raises(ConfigError, match=r"another process writes .*t\.zarr; wait for it"),
    ):
        upstep_fast.embed(model, photos, store, **how)
    assert len(read_tokens(store)) == 24
    few = Path(shutil.copytree(photos, tmp_path / "few"))
    for path in sorted(few.iterdir())[3:]:
        path.unlink()
    upstep_fast.embed(model, few, store, **how)
    assert len(read_tokens(store)) == 3


class Killed(BaseException):
    """In place of SIGKILL: nothing after it touches the disk."""


@pytest.mark.parametrize("at", [0, 3, "finish", "replace"])
def test_a_killed_run_leaves_the_old_store_and_the_next_one_clears_up(store, model, photos, monkeypatch, at):
    before = read_tokens(store).rows(0, 24)
    how = dict(tokens=True, overwrite=True, batch_size=5, device="cpu")

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        if at in ("finish", "replace"):
            where = (token_files, "finish_zarr") if at == "finish" else (embed_tokens, "replace_folder")
            patch.setattr(*where, killed)
        else:
            calls = iter(range(99))
            real = token_job.token_batches

            def batches(*args, **kwargs):
                for batch in real(*args, **kwargs):
                    if next(calls) == at:
                        raise Killed
                    yield batch

            patch.setattr(token_job, "token_batches", batches)
        with pytest.raises(Killed):
            upstep_fast.embed(model, photos, store, **how)
    assert (store.parent / ".tmp-t.zarr").is_dir()
    assert np.array_equal(read_tokens(store).rows(0, 24), before)
    if at != "replace":  # a store under a temporary name is none, whatever it is renamed to
        (store.parent / ".tmp-t.zarr").rename(store.parent / "moved.zarr")
        with pytest.raises(DataError, match="embed them again"):
            read_tokens(store.parent / "moved.zarr")
    upstep_fast.embed(model, photos, store, **how)
    np.testing.assert_allclose(read_tokens(store).rows(0, 24), before, atol=2e-6)
    assert not (store.parent / ".tmp-t.zarr").exists()


def test_a_full_disk_is_one_line(model, photos, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "c/0")

    monkeypatch.setattr(token_files, "finish_zarr", full)
    with pytest.raises(RunFailedError, match="No space left on device; what was there is unchanged"):
        upstep_fast.embed(model, photos, tmp_path / "t.zarr", tokens=True, device="cpu")
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_wrote(model, photos, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["embed", "--model", model, "--data", str(photos), "--tokens", "--out", str(tmp_path / "t.safetensors")])
    assert "base patch tokens, plain, unit length; 24 x 4 x 4 x 48" in capsys.readouterr().out.replace("\n", " ")
    assert load_file(tmp_path / "t.safetensors")["tokens"].shape == (24, 4, 4, 48)
    assert Image.open(photos / "00.png").size == (40, 40)


def test_colors_are_the_components_of_scikit_learn_in_one_projection():
    sklearn = pytest.importorskip("sklearn.decomposition")
    g = torch.Generator().manual_seed(0)
    models = [torch.randn(3, 4, 5, 12, generator=g) * torch.linspace(3, 0.1, 12) + shift for shift in (0.0, 0.5)]
    rows = torch.cat([x.flatten(0, 2) for x in models]).double().numpy()
    theirs = sklearn.PCA(3, svd_solver="full").fit_transform(rows)
    ours = torch.cat([x.permute(0, 2, 3, 1).flatten(0, 2) for x in token_colors(models)]).double().numpy()
    for axis in range(3):
        low, high = np.quantile(theirs[:, axis], [0.01, 0.99])
        expected = ((theirs[:, axis] - low) / (high - low)).clip(0, 1)
        flipped = 1 - expected  # an axis has no direction of its own
        assert min(np.abs(ours[:, axis] - x).max() for x in (expected, flipped)) < 1e-5
    assert torch.equal(token_colors([models[0]] * 2)[0], token_colors([models[0]] * 2)[1])
    flat = token_colors([torch.ones(2, 3, 3, 2)])[0]  # of one color, and of fewer than three directions
    assert flat.shape == (2, 3, 3, 3) and flat.isfinite().all()


def test_colors_are_upsampled_between_the_patches():
    colors = torch.zeros(1, 3, 1, 2)
    colors[..., 1] = 1
    assert upsampled(colors, (2, 4))[0, 0].tolist() == [[0, 64, 191, 255]] * 2  # bilinear: 0, 1/4, 3/4, 1
