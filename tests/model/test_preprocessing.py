"""Preprocessing and facts that a model's folder states: used as the tool that wrote it does, or refused by name."""

import json
import os
import shutil

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from vit_models import BASE_TINY, SMALL, images, randomized, saved, small

from upstep_fast.cli.commands import main
from upstep_fast.data.loading.loader import load_images
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import ConfigError
from upstep_fast.model import backbone
from upstep_fast.model.pooling import features

HF = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=56, patch_size=14)
MEAN_STD = {"image_mean": [0.3, 0.4, 0.5], "image_std": [0.2, 0.25, 0.3]}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Photographs that are not square: smooth noise, wide and tall."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate(((97, 64), (64, 90), (200, 150), (70, 70))):
        noise = np.random.default_rng(i).integers(0, 255, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def prepared(base, folder):
    (_, x), *_ = load_images(open_source([folder]), **base.eval_transform_args)
    return base.normalized(x)


def opened(folder):
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]


VIT = (transformers.ViTModel, lambda **a: transformers.ViTConfig(**HF | a, intermediate_size=96))
DINOV2 = (transformers.Dinov2Model, lambda **a: transformers.Dinov2Config(**HF | a, mlp_ratio=2))
REGISTERS = (
    transformers.Dinov2WithRegistersModel,
    lambda **a: transformers.Dinov2WithRegistersConfig(**HF | a, mlp_ratio=2),
)
DINOV3 = (transformers.DINOv3ViTModel, lambda **a: transformers.DINOv3ViTConfig(**HF | a, intermediate_size=96))
PROCESSORS = {
    "ViT squashes": (VIT, {}, "ViTImageProcessor", {"size": {"height": 56, "width": 56}} | MEAN_STD),
    "its own mean": (VIT, {}, "ViTImageProcessor", {"size": {"height": 56, "width": 56}}),
    "not normalized": (VIT, {}, "ViTImageProcessor", {"size": {"height": 56, "width": 56}, "do_normalize": False}),
    "DINOv2 crops": (
        DINOV2,
        {},
        "BitImageProcessor",
        {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}, "resample": 2} | MEAN_STD,
    ),
    "DINOv2 in another size": (
        DINOV2,
        {"image_size": 112},
        "BitImageProcessor",
        {"size": {"shortest_edge": 60}, "crop_size": {"height": 56, "width": 56}} | MEAN_STD,
    ),
    "registers in another size": (
        REGISTERS,
        {"image_size": 112},
        "BitImageProcessor",
        {"size": {"shortest_edge": 98}, "crop_size": {"height": 84, "width": 84}} | MEAN_STD,
    ),
    "DINOv3": (DINOV3, {}, "DINOv3ViTImageProcessor", {"size": {"height": 56, "width": 56}}),
    "squash and crop": (
        DINOV2,
        {},
        "BitImageProcessor",
        {"size": {"height": 70, "width": 70}, "crop_size": {"height": 56, "width": 56}},
    ),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_folder_of_transformers_gives_what_its_own_pipeline_gives(tmp_path, pictures, kind):
    (model, config), sizes, processor, stated = PROCESSORS[kind]
    theirs = randomized(model(config(**sizes)))
    theirs.save_pretrained(tmp_path)
    process = getattr(transformers, processor)(**stated)
    process.save_pretrained(tmp_path)
    ours = backbone.load(f"local-dir:{tmp_path}")
    expected = torch.cat([process(picture, return_tensors="pt")["pixel_values"] for picture in opened(pictures)])
    x = prepared(ours, pictures)
    # DINOv3's processor scales to 0..1 before it resizes: one level of 255
    torch.testing.assert_close(x, expected, rtol=0, atol=1.1 / 255 / min(ours.std) if "DINOv3" in kind else 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.vit.forward_features(x)[:, 0], theirs(x).last_hidden_state[:, 0], rtol=0, atol=1e-4
        )


SILENT = {
    "a crop without a size": (DINOV2, {}, "BitImageProcessor", {"crop_size": 70}),
    "DINOv2 at its processor's size": (DINOV2, {}, "BitImageProcessor", {}),
    "a size without a crop": (DINOV2, {}, "BitImageProcessor", {"size": {"shortest_edge": 240}}),
    "a square without a crop": (DINOV2, {}, "DeiTImageProcessor", {"size": {"height": 240, "width": 240}}),
    "DINOv3 at its processor's size": (DINOV3, {}, "DINOv3ViTImageProcessor", {}),
    "DeiT": (VIT, {"image_size": 224}, "DeiTImageProcessor", {}),
    "ViT": (VIT, {"image_size": 224}, "ViTImageProcessor", {}),
}


