"""Checkpoints as people have them: nested, wrapped, incomplete, of a neighboring architecture, quantized."""

import argparse

import numpy as np
import pytest
import timm
import torch
from vit_models import assert_same, small

from upstep_fast.errors import ConfigError
from upstep_fast.model.formats import checkpoint_files

QUEUE = torch.randn(2, 4)


def state(**args):
    return dict(small(num_classes=0, **args).state_dict())


def inside(wrapper):
    """FSDP, torch.compile and activation checkpointing of every block put their names into the middle."""
    return lambda s: {key.replace(".attn.", f".{wrapper}.attn."): s[key] for key in s}


def with_separate_qkv(s, change=0.0):
    """The layout of the official ExPLoRA checkpoints: q_proj, k_proj, v_proj beside the combined qkv."""
    both = dict(s)
    for key, value in s.items():
        if ".qkv." in key:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                both[key.replace("qkv", f"{part}_proj")] = rows + change
    return {"teacher": {f"backbone.{key}": value for key, value in both.items()} | {"dino_head.mlp.0.weight": QUEUE}}


NESTED = {
    **{
        name: (lambda s, name=name: {name: s, "epoch": 3})
        for name in ("model_state_dict", "net", "weights", "encoder", "backbone", "ema", "params", "generator")
    },
    "a tensor beside it": lambda s: {"model": s, "epoch": torch.tensor(3), "args": argparse.Namespace(a=1)},
    "a queue beside it": lambda s: {"state_dict": s, "queue": QUEUE, "epoch": 3},
    "the optimizer first": lambda s: {"optimizer": {"state": {0: {"exp_avg": QUEUE}}}, "ema": {"module": s}},
    "numbers of numpy": lambda s: {"model": s, "best_acc": np.float64(3.0), "step": np.int64(4)},
    "activation checkpointing": inside("_checkpoint_wrapped_module"),
    "torch.compile": inside("_orig_mod"),
    "FSDP": inside("_fsdp_wrapped_module"),
    "FSDP of DDP": lambda s: {f"module._fsdp_wrapped_module.{key}": value for key, value in s.items()},
    "ExPLoRA": with_separate_qkv,
}


@pytest.mark.parametrize("kind", NESTED)
def test_nested_and_wrapped_state_dicts(tmp_path, kind):
    source = small(num_classes=0)
    torch.save(NESTED[kind](dict(source.state_dict())), tmp_path / "w.pth")
    vit = small(seed=9, num_classes=0)
    match = checkpoint_files.fill(vit, checkpoint_files.read(tmp_path / "w.pth"), where="file")
    assert not match.misses
    assert_same(vit, source)


def test_the_averaged_teacher_comes_first(tmp_path):
    source = small(num_classes=0)
    good = dict(source.state_dict())
    other = {key: value + 1 for key, value in good.items()}
    for first, second in (("teacher", "student"), ("model_ema", "model"), ("ema", "state_dict"), ("model", "student")):
        torch.save({second: other, "noise": other, first: good}, tmp_path / "w.pth")
        vit = small(seed=9, num_classes=0)
        checkpoint_files.fill(vit, checkpoint_files.read(tmp_path / "w.pth"), where="file")
        assert_same(vit, source)


def without(s, *names):
    return {key: value for key, value in s.items() if key not in names}


def fine_tuned_by_mae(s):
    """A norm after the mean in place of the final norm: two of the names."""
    return without(s, "norm.weight", "norm.bias") | {f"fc_norm.{end}": s[f"norm.{end}"] for end in ("weight", "bias")}


