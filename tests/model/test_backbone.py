"""Backbones: every kind of ViT, sizes and channels, where they come from, and the list of them."""

import copy

import numpy as np
import peft
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from vit_models import BASE_TINY, SMALL, assert_same, images, randomized, saved, small

import upstep_fast
from upstep_fast.cli.commands import main
from upstep_fast.errors import ConfigError
from upstep_fast.model import backbone, lora, peft_format, registry
from upstep_fast.model.formats import checkpoint_files
from upstep_fast.model.pooling import features

# true widths, heads and patches of timm's own constructors; fewer blocks and smaller images than the real ones
VARIANTS = {
    "plain": ("vit_small_patch16_224", dict(img_size=64)),
    "registers": ("vit_small_patch14_reg4_dinov2", dict(img_size=56)),
    "LayerScale": ("deit3_small_patch16_224", dict(img_size=64)),
    "mean, no class token": ("vit_medium_patch16_gap_240", dict(img_size=64)),
    "attention pooling": ("vit_base_patch16_siglip_224", dict(img_size=64, depth=1)),
    "packed SwiGLU": ("vit_giant_patch14_dinov2", dict(img_size=56, embed_dim=384, num_heads=6)),
    "SwiGLU, RMSNorm": ("aimv2_large_patch14_224", dict(img_size=56, depth=1)),
    "qk-norm": ("vit_small_patch16_224", dict(img_size=64, qk_norm=True)),
    "QuickGELU": ("vit_base_patch32_clip_quickgelu_224", dict(img_size=64, depth=1)),
    "distilled": ("deit_tiny_distilled_patch16_224", dict(img_size=64)),
    "rotary, biases of q and v": ("eva02_tiny_patch14_224", dict(img_size=56)),
    "rotary, split qkv": ("eva02_base_patch14_224", dict(img_size=56, depth=1)),
    "DINOv3": ("vit_small_patch16_dinov3", dict(img_size=64)),
    "DINOv3, SwiGLU and biases": ("vit_small_plus_patch16_dinov3_qkvb", dict(img_size=64)),
    "mixed rotary": ("vit_small_patch16_rope_mixed_224", dict(img_size=64)),
    "not square": ("vit_tiny_patch16_224", dict(img_size=(64, 96))),
    "odd grid": ("vit_tiny_patch16_224", dict(img_size=80)),
    "dynamic size": ("vit_tiny_patch16_224", dict(img_size=64, dynamic_img_size=True)),
}


SMALLER = ("qk-norm", "packed SwiGLU", "SwiGLU, RMSNorm", "not square", "odd grid", "dynamic size")
LONG = {f"{kind}, true shape": (VARIANTS[kind][0], {"depth": None}) for kind in VARIANTS if kind not in SMALLER}
LONG |= {  # DINOv2's giant and AIMv2 with fewer blocks
    "qk-norm, true shape": ("vit_medium_patch16_reg4_gap_256", {"depth": None, "qk_norm": True}),
    "packed SwiGLU, true width": ("vit_giant_patch14_dinov2", {"depth": 1}),
    "SwiGLU, RMSNorm, true width": ("aimv2_large_patch14_224", {"depth": 2}),
}


@pytest.mark.parametrize("kind", [*VARIANTS, *(pytest.param(kind, marks=pytest.mark.long) for kind in LONG)])
def test_every_kind_of_vit_adapts_and_is_served_by_peft(tmp_path, kind):
    arch, args = (VARIANTS | LONG)[kind]
    args = {key: value for key, value in ({"depth": 2, "num_classes": 7} | args).items() if value is not None}
    name = saved(randomized(timm.create_model(arch, **args)), tmp_path / "base", args)
    base = backbone.load(name)
    x = images(base.img_size)
    torch.testing.assert_close(
        features(base.vit, x), features(timm.create_model(name, pretrained=True).eval(), x), rtol=0, atol=0
    )
    adapters = lora.inject(base.vit, lora.LoraSpec(r=2, targets=("q", "v", "proj")))
    torch.manual_seed(1)
    for adapter in adapters.values():
        nn.init.normal_(adapter.lora_b, std=0.02)
        adapter.requires_grad_(True)
        adapter.base.requires_grad_(False)
    optimizer = torch.optim.SGD([p for a in adapters.values() for p in (a.lora_a, a.lora_b)], lr=1e-3)
    features(base.vit, x).square().mean().backward()
    for adapter in adapters.values():
        assert adapter.lora_a.grad.flatten(1).any(1).all() and adapter.lora_b.grad.flatten(1).any(1).all()
    optimizer.step()
    peft_format.save_adapter(tmp_path / "adapter", adapters, name)

    with torch.no_grad():
        expected = features(base.vit, x)
        theirs = timm.create_model(name, pretrained=True).eval()
        assert (features(theirs, x) - expected).abs().max() > 1e-3
        for module in theirs.modules():  # timm's Eva with q_bias passes by PEFT's layers otherwise: docs/models.md
            if getattr(module, "q_bias", None) is not None:
                module.qkv_bias_separate = True
        served = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
        scale = max(1.0, expected.abs().max().item())
        for other in (served.base_model.model, upstep_fast.load_adapted(name, tmp_path / "adapter")):
            torch.testing.assert_close(features(other, x), expected, rtol=0, atol=1e-5 * scale)


