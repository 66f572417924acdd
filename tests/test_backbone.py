"""Backbones: every kind of ViT, every format of checkpoint, sizes and channels, and what is refused."""

import argparse
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import upstep_fast
from upstep_fast import backbone, catalogue, key_names, lora, weights
from upstep_fast.backbone import features
from upstep_fast.cli import main
from upstep_fast.errors import ConfigError

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=5)
BASE_TINY = Path(upstep_fast.__file__).parent / "assets" / "base_tiny"

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


def images(size, count=3, channels=3):
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(2))


def randomised(vit, seed=0):
    """Random values everywhere, so that no zero or one hides a tensor that was not loaded."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return vit.eval()


def saved(vit, folder, args):
    timm.models.save_for_hf(vit, folder, model_args=args, safe_serialization=True)
    return f"local-dir:{folder}"


def small(seed=0, **args):
    return randomised(timm.create_model("vit_tiny_patch16_224", **SMALL | args), seed)


def assert_same(vit, other):
    theirs = other.state_dict()
    assert vit.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in vit.state_dict().items())


LONG = {"packed SwiGLU, true width": ("vit_giant_patch14_dinov2", dict(img_size=56, depth=1))}


@pytest.mark.parametrize("kind", [*VARIANTS, *(pytest.param(kind, marks=pytest.mark.long) for kind in LONG)])
def test_every_kind_of_vit_adapts_and_is_served_by_peft(tmp_path, kind):
    arch, args = (VARIANTS | LONG)[kind]
    args = {"depth": 2, "num_classes": 7} | args
    name = saved(randomised(timm.create_model(arch, **args)), tmp_path / "base", args)
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
    lora.save(tmp_path / "adapter", adapters, name)

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
    for target, message in (("qkv", r"blocks\.0\.attn\.qkv is not in this model"), ("fc1", r"blocks\.0\.mlp\.fc1")):
        with pytest.raises(ConfigError, match=message):
            lora.inject(split, lora.LoraSpec(targets=("proj", target)))
        assert not lora.find(split)


# formats, each written by the tool it comes from

HF = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=56, patch_size=14)
HF_MODELS = {
    "ViT": lambda: transformers.ViTModel(transformers.ViTConfig(**HF, intermediate_size=96), add_pooling_layer=False),
    "Dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**HF, mlp_ratio=2)),
    "Dinov2, SwiGLU": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(**HF, mlp_ratio=4, use_swiglu_ffn=True)
    ),
    "Dinov2 with registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**HF, mlp_ratio=2, num_register_tokens=3)
    ),
    "DINOv3": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**HF, intermediate_size=96, num_register_tokens=4)
    ),
    "DINOv3, SwiGLU": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(
            **HF, intermediate_size=100, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"
        )
    ),
}


@pytest.mark.parametrize("kind", HF_MODELS)
def test_a_folder_of_transformers_gives_its_features(tmp_path, kind):
    theirs = randomised(HF_MODELS[kind]())
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    ours = backbone.load(f"local-dir:{tmp_path / 'hf'}")
    assert ours.mean == (0.1, 0.2, 0.3)
    x = images((56, 56))
    with torch.no_grad():
        expected = theirs(x).last_hidden_state[:, 0]
        torch.testing.assert_close(ours.vit.forward_features(x)[:, 0], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("make", "arch", "args"),
    [
        (
            lambda: transformers.ViTMAEForPreTraining(
                transformers.ViTMAEConfig(**HF, intermediate_size=96, decoder_num_hidden_layers=1, layer_norm_eps=1e-6)
            ),
            "vit_tiny_patch16_224",
            dict(patch_size=14, embed_dim=48, num_heads=3, mlp_ratio=2),
        ),
        (
            lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF, intermediate_size=96)),
            "vit_base_patch32_clip_quickgelu_224",
            dict(patch_size=14, embed_dim=48, num_heads=3, mlp_ratio=2),
        ),
        (
            lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**HF, intermediate_size=96)),
            "vit_base_patch16_siglip_224",
            dict(patch_size=14, embed_dim=48, num_heads=3, mlp_ratio=2, act_layer="gelu_tanh"),
        ),
    ],
    ids=["MAE", "CLIP", "SigLIP"],
)
def test_other_towers_of_transformers(tmp_path, make, arch, args):
    theirs = randomised(make())
    theirs.save_pretrained(tmp_path / "hf")
    vit = timm.create_model(arch, img_size=56, depth=2, num_classes=0, **args).eval()
    weights.fill(vit, weights.read(tmp_path / "hf"), where="hf")
    x = images((56, 56))
    with torch.no_grad():
        if isinstance(theirs, transformers.ViTMAEForPreTraining):
            theirs.config.mask_ratio = 0.0  # the patches' order is random then, which the class token does not see
            tokens = theirs.vit(x).last_hidden_state[:, 0]
        else:
            tokens = theirs(x).pooler_output
        torch.testing.assert_close(features(vit, x), tokens, rtol=0, atol=2e-5)


def dino(state):
    """What DINO's training saves: both networks, their heads, the flags."""
    both = {}
    for seed, network in enumerate(("student", "teacher")):
        shift = {f"module.backbone.{key}": value + (network == "student") for key, value in state.items()}
        both[network] = shift | {"module.head.mlp.0.weight": torch.full((2, 2), float(seed))}
    return both | {"epoch": 3, "args": argparse.Namespace(arch="vit_small")}