@pytest.mark.parametrize("kind", SILENT)
def test_what_a_processor_does_where_its_file_is_silent(tmp_path, pictures, kind):
    (model, config), sizes, processor, stated = SILENT[kind]
    model(config(**sizes)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": processor} | stated))
    process = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert type(process).__name__ == processor
    expected = torch.cat([process(picture, return_tensors="pt")["pixel_values"] for picture in opened(pictures)[2:]])
    ours = backbone.load(f"local-dir:{tmp_path}")
    assert ours.img_size == tuple(expected.shape[2:])
    # DINOv3's processor scales to 0..1 before it resizes: one level of 255
    atol = 1.1 / 255 / min(ours.std) if "DINOv3" in kind else 1e-5
    torch.testing.assert_close(prepared(ours, pictures)[2:], expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("stated", "crop_pct"), [({}, 1.0), ({"image_processor_type": "DeiTImageProcessor"}, 0.875)])
def test_a_model_of_one_size_keeps_it_where_its_file_states_none(tmp_path, hf_folder, stated, crop_pct):
    shutil.copytree(hf_folder, tmp_path / "hf")
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(stated))
    base = backbone.load(f"local-dir:{tmp_path / 'hf'}")
    # transformers refuses 224 x 224 for it
    assert base.img_size == (56, 56) and base.crop_mode == "squash" and base.crop_pct == crop_pct


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("img_size", [(48, 48), (32, 64)])
def test_timms_transform(tmp_path, pictures, crop_mode, img_size):
    name = saved(small(), tmp_path / "base", SMALL)
    state_in(tmp_path / "base", pretrained_cfg={"crop_mode": crop_mode, "crop_pct": 0.8})
    ours = backbone.load(name, img_size=img_size)
    data = timm.data.resolve_data_config({}, model=timm.create_model(name)) | {"input_size": (3, *img_size)}
    transform = timm.data.create_transform(**data)
    expected = torch.stack([transform(picture) for picture in opened(pictures)])
    x = prepared(ours, pictures)
    torch.testing.assert_close(x, expected, rtol=0, atol=2.1 / 255 / 0.5)  # torch rounds as pillow does, almost
    assert (x - expected).abs().mean() < 0.5 / 255 / 0.5