def test_targets_that_a_model_lacks_are_named(tmp_path):
    split = timm.create_model("eva02_base_patch14_224", img_size=56, depth=1)
    with pytest.raises(ConfigError, match=r"blocks\.0\.attn\.qkv is not in this model"):
        lora.inject(split, lora.LoraSpec(targets=("proj", "qkv")))
    assert not lora.find(split)


# sizes and channels: what timm does is the oracle


@pytest.mark.parametrize("size", [48, (48, 80), (24, 32)])
def test_img_size_interpolates_as_timm_does(tmp_path, size):
    source = small()
    name = saved(source, tmp_path / "base", SMALL)
    theirs = timm.create_model(name, pretrained=True, img_size=size).eval()
    ours = backbone.load(name, img_size=size)
    assert_same(ours.vit, theirs)
    x = images(ours.img_size)
    assert ours.img_size == (size if isinstance(size, tuple) else (size, size))
    assert torch.equal(features(ours.vit, x), features(theirs, x))
    # the same through a checkpoint file
    vit = small(seed=9, img_size=size)
    checkpoint_files.fill(vit, checkpoint_files.read(tmp_path / "base" / "model.safetensors"), where="file")
    assert_same(vit, theirs)


@pytest.mark.parametrize("channels", range(1, 17))
def test_in_chans_adapts_as_timm_does(tmp_path, channels):
    name = saved(small(), tmp_path / "base", SMALL)
    theirs = timm.create_model(name, pretrained=True, in_chans=channels)
    ours = backbone.load(name, in_chans=channels)
    assert_same(ours.vit, theirs)
    assert len(ours.mean) == len(ours.std) == channels == ours.model_args["in_chans"]
    vit = small(seed=9, in_chans=channels)
    checkpoint_files.fill(vit, checkpoint_files.read(tmp_path / "base" / "model.safetensors"), where="file")
    assert_same(vit, theirs)


def test_mean_and_std(tmp_path):
    assert backbone.load(f"local-dir:{BASE_TINY}").mean == (0.485, 0.456, 0.406)
    ours = backbone.load(f"local-dir:{BASE_TINY}", in_chans=4)
    assert ours.mean == pytest.approx((0.449,) * 4)  # the average of the three, for channels nobody knows
    ours = backbone.load(f"local-dir:{BASE_TINY}", in_chans=2, mean=[0.1, 0.2], std=[0.3])
    assert ours.mean == (0.1, 0.2) and ours.std == (0.3, 0.3)
    with pytest.raises(ConfigError, match="mean: got 3 values, the images have 2 channels"):
        backbone.load(f"local-dir:{BASE_TINY}", in_chans=2, mean=[0.1, 0.2, 0.3])
    with pytest.raises(ConfigError, match=r"mean: got 123\.675 116\.28 103\.53, must be for pixels of 0\.\.1; divide"):
        backbone.load(f"local-dir:{BASE_TINY}", mean=[123.675, 116.28, 103.53])


def test_sizes_that_the_patch_does_not_divide(tmp_path, caplog):
    name = saved(small(), tmp_path / "base", SMALL)
    ours = backbone.load(name, img_size=35)
    assert "last 3 rows" in caplog.text
    x = images((35, 35))
    x[..., 32:, :] = x[..., 32:] = 9.0  # the border is not seen
    y = x.clone()
    y[..., 32:, :] = y[..., 32:] = -9.0
    assert torch.equal(features(ours.vit, x), features(ours.vit, y))
    dynamic = saved(small(dynamic_img_size=True), tmp_path / "dynamic", SMALL | {"dynamic_img_size": True})
    with pytest.raises(ConfigError, match="take 32 x 32"):
        backbone.load(dynamic, img_size=35)


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_a_dynamic_size_takes_every_multiple_of_the_patch(tmp_path, arch):
    args = dict(img_size=64, depth=1, num_classes=0, dynamic_img_size=True)
    name = saved(randomized(timm.create_model(arch, **args)), tmp_path / "base", args)
    ours, theirs = backbone.load(name).vit, timm.create_model(name, pretrained=True).eval()
    for size in ((64, 64), (48, 80), (112, 16)):
        x = images(size)
        assert torch.equal(features(ours, x), features(theirs, x))