def dinov2_chunked(state):
    """DINOv2 with blocks in chunks for FSDP: blocks.C.N, the teacher's backbone beside its heads."""
    renamed = {}
    for key, value in key_names.dinov2_names(state, packed=False).items():
        if key.startswith("blocks."):
            number = int(key.split(".")[1])
            key = key.replace(f"blocks.{number}.", f"blocks.{number // 2}.{number}.", 1)
        renamed[f"backbone.{key}"] = value
    return {"teacher": renamed | {"dino_head.last_layer.weight_g": torch.ones(3, 1)}}


def mae(state):
    """MAE's pretraining checkpoint: no classifier, a mask token and a decoder."""
    extra = {"mask_token": torch.ones(1, 1, 8), "decoder_pos_embed": torch.ones(1, 5, 8)}
    return {"model": state | extra | {"decoder_blocks.0.attn.qkv.weight": torch.ones(24, 8)}, "epoch": 1}


WRITERS = {
    "timm": lambda s: s,
    "lightning": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "epoch": 3},
    "DINO": dino,
    "DINOv2": lambda s: key_names.dinov2_names(s, packed=False),
    "DINOv2 chunked": dinov2_chunked,
    "MAE": mae,
    "OpenCLIP with a timm tower": lambda s: {f"visual.trunk.{k}": v for k, v in s.items()},
}


FLAT = ("timm", "DINOv2", "OpenCLIP with a timm tower")  # the others nest, which safetensors cannot


@pytest.mark.parametrize(
    ("kind", "suffix"), [*((kind, ".pth") for kind in WRITERS), *((kind, ".safetensors") for kind in FLAT)]
)
def test_key_formats_load_bit_for_bit(tmp_path, kind, suffix):
    source, path = small(num_classes=0), tmp_path / f"weights{suffix}"
    content = WRITERS[kind](dict(source.state_dict()))
    (torch.save if suffix == ".pth" else save_file)(content, path)
    vit = small(seed=9, num_classes=0)
    match = weights.fill(vit, weights.read(path), where=str(path))
    assert match.matched == match.total == len(source.state_dict()) and not match.misses
    assert_same(vit, source)


def test_openclips_own_names(tmp_path):
    args = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0)
    source = randomised(timm.create_model("vit_base_patch32_clip_224", **args))
    s = source.state_dict()
    names = {"conv1.weight": "patch_embed.proj.weight"}
    for end in ("weight", "bias"):
        names |= {f"ln_pre.{end}": f"norm_pre.{end}", f"ln_post.{end}": f"norm.{end}"}
        for i in range(2):
            stem = f"transformer.resblocks.{i}"
            names |= {
                f"{stem}.ln_1.{end}": f"blocks.{i}.norm1.{end}",
                f"{stem}.ln_2.{end}": f"blocks.{i}.norm2.{end}",
                f"{stem}.attn.in_proj_{end}": f"blocks.{i}.attn.qkv.{end}",
                f"{stem}.attn.out_proj.{end}": f"blocks.{i}.attn.proj.{end}",
                f"{stem}.mlp.c_fc.{end}": f"blocks.{i}.mlp.fc1.{end}",
                f"{stem}.mlp.c_proj.{end}": f"blocks.{i}.mlp.fc2.{end}",
            }
    tower = {f"visual.{theirs}": s[ours] for theirs, ours in names.items()}
    tower |= {"visual.class_embedding": s["cls_token"][0, 0], "visual.positional_embedding": s["pos_embed"][0]}
    tower |= {"visual.proj": torch.ones(48, 16), "transformer.resblocks.0.ln_1.weight": torch.ones(4)}
    vit = randomised(timm.create_model("vit_base_patch32_clip_224", **args), seed=9)
    assert weights.fill(vit, tower, where="openclip").matched == len(s)
    assert_same(vit, source)


