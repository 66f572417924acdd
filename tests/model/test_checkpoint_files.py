"""Checkpoints of every format, each written by the tool it comes from or under its names, bit for bit."""

import argparse
import json

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from vit_models import BASE_TINY, assert_same, images, randomized, small

from upstep_fast.errors import ConfigError
from upstep_fast.model import backbone
from upstep_fast.model.formats import checkpoint_files, key_names
from upstep_fast.model.pooling import features

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
    theirs = randomized(HF_MODELS[kind]())
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    ours = backbone.load(f"local-dir:{tmp_path / 'hf'}")
    assert ours.mean == (0.1, 0.2, 0.3)
    x = images(ours.img_size)  # the processor's crop: Dinov2's is 224 if the file does not say
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
    theirs = randomized(make())
    theirs.save_pretrained(tmp_path / "hf")
    vit = timm.create_model(arch, img_size=56, depth=2, num_classes=0, **args).eval()
    checkpoint_files.fill(vit, checkpoint_files.read(tmp_path / "hf"), where="hf")
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
    match = checkpoint_files.fill(vit, checkpoint_files.read(path), where=str(path))
    assert match.matched == match.total == len(source.state_dict()) and not match.misses
    assert_same(vit, source)


def test_openclips_own_names(tmp_path):
    args = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0)
    source = randomized(timm.create_model("vit_base_patch32_clip_224", **args))
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
    vit = randomized(timm.create_model("vit_base_patch32_clip_224", **args), seed=9)
    assert checkpoint_files.fill(vit, tower, where="openclip").matched == len(s)
    assert_same(vit, source)


def test_openclips_siglip_tower():
    """OpenCLIP keeps SigLIP's visual tower as timm's own model, beside the text's."""
    args = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0)
    source = randomized(timm.create_model("vit_base_patch16_siglip_224", **args))
    both = {f"visual.trunk.{key}": value for key, value in source.state_dict().items()}
    both |= {"text.transformer.resblocks.0.attn.in_proj_weight": torch.ones(6, 2), "logit_scale": torch.ones(())}
    vit = randomized(timm.create_model("vit_base_patch16_siglip_224", **args), seed=9)
    assert checkpoint_files.fill(vit, both, where="openclip").matched == len(source.state_dict())
    assert_same(vit, source)


@pytest.mark.parametrize("arch", ["vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3"])
def test_metas_dinov3_names(arch):
    args = dict(img_size=64, depth=1)
    source = randomized(timm.create_model(arch, **args))
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
    vit = randomized(timm.create_model(arch, **args), seed=9)
    checkpoint_files.fill(vit, theirs, where="dinov3")
    assert_same(vit, source)
    if "qkvb" in arch:
        with pytest.raises(ConfigError, match="_qkvb"):
            checkpoint_files.fill(timm.create_model(arch.replace("_qkvb", ""), **args), theirs, where="dinov3")


def test_a_checkpoint_file_and_its_arch(tmp_path):
    source = randomized(timm.create_model("vit_tiny_patch16_224", num_classes=0))
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    ours = backbone.load(str(tmp_path / "w.safetensors"), arch="vit_tiny_patch16_224")
    x = images((224, 224), 1)
    assert torch.equal(features(ours.vit, x), features(source, x)) and ours.arch == "vit_tiny_patch16_224"
    rebuilt = timm.create_model(ours.arch, **ours.model_args)
    rebuilt.load_state_dict(ours.vit.state_dict())


def test_a_classifier_that_does_not_fit_is_dropped_not_random(tmp_path):
    source = small()
    vit = small(seed=9, num_classes=1000)
    checkpoint_files.fill(vit, dict(source.state_dict()), where="file")
    assert isinstance(vit.head, nn.Identity)
    vit = small(seed=9)
    checkpoint_files.fill(vit, dict(source.state_dict()), where="file")
    assert_same(vit, source)


def test_real_weights_through_a_file_and_back(tmp_path):
    """base_tiny, a real pretrained model, in every key format that can hold it."""
    state = load_file(BASE_TINY / "model.safetensors")
    args = json.loads((BASE_TINY / "config.json").read_text())["model_args"]
    for kind, write in WRITERS.items():
        torch.save(write(dict(state)), tmp_path / "w.pth")
        vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **args)
        checkpoint_files.fill(vit, checkpoint_files.read(tmp_path / "w.pth"), where=kind)
        for key, value in vit.state_dict().items():
            assert torch.equal(value, state[key].float()), (kind, key)