def test_a_fingerprint_is_of_names_shapes_types_and_every_value():
    vit = small()
    first = backbone.fingerprint(vit)
    assert backbone.fingerprint(copy.deepcopy(vit)) == first
    for key, value in vit.state_dict().items():
        last = value.view(-1)[-1:].view(torch.int32)
        last ^= 1  # one bit of the last value
        assert backbone.fingerprint(vit) != first, key
        last ^= 1
    assert backbone.fingerprint(vit) == first
    with torch.no_grad():
        vit.blocks[0].mlp.fc1.weight.data = vit.blocks[0].mlp.fc1.weight.t().contiguous().t()  # strides do not count
    assert backbone.fingerprint(vit) == first
    assert backbone.fingerprint(vit.bfloat16()) != first


def test_adapt_and_embed_with_a_file_one_channel_and_another_size(capsys, tmp_path):
    source = randomized(timm.create_model("vit_tiny_patch16_224", num_classes=0))
    torch.save(
        {"teacher": {f"backbone.{key}": value for key, value in source.state_dict().items()}}, tmp_path / "w.pth"
    )
    (tmp_path / "photos").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    model = ["--model", str(tmp_path / "w.pth"), "--arch", "vit_tiny_patch16_224", "--img-size", "32", "48"]
    model += ["--in-chans", "1", "--mean", "0.5", "--std", "0.25"]
    common = ["--data", str(tmp_path / "photos"), "--device", "cpu", "--num-workers", "0"]
    with pytest.raises(SystemExit) as stop:
        main(["adapt", *model, *common, "--out", str(tmp_path / "out"), "--steps", "1", "--batch-size", "4"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and f"next: upstep-fast embed {tmp_path / 'out'} " in out  # the run knows its model
    assert f"next: upstep-fast explore {tmp_path / 'out'}\n" in out
    assert f"next: upstep-fast search {tmp_path / 'out'} IMAGE\n" in out
    following = next(line for line in out.splitlines() if "next: upstep-fast embed" in line).split()[2:]
    with pytest.raises(SystemExit) as stop:
        main(following)
    assert stop.value.code == 0 and np.load(tmp_path / "out" / "features.npy").shape == (4, 192)


# the list of models


def test_the_list_finds_names_by_part_and_by_glob():
    found = dict(registry.names("dinov2"))
    assert "vit_base_patch14_dinov2" in found and not any("xp" in name for name in found)
    assert dict(registry.names("vit_*_dinov3"))["vit_base_patch16_dinov3"] == "rotary"
    assert registry.names("swin") == [] and "convnext_tiny" not in dict(registry.names())


@pytest.mark.parametrize("arch", ["vit_base_patch14_dinov2", "vit_base_patch16_sapiens2"])
def test_a_blueprint_is_the_architecture_without_weights(arch):
    vit = registry.blueprint(arch)
    assert all(p.device.type == "meta" and not p.requires_grad for p in vit.parameters())
    assert backbone.unsupported_reason(vit) is None


@pytest.mark.long
def test_every_listed_name_is_supported_and_no_other_is():
    listed = dict(registry.names())
    for name in timm.list_models(
        ["*vit*", "*deit*", "eva*", "*beit*", "aimv2*", "*siglip*", "*rope*"], exclude_filters="test_*"
    ):
        try:
            model = registry.blueprint(name)
        except Exception:
            assert name not in listed  # other families, which have no depth
            continue
        assert (backbone.unsupported_reason(model) is None) == (name in listed), name


def test_a_copy_has_weights_of_its_own():
    base = backbone.load("vit_tiny_patch16_224", pretrained=False, img_size=32)
    before = {key: value.clone() for key, value in base.vit.state_dict().items()}
    copied = base.copy()
    lora.inject(copied.vit, lora.LoraSpec())
    for p in copied.vit.parameters():
        p.data.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in base.vit.state_dict().items())
    again = base.copy()
    assert (again.name, again.mean, again.model_args) == (base.name, base.mean, base.model_args)
    assert not again.vit.training and not any(p.requires_grad for p in again.vit.parameters())
    assert backbone.fingerprint(again.vit) == backbone.fingerprint(base.vit)