@pytest.mark.parametrize("arch", ["vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3"])
def test_metas_dinov3_names(arch):
    args = dict(img_size=64, depth=1)
    source = randomised(timm.create_model(arch, **args))
    theirs = {}
    for key, value in source.state_dict().items():
        for ours, meta in (
            ("reg_token", "storage_tokens"),
            ("gamma_1", "ls1.gamma"),
            ("gamma_2", "ls2.gamma"),
            ("fc1_g", "w1"),
            ("fc1_x", "w2"),
            ("mlp.fc2", "mlp.w3" if "plus" in arch else "mlp.fc2"),
        ):
            key = key.replace(ours, meta)
        if key.endswith("q_bias"):
            v = source.state_dict()["blocks.0.attn.v_bias"]
            key, value = "blocks.0.attn.qkv.bias", torch.cat([value, torch.full_like(value, 7.0), v])  # k is masked
        if not key.endswith("v_bias"):
            theirs[f"teacher.backbone.{key}"] = value
    theirs["teacher.backbone.rope_embed.periods"] = torch.ones(16)
    theirs["teacher.backbone.mask_token"] = torch.ones(1, 384)
    theirs["teacher.backbone.blocks.0.attn.qkv.bias_mask"] = torch.ones(1152)
    vit = randomised(timm.create_model(arch, **args), seed=9)
    weights.fill(vit, theirs, where="dinov3")
    assert_same(vit, source)
    if "qkvb" in arch:
        with pytest.raises(ConfigError, match="_qkvb"):
            weights.fill(timm.create_model(arch.replace("_qkvb", ""), **args), theirs, where="dinov3")


def test_a_checkpoint_file_and_its_arch(tmp_path):
    source = randomised(timm.create_model("vit_tiny_patch16_224", num_classes=0))
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    ours = backbone.load(str(tmp_path / "w.safetensors"), arch="vit_tiny_patch16_224")
    x = images((224, 224), 1)
    assert torch.equal(features(ours.vit, x), features(source, x)) and ours.arch == "vit_tiny_patch16_224"
    rebuilt = timm.create_model(ours.arch, **ours.model_args)
    rebuilt.load_state_dict(ours.vit.state_dict())


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
    weights.fill(vit, weights.read(tmp_path / "base" / "model.safetensors"), where="file")
    assert_same(vit, theirs)


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 13, 16])
def test_in_chans_adapts_as_timm_does(tmp_path, channels):
    name = saved(small(), tmp_path / "base", SMALL)
    theirs = timm.create_model(name, pretrained=True, in_chans=channels)
    ours = backbone.load(name, in_chans=channels)
    assert_same(ours.vit, theirs)
    assert len(ours.mean) == len(ours.std) == channels == ours.model_args["in_chans"]
    vit = small(seed=9, in_chans=channels)
    weights.fill(vit, weights.read(tmp_path / "base" / "model.safetensors"), where="file")
    assert_same(vit, theirs)


def test_mean_and_std(tmp_path):
    assert backbone.load(f"local-dir:{BASE_TINY}").mean == (0.485, 0.456, 0.406)
    ours = backbone.load(f"local-dir:{BASE_TINY}", in_chans=4)
    assert ours.mean == pytest.approx((0.449,) * 4)  # the average of the three, for channels nobody knows
    ours = backbone.load(f"local-dir:{BASE_TINY}", in_chans=2, mean=[0.1, 0.2], std=[0.3])
    assert ours.mean == (0.1, 0.2) and ours.std == (0.3, 0.3)
    with pytest.raises(ConfigError, match="mean: got 3 values, the images have 2 channels"):
        backbone.load(f"local-dir:{BASE_TINY}", in_chans=2, mean=[0.1, 0.2, 0.3])


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