REFUSED = {
    "a block's matrix": (
        lambda s: without(s, "blocks.2.mlp.fc1.weight"),
        r"41 of 42 tensors matched .*: blocks\.2\.mlp\.fc1\.weight is missing; check --arch$",
    ),
    "the norm": (fine_tuned_by_mae, r"norm\.weight is missing; norm\.bias is missing; fc_norm\.weight has no place"),
    "a class token": (lambda s: without(s, "cls_token"), "cls_token is missing"),
    "registers of timm": (
        lambda s: s | {"reg_token": torch.ones(1, 4, 48)},
        "it has 4 register tokens, the model has 0",
    ),
    "registers of Meta": (
        lambda s: s | {"register_tokens": torch.ones(1, 4, 48), "mask_token": torch.zeros(1, 48)},
        "it has 4 register tokens, the model has 0; take the --arch",
    ),
    "LayerScale": (lambda s: s | {"blocks.0.ls1.gamma": torch.ones(48)}, r"blocks\.0\.ls1\.gamma has no place"),
    "qk-norm": (lambda s: s | {"blocks.0.attn.q_norm.weight": torch.ones(16)}, r"q_norm\.weight has no place"),
    "a norm after the mean": (lambda s: s | {"fc_norm.weight": torch.ones(48)}, r"fc_norm\.weight has no place"),
    "distillation": (
        lambda s: s | {"dist_token": torch.ones(1, 1, 48), "pos_embed": torch.ones(1, 18, 48)},
        "pos_embed is .*dist_token has no place|cannot be brought to the model's shapes .*distillation",
    ),
    "a scalar": (lambda s: s | {"pos_embed": torch.tensor(1.0)}, "cannot be brought|pos_embed is"),
    "a matrix of another shape": (
        lambda s: s | {"norm.weight": torch.ones(3)},
        r"norm\.weight is \[3\], the model wants",
    ),
    "integers": (
        lambda s: s | {"blocks.0.mlp.fc1.weight": torch.ones(192, 48, dtype=torch.int8)},
        "as int8, not",
    ),
    "booleans": (lambda s: {key: value > 0 for key, value in s.items()}, "as bool, not as floating point"),
    "LoRA of PEFT": (lambda s: s | {"blocks.0.attn.qkv.lora_A.default.weight": QUEUE}, "after merge_and_unload"),
    "ExPLoRA, not merged": (lambda s: with_separate_qkv(s, 1.0)["teacher"], "holds blocks.0.attn.qkv.weight and other"),
    "twice": (lambda s: s | {f"_orig_mod.{key}": value for key, value in s.items()}, "holds some weights twice"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_incomplete_and_other_models_are_refused_whatever_the_share(kind):
    change, message = REFUSED[kind]
    for min_matched in (0.99, 0.0):
        vit = small(seed=9, num_classes=0)
        before = {key: value.clone() for key, value in vit.state_dict().items()}
        with pytest.raises(ConfigError, match=message) as error:
            checkpoint_files.fill(vit, change(state()), where="file", min_matched=min_matched)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
        assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_with_registers_in_the_model_without(registers):
    args = dict(img_size=56, patch_size=14, embed_dim=48, depth=1, num_heads=3)
    archs = {0: "vit_small_patch14_dinov2", 4: "vit_small_patch14_reg4_dinov2"}
    theirs = dict(timm.create_model(archs[registers], **args).state_dict()) | {"mask_token": torch.zeros(1, 48)}
    if registers:
        theirs["register_tokens"] = theirs.pop("reg_token")
        theirs["pos_embed"] = torch.cat([torch.zeros(1, 1, 48), theirs["pos_embed"]], 1)
    with pytest.raises(ConfigError, match=f"it has {registers} register tokens, the model has {4 - registers}"):
        checkpoint_files.fill(timm.create_model(archs[4 - registers], **args), theirs, where="dinov2.pth")


def test_one_matrix_of_a_deep_model_is_missing():
    """ViT-L: 293 of 294 names, more than 99 %."""
    args = dict(img_size=32, patch_size=16, embed_dim=12, num_heads=3, num_classes=0)
    theirs = dict(timm.create_model("vit_large_patch16_224", **args).state_dict())
    assert len(theirs) > 290
    del theirs["blocks.23.mlp.fc1.weight"]
    with pytest.raises(ConfigError, match=r"blocks\.23\.mlp\.fc1\.weight is missing; check --arch$"):
        checkpoint_files.fill(timm.create_model("vit_large_patch16_224", **args), theirs, where="file")


def test_a_torchscript_archive(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "w.pt"))
    with pytest.raises(ConfigError, match="is a TorchScript archive; save its state_dict"):
        checkpoint_files.read(tmp_path / "w.pt")


def test_code_beside_the_weights_is_not_run(tmp_path):
    torch.save({"model": state(), "path": tmp_path, "f": np.array}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="pickle with more than tensors"):
        checkpoint_files.read(tmp_path / "w.pth")