def state_in(folder, **entries):
    """Change entries of config.json, one level deep."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in entries.items():
        config[key] = config.get(key, {}) | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))


def run(*args):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    return stop.value.code


@pytest.mark.parametrize("kind", ["base_tiny", "squash", "no crop"])
def test_an_hf_export_read_again_is_the_exported_model(tmp_path, pictures, kind):
    shutil.copytree(BASE_TINY, base := tmp_path / "base")
    changes = {"base_tiny": {}, "squash": {"crop_mode": "squash", "crop_pct": 0.875, "interpolation": "bilinear"}}
    state_in(base, pretrained_cfg=changes.get(kind, {"crop_pct": 1.0}))
    common = ("--data", pictures, "--device", "cpu", "--precision", "fp32")
    for fmt in ("hf", "timm"):
        out = tmp_path / fmt
        assert run("export", "--model", f"local-dir:{base}", "--format", fmt, "--out", out, "--data", pictures) == 0
        for name, folder in ((f"{fmt}.npy", out), (f"{fmt}_before.npy", base)):
            assert run("embed", "--model", f"local-dir:{folder}", *common, "--out", tmp_path / name) == 0
        before = np.load(tmp_path / f"{fmt}_before.npy")
        np.testing.assert_allclose(np.load(tmp_path / f"{fmt}.npy"), before, rtol=0, atol=1e-4)


def test_transformers_cannot_prepare_every_input(tmp_path, capsys):
    args = SMALL | {"img_size": (32, 64)}
    name = saved(small(img_size=(32, 64)), tmp_path / "base", args)
    assert run("export", "--model", name, "--format", "hf", "--out", tmp_path / "hf") == 0
    assert not (tmp_path / "hf" / "preprocessor_config.json").exists()
    assert "transformers cannot prepare images for a 32 x 64 input as timm does" in capsys.readouterr().err
    backbone.load(f"local-dir:{tmp_path / 'hf'}")
    assert (
        "states its preprocessing; used is that of timm's vit_base_patch16_224: mean 0.5 0.5 0.5"
        in capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    VIT[0](VIT[1]()).save_pretrained(folder)
    return folder


BIT = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 64}, "crop_size": 56}
REFUSED = {
    "not resized": ({"do_resize": False}, "do_resize is false"),
    "not scaled": ({"do_rescale": False}, "do_rescale is false"),
    "scaled to -1..1": ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
    "padded": ({"do_pad": True}, "do_pad cannot be done"),
    "lanczos": ({"resample": 1}, "interpolation is 'lanczos', must be bilinear or bicubic"),
    "a resample of a list": ({"resample": [3]}, "interpolation is"),
    "a mean of 0..255": ({"image_mean": [123.675, 116.28, 103.53]}, "for pixels of 0..1"),
    "a size that fills the memory": (BIT | {"size": {"shortest_edge": 10**9}}, "must lie in 0.05 to 1"),
    "a resample of no kind": ({"resample": 77}, "interpolation is 77"),
    "std 0": ({"image_std": [0.1, 0.0, 0.1]}, r"std is \[0.1, 0.0, 0.1\], every value must be above 0"),
    "std -1": ({"image_std": -1}, "every value must be above 0"),
    "mean of 5": ({"image_mean": [0.1] * 5}, "mean has 5 values, the images have 3 channels"),
    "mean of text": ({"image_mean": ["a"] * 3}, "must be finite numbers"),
    "a longest edge": ({"size": {"longest_edge": 64}}, "must state shortest_edge, or height and width"),
    "a crop above the size": (BIT | {"crop_size": 70}, "is larger than size"),
    "another proportion": (BIT | {"crop_size": {"height": 28, "width": 56}}, "have other proportions"),
    "no crop": (BIT | {"do_center_crop": False}, "images have many sizes"),
    "size 0": ({"size": {"height": 0, "width": 0}}, "pixels above 0"),
    "size of text": ({"size": "big"}, "pixels above 0"),
    "a processor nobody knows": ({"image_processor_type": "OwlImageProcessor"}, "defaults .* are not known"),
    "crop_pct": ({"crop_pct": 0.9}, "crop_pct is not understood"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_preprocessing_that_cannot_be_done(tmp_path, hf_folder, kind):
    stated, message = REFUSED[kind]
    shutil.copytree(hf_folder, tmp_path / "hf")
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(stated))
    for arch in (None, "vit_base_patch16_224"):
        with pytest.raises(ConfigError, match=message) as error:
            backbone.load(f"local-dir:{tmp_path / 'hf'}", arch=arch)
            assert arch is not None
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
        if "channels" in message:
            break  # with another --arch the tensors do not fit, which is said first


@pytest.mark.parametrize(
    "entry", [{"patch_size": 7}, {"num_channels": 1}, {"layer_norm_eps": "x"}, {"layer_norm_eps": -1}]
)
def test_a_configuration_of_transformers_that_its_weights_contradict(tmp_path, hf_folder, entry):
    shutil.copytree(hf_folder, tmp_path / "hf")
    state_in(tmp_path / "hf", **entry)
    with pytest.raises(
        ConfigError, match=r"has channels and patch size \[3, 14, 14\], config.json states|layer_norm_eps in"
    ):
        backbone.load(f"local-dir:{tmp_path / 'hf'}")


# --arch beside a folder


def clip(folder, **stated):
    config = transformers.CLIPVisionConfig(
        hidden_size=768, num_hidden_layers=1, num_attention_heads=12, intermediate_size=3072, image_size=32, **stated
    )
    randomized(transformers.CLIPVisionModel(config)).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return f"local-dir:{folder}"


def test_quick_gelu_and_the_mean_of_a_clip_folder(tmp_path, monkeypatch):
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda arch, **args: real(arch, **args | {"depth": 1}))
    name = clip(tmp_path / "clip")
    with pytest.raises(ConfigError, match=r"name timm's architecture with --arch "):
        backbone.load(name)
    with pytest.raises(ConfigError, match=r"arch: .* contradicts .*: activation is QuickGELU there, GELU in it; take"):
        backbone.load(name, arch="vit_base_patch32_clip_224")
    base = backbone.load(name, arch="vit_base_patch32_clip_quickgelu_224")
    assert base.img_size == (32, 32) and base.mean == timm.data.constants.OPENAI_CLIP_MEAN and base.crop_pct == 1.0
    theirs, x = transformers.CLIPVisionModel.from_pretrained(tmp_path / "clip").eval(), images((32, 32))
    with torch.no_grad():
        torch.testing.assert_close(features(base.vit, x), theirs(x).pooler_output, rtol=0, atol=2e-5)


def test_the_arch_of_a_whole_clip_is_suggested(tmp_path):
    for act, name in (("quick_gelu", "vit_base_patch32_clip_quickgelu_224"), ("gelu", "vit_base_patch32_clip_224")):
        vision = {"hidden_size": 768, "patch_size": 32, "image_size": 224, "hidden_act": act}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
        with pytest.raises(ConfigError, match=f"several towers; .* with --arch {name}$"):
            backbone.load(f"local-dir:{tmp_path}")


CONTRADICTED = {
    "heads": ({"num_heads": 6}, "heads is 6 there, 3 in it"),
    "activation": ({"act_layer": "gelu_tanh"}, "activation is GELUTanh there, GELU in it"),
    "pooling": ({"global_pool": "avg", "fc_norm": False}, "pooling is avg there, token in it"),
}


@pytest.mark.parametrize("kind", CONTRADICTED)
def test_an_arch_that_contradicts_a_timm_folder(tmp_path, kind):
    change, message = CONTRADICTED[kind]
    args = dict(num_classes=0, depth=12)
    vit = randomized(timm.create_model("vit_tiny_patch16_224", **args))
    name = saved(vit, tmp_path / "base", args)
    state_in(tmp_path / "base", pretrained_cfg={"mean": [0.1, 0.2, 0.3]})
    assert backbone.load(name, arch="vit_tiny_patch16_224").mean == (0.1, 0.2, 0.3)
    state_in(tmp_path / "base", model_args=change)
    with pytest.raises(ConfigError, match=message):
        backbone.load(name, arch="vit_tiny_patch16_224")


def test_a_folder_of_open_clip(tmp_path):
    save_file(dict(timm.create_model("vit_tiny_patch16_224").state_dict()), tmp_path / "open_clip_model.safetensors")
    model = {"vision_cfg": {"image_size": 64, "layers": 12, "width": 192, "patch_size": 16}}
    stated = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": stated}))
    base = backbone.load(f"local-dir:{tmp_path}", arch="vit_tiny_patch16_224")
    assert (base.mean, base.std, base.crop_pct) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 1.0)
    assert (base.interpolation, base.crop_mode, base.img_size) == ("bilinear", "squash", (64, 64))
    model["quick_gelu"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": stated}))
    with pytest.raises(ConfigError, match="activation is QuickGELU there, GELU in it"):
        backbone.load(f"local-dir:{tmp_path}", arch="vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match="is a folder of open_clip; name timm's architecture"):
        backbone.load(f"local-dir:{tmp_path}")


def test_a_file_without_preprocessing_says_what_is_used(tmp_path, caplog):
    path = tmp_path / "w.safetensors"
    save_file(dict(timm.create_model("vit_small_patch16_224", depth=12).state_dict()), path)
    with pytest.raises(ConfigError, match=r"with timm's tag of its training.*\.dino, \.mae.*or give --mean and --std"):
        backbone.load(str(path))
    backbone.load(str(path), arch="vit_small_patch16_224")
    assert (
        "used is that of timm's vit_small_patch16_224: mean 0.5 0.5 0.5, std 0.5 0.5 0.5, crop 0.9; give" in caplog.text
    )
    caplog.clear()
    assert backbone.load(str(path), arch="vit_small_patch16_224.dino").mean == timm.data.constants.IMAGENET_DEFAULT_MEAN
    backbone.load(str(path), arch="vit_small_patch16_224", mean=[0.5], std=[0.5])
    assert "used is that of" not in caplog.text


# broken folders of timm


def scaled(state, factor):
    return {key: value * factor for key, value in state.items()}


BROKEN = {
    "std 0": ({"pretrained_cfg": {"std": [0.0, 0.1, 0.1]}}, "std is .*, every value must be above 0"),
    "std -1": ({"pretrained_cfg": {"std": [-1.0, 0.1, 0.1]}}, "std is .*, every value must be above 0"),
    "NaN": ({"pretrained_cfg": {"mean": [float("nan"), 0.1, 0.1]}}, "is not finite"),
    "mean of 5": ({"pretrained_cfg": {"mean": [0.1] * 5}}, "mean has 5 values, the images have 3 channels"),
    "crop_pct 0": ({"pretrained_cfg": {"crop_pct": 0}}, "crop_pct is 0, must lie in 0.05 to 1"),
    "crop_pct 2": ({"pretrained_cfg": {"crop_pct": 2.0}}, "crop_pct is 2.0, must lie"),
    "interpolation": ({"pretrained_cfg": {"interpolation": "box"}}, "interpolation is 'box', must be"),
    "crop_mode": ({"pretrained_cfg": {"crop_mode": "border"}}, "crop_mode is 'border', must be center or squash"),
    "an unknown entry": ({"pretrained_cfg": {"model_args": {}}}, "has 'model_args', which timm does not know"),
    "no pretrained_cfg": ({"pretrained_cfg": None}, "has model_args but no pretrained_cfg, which timm needs"),
    "an unknown argument": (
        {"model_args": {"depths": 3}},
        "timm cannot build vit_tiny_patch16_224 from its model_args",
    ),
    "10**7 blocks": ({"model_args": {"depth": 10**7}}, "depth in config.json is 10000000, which no model has"),
    "-1 heads": ({"model_args": {"num_heads": -1}}, "num_heads in config.json is -1, which no model has"),
    "heads are true": ({"model_args": {"num_heads": True}}, "num_heads in config.json is True, which no model has"),
    "width 10**6": ({"model_args": {"embed_dim": 999_999}}, "describes .* parameters, its weights have"),
    "size 10**5": ({"model_args": {"img_size": 10**5}}, "describes .* parameters, its weights have"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_configuration_of_timm(tmp_path, kind):
    change, message = BROKEN[kind]
    name = saved(small(), tmp_path / "base", SMALL)
    state_in(tmp_path / "base", **change)
    with pytest.raises(ConfigError, match=message) as error:
        backbone.load(name)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


WEIGHTS = {
    "1e30": (lambda s: scaled(s, 1e30), "has values up to .*e[+]3., which no model has|which no model has"),
    "NaN": (
        lambda s: s | {"norm.weight": torch.full((48,), float("nan"))},
        "values in norm.weight that are not finite",
    ),
    "inf": (lambda s: s | {"cls_token": torch.full((1, 1, 48), float("inf"))}, "that are not finite"),
    "int8": (lambda s: {key: value.to(torch.int8) for key, value in s.items()}, "as I8, not as floating point"),
    "bool": (lambda s: {key: value > 0 for key, value in s.items()}, "as BOOL, not as floating point"),
    "missing": (lambda s: {key: s[key] for key in s if "blocks.1.mlp.fc1" not in key}, "blocks.1.mlp.fc1.weight"),
    "more": (lambda s: s | {"reg_token": torch.ones(1, 4, 48)}, "reg_token"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_broken_weights_of_timm(tmp_path, kind):
    change, message = WEIGHTS[kind]
    name = saved(small(), tmp_path / "base", SMALL)
    path = tmp_path / "base" / "model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(ConfigError, match=message) as error:
        backbone.load(name)
    assert "\n" not in str(error.value)


def test_pipes_and_files_larger_than_memory(tmp_path):
    name = saved(small(), tmp_path / "base", SMALL)
    for file in ("config.json", "model.safetensors"):
        shutil.copytree(tmp_path / "base", folder := tmp_path / file.replace(".", "_"))
        (folder / file).unlink()
        os.mkfifo(folder / file)
        with pytest.raises(ConfigError, match=f"{file} is a named pipe, not a regular file"):
            backbone.load(f"local-dir:{folder}")
    for file in ("model.safetensors", "w.pth"):
        with open(tmp_path / "base" / file, "ab") as sparse:
            sparse.truncate(1 << 40)
        with pytest.raises(ConfigError, match=f"{file} is larger than the free memory"):
            backbone.load(
                name if file.startswith("model") else str(tmp_path / "base" / file), arch="vit_tiny_patch16_224"
            )


def test_an_image_smaller_than_a_patch(tmp_path):
    name = saved(small(), tmp_path / "base", SMALL)
    with pytest.raises(ConfigError, match=r"^img_size: 4 x 4 is smaller than the patch size 8; take a multiple of 8$"):
        backbone.load(name, img_size=4)
