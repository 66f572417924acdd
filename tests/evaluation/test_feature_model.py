"""Features in memory: equal to the embed command's, of images in every form, and errors in one line."""

import pickle
import shutil

import numpy as np
import peft
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import upstep_fast
from upstep_fast.errors import ConfigError, DataError, RunFailedError


@pytest.fixture(scope="module")
def run(short_run, model, photos, tmp_path_factory):
    """The folder of a finished run, whose images have 24 x 40 pixels."""
    out = tmp_path_factory.mktemp("run") / "out"
    upstep_fast.adapt(model, photos, out, **short_run | dict(steps=3, img_size=(24, 40), lr=0.01))
    return out


@pytest.fixture(scope="module")
def m(run):
    return upstep_fast.load(run, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def written(model, run, photos, tmp_path_factory):
    """What `upstep-fast embed` writes: features, their paths, and the same with a whitening fitted to the images."""
    folder = tmp_path_factory.mktemp("written")
    common = dict(adapter=run / "adapter", img_size=(24, 40), device="cpu", precision="fp32", batch_size=10)
    plain = upstep_fast.embed(model, photos, folder / "f.npy", **common)
    whitened = upstep_fast.embed(model, photos, folder / "w.npy", fit_whitening=folder / "whitening", **common)
    return np.load(plain), plain.with_suffix(".txt").read_text().splitlines(), np.load(whitened), folder / "whitening"


class Photos(Dataset):
    """Transformed images with labels, as a user's dataset gives them."""

    def __init__(self, paths, transform):
        self.paths, self.transform = paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with Image.open(self.paths[index]) as image:
            return self.transform(image), index


def test_features_of_paths_equal_embeds_bit_for_bit(m, photos, written):
    features, names, *_ = written
    x = m.embed(photos, batch_size=10)
    assert x.dtype == np.float32 and x.shape == (24, m.dim) and m.dim == 48
    assert np.array_equal(x, features) and m.paths(photos) == names
    assert np.array_equal(m.embed(names, batch_size=10, num_workers=0), features)
    assert np.array_equal(m.embed(names[:3] * 2, batch_size=3), np.concatenate([features[:3]] * 2))  # a row per image
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-6)
    assert np.abs(x - upstep_fast.load(m.backbone.name, img_size=(24, 40), device="cpu").embed(photos)).max() > 1e-3


def test_features_of_other_forms_equal_those_of_paths(m, written):
    features, names, *_ = written
    images = [Image.open(name) for name in names]
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    same = [image.resize((30, 50)) for image in images]
    stacked = np.stack([np.asarray(image.convert("RGB")) for image in same])
    for form in (images, arrays, (x / 255 for x in arrays), [m.transform(name) for name in names]):
        np.testing.assert_allclose(m.embed(form), features, rtol=0, atol=2e-6)
    for form in (same, stacked, stacked.astype(np.float32) / 255, (stacked.astype(np.uint16) << 8) + 7):
        np.testing.assert_allclose(m.embed(form), m.embed(list(stacked)), rtol=0, atol=2e-6)
    loader = DataLoader(Photos(names, m.transform), batch_size=7)
    np.testing.assert_allclose(m.embed(loader), features, rtol=0, atol=2e-6)
    for key in ("pixel_values", "image", "images"):
        rows = [{"label": 3, key: m.transform(name)} for name in names[:5]]
        np.testing.assert_allclose(m.embed(DataLoader(rows, batch_size=2)), features[:5], rtol=0, atol=2e-6)
    x = m(torch.stack([m.transform(name) for name in names[:5]]))
    assert x.shape == (5, 48) and not x.requires_grad
    np.testing.assert_allclose(x.numpy(), features[:5], rtol=0, atol=2e-6)


