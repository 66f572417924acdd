"""Adapters: the mapping to PEFT both ways, merging, and what is refused."""

import json
import shutil

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import upstep_fast
from upstep_fast.errors import ConfigError
from upstep_fast.model import lora, peft_format
from upstep_fast.model.backbone import load
from upstep_fast.model.pooling import features

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5)
TARGETS = [
    ("q", "k", "v"),
    ("q", "v"),
    ("k",),
    ("qkv",),
    ("q", "v", "proj"),
    ("qkv", "fc1", "fc2"),
    ("proj",),
]


@pytest.fixture
def folder(tmp_path):
    """A tiny pretrained ViT with random weights, as a local-dir."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **SMALL)
    timm.models.save_for_hf(vit, tmp_path / "base", model_args=SMALL, safe_serialization=True)
    return f"local-dir:{tmp_path / 'base'}"


def adapted(folder, targets, r=3, alpha=5.0):
    vit = timm.create_model(folder, pretrained=True).eval()
    adapters = lora.inject(vit, lora.LoraSpec(r=r, alpha=alpha, targets=targets))
    torch.manual_seed(1)
    for adapter in adapters.values():
        nn.init.normal_(adapter.lora_b, std=0.1)
    return vit, adapters


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("targets", TARGETS)
@torch.no_grad()
def test_peft_serves_our_adapter(folder, tmp_path, targets):
    vit, adapters = adapted(folder, targets)
    peft_format.save_adapter(tmp_path / "adapter", adapters, folder)
    expected = features(vit, IMAGES)
    base = timm.create_model(folder, pretrained=True).eval()
    assert (features(base, IMAGES) - expected).abs().max() > 1e-2

    served = peft.PeftModel.from_pretrained(timm.create_model(folder, pretrained=True), tmp_path / "adapter").eval()
    by_peft = features(served.base_model.model, IMAGES)
    loaded = upstep_fast.load_adapted(folder, tmp_path / "adapter")
    apart = upstep_fast.load_adapted(folder, tmp_path / "adapter", merged=False)
    for other in (by_peft, features(loaded, IMAGES), features(apart, IMAGES)):
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-5)
    # merged: an ordinary timm model with an ordinary state dict
    assert type(loaded) is type(base) and loaded.state_dict().keys() == base.state_dict().keys()
    merged_by_peft = served.merge_and_unload()
    torch.testing.assert_close(features(merged_by_peft, IMAGES), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank_stabilised", [False, True])
@torch.no_grad()
def test_we_serve_an_adapter_that_peft_made(folder, tmp_path, rank_stabilised):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["qkv", "proj"],
        rank_pattern={"attn.proj": 2},
        alpha_pattern={"attn.proj": 7},
        use_rslora=rank_stabilised,
        init_lora_weights=False,
        exclude_modules=["patch_embed.proj"],
    )
    theirs = peft.get_peft_model(timm.create_model(folder, pretrained=True), config).eval()
    theirs.save_pretrained(tmp_path / "peft")
    ours = upstep_fast.load_adapted(folder, tmp_path / "peft")
    expected = features(theirs.base_model.model, IMAGES)
    torch.testing.assert_close(features(ours, IMAGES), expected, rtol=0, atol=1e-5)


def test_adapters_start_as_the_base_model_bit_for_bit(folder):
    vit = timm.create_model(folder, pretrained=True).eval()
    before = features(vit, IMAGES)
    lora.inject(vit, lora.LoraSpec(targets=("q", "k", "v", "proj", "fc1", "fc2")))
    assert torch.equal(features(vit, IMAGES), before)


def test_only_the_named_parts_change(folder):
    _, adapters = adapted(folder, ("q", "v"))
    delta = adapters["blocks.0.attn.qkv"].delta()
    q, k, v = delta.chunk(3)
    assert q.abs().max() > 0 and v.abs().max() > 0 and k.abs().max() == 0
    assert torch.linalg.matrix_rank(q) == 3


def test_alpha_over_rank_survives_the_mapping(folder, tmp_path):
    _, adapters = adapted(folder, ("q", "k", "v"), r=8, alpha=4)
    peft_format.save_adapter(tmp_path / "a", adapters, folder)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (24, 12, False)
    assert config["base_model_name_or_path"] == folder


def test_gradients_reach_every_part(folder):
    vit, adapters = adapted(folder, ("q", "k", "v"))
    vit.requires_grad_(False)
    for adapter in adapters.values():
        adapter.requires_grad_(True)
        adapter.base.requires_grad_(False)
    features(vit, IMAGES).square().sum().backward()
    for adapter in adapters.values():
        assert adapter.lora_a.grad.flatten(1).any(1).all() and adapter.lora_b.grad.flatten(1).any(1).all()


def test_strength_scales_the_merged_update(folder, tmp_path):
    vit, adapters = adapted(folder, ("q", "k", "v"))
    name = "blocks.0.attn.qkv"
    before, delta = adapters[name].base.weight.detach().clone(), adapters[name].delta().detach()
    lora.merge(vit, strength=0.5)
    torch.testing.assert_close(vit.get_submodule(name).weight, before + 0.5 * delta)


def test_strength_goes_from_the_first_block_to_the_last_in_a_line(folder, tmp_path):
    strength = peft_format.strength_by_depth(0.0, 1.0, 5)
    assert [strength(f"blocks.{i}.attn.qkv") for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert peft_format.strength_by_depth(0.5, 0.5, 1)("blocks.0.mlp.fc1") == 0.5
    _, adapters = adapted(folder, ("q", "v", "fc1"))
    peft_format.save_adapter(tmp_path / "a", adapters, folder)
    depth = len(load(folder).vit.blocks)
    of = peft_format.strength_by_depth(0.25, 1.0, depth)
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    peft_format.write_files(tmp_path / "a", peft_format.scaled(files, of))
    found = peft_format.attach(load(folder).vit, tmp_path / "a")
    assert depth > 1 and len({of(name) for name in found}) == depth
    for name, adapter in found.items():
        torch.testing.assert_close(adapter.delta(), of(name) * adapters[name].delta())
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(load(folder).vit, str(tmp_path / "a")).merge_and_unload()
    for name, adapter in found.items():
        expected = adapter.base.weight + adapter.delta()
        torch.testing.assert_close(theirs.get_submodule(name).weight, expected)


@pytest.fixture
def saved(folder, tmp_path):
    _, adapters = adapted(folder, ("q", "k", "v"))
    peft_format.save_adapter(tmp_path / "adapter", adapters, folder)
    return tmp_path / "adapter"


def test_an_adapter_for_another_model_names_what_differs(saved, tmp_path):
    other = dict(SMALL, embed_dim=96, depth=1)
    vit = timm.create_model("vit_tiny_patch16_224", **other)
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    with pytest.raises(
        ConfigError, match=r"blocks\.0\.attn\.qkv\.lora_A is \[9, 48\], the model wants \[9, 96\].*blocks\.1"
    ):
        peft_format.attach(vit, saved)
    assert not lora.find(vit) and all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "holds no adapter_config.json"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "is not valid JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "not a LoRA configuration"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle"), "cannot be read"),
    ],
)
def test_broken_adapters_are_refused_in_one_line(folder, saved, damage, message):
    damage(saved)
    with pytest.raises(ConfigError, match=message) as error:
        upstep_fast.load_adapted(folder, saved)
    assert "\n" not in str(error.value) and str(saved) in str(error.value)


def test_every_truncation_is_refused(folder, saved):
    path = saved / "adapter_model.safetensors"
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 20)):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError):
            upstep_fast.load_adapted(folder, saved)


def test_half_a_pair_is_refused(folder, saved):
    tensors = load_file(saved / "adapter_model.safetensors")
    tensors.pop("base_model.model.blocks.0.attn.qkv.lora_B.weight")
    save_file(tensors, saved / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"lacks lora_B of blocks\.0\.attn\.qkv"):
        upstep_fast.load_adapted(folder, saved)