def test_a_model_from_the_hubs_cache_offline(tmp_path):
    """Subprocess: the hub's client reads its environment when imported."""
    snapshot = tmp_path / "hub" / "models--someone--vit" / "snapshots" / "abc"
    source = small()
    saved(source, snapshot, SMALL)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    code = "from upstep_fast import backbone; print(backbone.load('hf-hub:someone/vit').vit.cls_token.sum().item())"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(source.cls_token.sum().item())


# bad input


def refused(capsys, tmp_path, *args):
    """The one line of a refused command, which has written nothing."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--data", str(tmp_path), "--device", "cpu", *map(str, args)])
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and err.startswith("upstep-fast: ") and "\n" not in err
    assert sorted(tmp_path.rglob("*")) == before
    return err


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer, not a plain Vision Transformer; near names"),
        ("convnext_tiny", "ConvNeXt, not a plain"),
        ("vit_base_r50_s16_224", "not a plain"),
        ("vit_base_patch16_xp_224", "in parallel"),
        ("vit_bse_patch16_224", "vit_base_patch16_224"),
    ],
)
def test_other_families_are_refused_by_name(capsys, tmp_path, monkeypatch, arch, message):
    def no_weights(*args, **options):
        raise AssertionError("weights were read")

    monkeypatch.setattr(weights, "read", no_weights)
    monkeypatch.setattr(timm, "create_model", no_weights)
    save_file({"x": torch.ones(1)}, tmp_path / "w.safetensors")
    assert message in refused(capsys, tmp_path, "--model", tmp_path / "w.safetensors", "--arch", arch)
    if arch != "vit_bse_patch16_224":
        assert message in refused(capsys, tmp_path, "--model", arch)


def test_a_pickle_with_code_is_not_run(capsys, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": Bomb()}, tmp_path / "w.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"model": Bomb()}))
    for name in ("w.pth", "old.pth"):
        line = refused(capsys, tmp_path, "--model", tmp_path / name, "--arch", "vit_tiny_patch16_224")
        assert "safetensors.torch.save_file" in line and not (tmp_path / "ran").exists()
    # a folder that timm itself would read
    timm.models.save_for_hf(small(), tmp_path / "base", model_args=SMALL, safe_serialization=True)
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "w.pth").rename(tmp_path / "base" / "pytorch_model.bin")
    assert "run code" in refused(capsys, tmp_path, "--model", f"local-dir:{tmp_path / 'base'}")
    assert not (tmp_path / "ran").exists()


def test_damaged_safetensors(capsys, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(dict(small().state_dict()), path)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    damaged = [whole[:length] for length in (0, 7, 100, header, len(whole) // 2, len(whole) - 1)]
    damaged.append((2**60).to_bytes(8, "little") + whole[8:])
    damaged.append(whole[:8] + whole[8 : 8 + header].replace(b"[0,", b"[4,", 1) + whole[8 + header :])
    for content in damaged:
        path.write_bytes(content)
        line = refused(capsys, tmp_path, "--model", path, "--arch", "vit_tiny_patch16_224")
        assert "cannot be read" in line and str(path) in line
    path.rename(tmp_path / "w.pth")
    assert "w.pth" in refused(capsys, tmp_path, "--model", tmp_path / "w.pth", "--arch", "vit_tiny_patch16_224")


def test_a_checkpoint_that_does_not_fit_changes_nothing():
    source = dict(small().state_dict())
    cases = [
        ({"fc.weight": torch.ones(5, 48), "fc.bias": torch.ones(5)}, "holds no Vision Transformer, only fc.bias"),
        ({"head.weight": torch.ones(5, 48), "head.bias": torch.ones(5)}, "holds no Vision Transformer"),
        (small(depth=2).state_dict(), r"30 of 42 tensors matched .*blocks\.2\.norm1\.weight is missing.* and 7 more"),
        (small(depth=4).state_dict(), r"blocks\.3\.norm1\.weight has no place in the model"),
        (small(embed_dim=96).state_dict(), r"cls_token is \[1, 1, 96\], the model wants \[1, 1, 48\]"),
        (small(patch_size=4).state_dict() | {"pos_embed": torch.ones(1, 3, 7)}, None),
    ]
    for state, message in cases:
        vit = small(seed=9)
        before = {key: value.clone() for key, value in vit.state_dict().items()}
        with pytest.raises(ConfigError if message else Exception, match=message) as error:
            weights.fill(vit, dict(state), where="file")
        assert isinstance(error.value, ConfigError) and "\n" not in str(error.value)
        assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())
    partly = {key: value for key, value in source.items() if not key.startswith("blocks.2.")}
    vit = small(seed=9)
    match = weights.fill(vit, partly, where="file", min_matched=0.6)
    assert (match.matched, match.total) == (30, 42) and torch.equal(vit.norm.weight, source["norm.weight"])


def test_files_that_are_no_checkpoint(capsys, tmp_path):
    assert "--arch" in refused(capsys, tmp_path, "--model", tmp_path / "w.safetensors")
    assert "no file" in refused(
        capsys, tmp_path, "--model", tmp_path / "w.safetensors", "--arch", "vit_tiny_patch16_224"
    )
    torch.save([1, 2], tmp_path / "w.pth")
    assert "no state dict" in refused(capsys, tmp_path, "--model", tmp_path / "w.pth", "--arch", "vit_tiny_patch16_224")
    (tmp_path / "swin").mkdir()
    (tmp_path / "swin" / "config.json").write_text(json.dumps({"model_type": "swin", "hidden_size": 4}))
    assert "swin" in refused(capsys, tmp_path, "--model", f"local-dir:{tmp_path / 'swin'}")


def test_a_classifier_that_does_not_fit_is_dropped_not_random(tmp_path):
    source = small()
    vit = small(seed=9, num_classes=1000)
    weights.fill(vit, dict(source.state_dict()), where="file")
    assert isinstance(vit.head, nn.Identity)
    vit = small(seed=9)
    weights.fill(vit, dict(source.state_dict()), where="file")
    assert_same(vit, source)


def test_adapt_and_embed_with_a_file_one_channel_and_another_size(capsys, tmp_path):
    source = randomised(timm.create_model("vit_tiny_patch16_224", num_classes=0))
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
    assert stop.value.code == 0 and " ".join(model) in out
    following = out.split("next: upstep-fast ")[1].split()
    with pytest.raises(SystemExit) as stop:
        main(following)
    assert stop.value.code == 0 and np.load(tmp_path / "out" / "features.npy").shape == (4, 192)


# the list of models


def test_the_list_finds_names_by_part_and_by_glob():
    found = dict(catalogue.names("dinov2"))
    assert "vit_base_patch14_dinov2" in found and not any("xp" in name for name in found)
    assert dict(catalogue.names("vit_*_dinov3"))["vit_base_patch16_dinov3"] == "rotary"
    assert catalogue.names("swin") == [] and "convnext_tiny" not in dict(catalogue.names())


@pytest.mark.parametrize("arch", ["vit_base_patch14_dinov2", "vit_base_patch16_sapiens2"])
def test_a_blueprint_is_the_architecture_without_weights(arch):
    vit = catalogue.blueprint(arch)
    assert all(p.device.type == "meta" and not p.requires_grad for p in vit.parameters())
    assert backbone.why_unsupported(vit) is None


@pytest.mark.long
def test_every_listed_name_is_supported_and_no_other_is():
    listed = dict(catalogue.names())
    for name in timm.list_models(
        ["*vit*", "*deit*", "eva*", "*beit*", "aimv2*", "*siglip*", "*rope*"], exclude_filters="test_*"
    ):
        try:
            model = catalogue.blueprint(name)
        except Exception:
            assert name not in listed  # other families, which have no depth
            continue
        assert (backbone.why_unsupported(model) is None) == (name in listed), name


def test_real_weights_through_a_file_and_back(tmp_path):
    """base_tiny, a real pretrained model, in every key format that can hold it."""
    state = load_file(BASE_TINY / "model.safetensors")
    args = json.loads((BASE_TINY / "config.json").read_text())["model_args"]
    for kind, write in WRITERS.items():
        torch.save(write(dict(state)), tmp_path / "w.pth")
        vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **args)
        weights.fill(vit, weights.read(tmp_path / "w.pth"), where=kind)
        for key, value in vit.state_dict().items():
            assert torch.equal(value, state[key].float()), (kind, key)