def test_gray_and_transparent_images_are_read_as_files_are(m, tmp_path):
    rng = np.random.default_rng(0)
    gray, rgba = rng.integers(0, 256, (50, 60), np.uint8), rng.integers(0, 256, (50, 60, 4), np.uint8)
    for name, array in (("gray.png", gray), ("rgba.png", rgba)):
        Image.fromarray(array).save(tmp_path / name)
    forms = [gray, gray[..., None], Image.open(tmp_path / "gray.png")], [rgba, Image.open(tmp_path / "rgba.png")]
    for images, name in zip(forms, ("gray.png", "rgba.png"), strict=True):
        assert np.array_equal(m.embed(images), m.embed([tmp_path / name] * len(images)))
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(rgba[..., :3]).save(tmp_path / "turned.png", exif=turned)
    expected = m.embed([tmp_path / "turned.png"])
    assert np.array_equal(m.embed([Image.open(tmp_path / "turned.png")]), expected)
    assert np.array_equal(m.embed([np.rot90(rgba[..., :3], -1)]), expected)


def test_whitened_features_equal_embeds(m, run, photos, written, tmp_path):
    _, names, whitened, file = written
    by_file = upstep_fast.load(run, whiten=file, device="cpu", precision="fp32")
    assert np.array_equal(by_file.embed(photos, batch_size=10), whitened) and by_file.dim == whitened.shape[1]
    fitted = m.fit_whitening(photos, batch_size=10)
    assert np.array_equal(fitted.embed(names, batch_size=10), whitened)
    assert m.whitening is None and "whitened" in repr(fitted)
    with pytest.raises(ConfigError, match=r"whiten: there is no .*whitening.safetensors; .*--fit-whitening"):
        upstep_fast.load(run, whiten=True)
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.copy(file, copy / "whitening.safetensors")
    by_folder = upstep_fast.load(copy, whiten=True, device="cpu", precision="fp32")
    assert np.array_equal(by_folder.embed(photos, batch_size=10), whitened)


def test_a_pickled_model_gives_the_same_features(m, photos):
    again = pickle.loads(pickle.dumps(m.fit_whitening(photos)))
    assert np.array_equal(again.embed(photos), m.fit_whitening(photos).embed(photos))
    assert pickle.loads(pickle.dumps(m.transform)) == m.transform


def test_what_can_be_loaded(m, run, model, photos):
    base = upstep_fast.load(model, device="cpu")
    assert base.adapter is None and base.dim == 48 and "no adapter" in repr(base)
    assert repr(upstep_fast.load("demo", device="cpu")).startswith("FeatureModel(demo, ")
    of_adapter = upstep_fast.load(run / "adapter", model=model, img_size=(24, 40), device="cpu", precision="fp32")
    for other in (of_adapter, upstep_fast.load(run / "adapter", device="cpu", precision="fp32")):
        assert np.array_equal(other.embed(photos), m.embed(photos))
    assert repr(m) == (f"FeatureModel({model}, adapter {run}/adapter, images [3, 24, 40], D = 48, cpu in fp32)")
    tokens = m.vit.forward_features(m.transform(m.paths(photos)[0])[None])
    assert tokens.shape == (1, 16, 48)


def test_what_readme_hands_to_timm_and_peft_gives_features(m, run, model, photos):
    images = torch.stack([m.transform(path) for path in m.paths(photos)[:4]])
    base = timm.create_model(model, pretrained=True, num_classes=0, img_size=(24, 40))
    for theirs in (
        upstep_fast.load_adapted(run, num_classes=0),
        upstep_fast.load_adapted(run, num_classes=0, merged=False),
        peft.PeftModel.from_pretrained(base, run / "adapter").eval(),
    ):
        with torch.no_grad():
            x = torch.nn.functional.normalize(theirs(images), dim=-1)
        torch.testing.assert_close(x, m(images), rtol=0, atol=1e-5)
    assert upstep_fast.load_adapted(run)(images).shape == (4, 5)  # the base model's classifier
    assert upstep_fast.load_adapted(run, num_classes=7)(images).shape == (4, 7)
    with pytest.raises(ConfigError, match="num_classes: got -1, must be an integer of at least 0"):
        upstep_fast.load_adapted(run, num_classes=-1)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images: there are none"),
        (Image.new("RGB", (30, 30)), "images: got a Image; give a folder, a list of images"),
        (np.zeros((30, 30, 3), np.uint8), r"an array of shape \(30, 30, 3\); give"),
        (7, "images: got a int"),
        (["nowhere.jpg"], "images: nowhere.jpg: cannot be read: No such file"),
        ([None], "images: image 0: a NoneType is no image"),
        (np.full((1, 30, 30, 3), 255.0), "image 0: floating-point values outside 0..1"),
        (np.full((1, 30, 30, 3), np.nan), "image 0: floating-point values outside 0..1"),
        (np.zeros((1, 30, 30, 3), np.int64), "image 0: an array of int64; give uint8"),
        (np.zeros((1, 3, 30, 30), np.uint8), r"shape \(3, 30, 30\); .* takes 3 channels; \[C, H, W\] is read as"),
        ([np.zeros((0, 3, 3), np.uint8)], r"shape \(0, 3, 3\); an image is"),
        (np.zeros((2, 64)), r"shape \(64,\); an image is"),
        (torch.zeros(1, 3, 9, 9), r"a tensor \[3, 9, 9\] of torch.float32; .* \[3, 24, 40\]"),
        (torch.zeros(1, 3, 24, 40, dtype=torch.uint8), "of torch.uint8"),
        ({"image": 3}, "images: got a dict; give a folder"),
        (
            DataLoader([{"a": torch.zeros(3, 24, 40), "b": 1}]),
            "images: a batch has the keys a, b; name one pixel_values",
        ),
        (DataLoader([torch.zeros(3, 9, 9)]), r"the model takes floating-point \[B, 3, 24, 40\]"),
        (DataLoader([torch.full((3, 24, 40), torch.nan)]), "features of 1 of 1 images are not finite"),
    ],
)
def test_images_that_cannot_be_used_are_one_line(m, images, message):
    with pytest.raises((DataError, RunFailedError), match=message) as refusal:
        m.embed(images)
    assert "\n" not in str(refusal.value)


def test_an_unreadable_image_is_named(m, photos, tmp_path):
    good = m.paths(photos)[0]
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    with pytest.raises(DataError, match=r"images: .*cut.png: .*; repair it or leave it out"):
        m.embed(tmp_path)
    with pytest.raises(DataError, match=r"images: .*cut.png: "):
        m.embed([good, tmp_path / "cut.png"])
    with pytest.raises(ConfigError, match="batch_size: got 0"):
        m.embed(photos, batch_size=0)
    with pytest.raises(ConfigError, match="num_workers: got -1, must be at least 0"):
        m.embed(photos, num_workers=-1)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (3, {}, "load: got a int"),
        ("no_such_model", {}, "model: .*no_such_model"),
        ("MODEL", {"precision": "fp7"}, "load: precision: got"),
        ("MODEL", {"images": 3}, "load: unknown key 'images'"),
        ("MODEL", {"whiten": True}, "whiten: .* is no run's folder"),
        ("MODEL", {"model": "vit_base_patch16_224"}, "load: no folder at local-dir"),
        ("MODEL", {"device": "tpu"}, "device: 'tpu'"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(model, source, options, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        upstep_fast.load(model if source == "MODEL" else source, **options)
    assert "\n" not in str(refusal.value)


def test_an_adapter_elsewhere_names_its_model(m, run, model, photos, tmp_path):
    shutil.copytree(run / "adapter", tmp_path / "alone")
    alone = upstep_fast.load(tmp_path / "alone", device="cpu", precision="fp32")
    assert np.array_equal(alone.embed(photos), m.embed(photos))
    with pytest.raises(ConfigError, match=r"mean: got 0.2, but the adapter in .*alone was trained with"):
        upstep_fast.load(tmp_path / "alone", mean=(0.2,))
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(ConfigError, match=r"load: .* holds a run without an adapter"):
        upstep_fast.load(tmp_path)
    with pytest.raises(ConfigError, match=r"load: no folder at .*nowhere"):
        upstep_fast.load(tmp_path / "nowhere", model=model)
