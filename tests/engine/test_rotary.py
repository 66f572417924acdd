"""Rotary positions in the engine: against complex numbers, and timm's models at any size, in training, in parts."""

import json

import peft
import pytest
import timm
import torch
import transformers
from engine_models import ROTARY, gradients, model, relative, same_as_timm

import upstep_fast
from upstep_fast.engine import fold
from upstep_fast.engine import vit as engine
from upstep_fast.engine.rotary import Rotary, apply_rope
from upstep_fast.model import backbone
from upstep_fast.model.pooling import features

HEADS, WIDTH = 3, 16


@pytest.mark.parametrize("half", [False, True])
def test_a_pair_is_turned_as_a_complex_number_is(half):
    generator = torch.Generator().manual_seed(0)
    sizes, prefix = [(2, 7), (3, 5)], 2
    y = torch.randn(2 * 7 + 3 * 5, 3 * HEADS * WIDTH, dtype=torch.float64, generator=generator)
    angles = [torch.rand(n - prefix, WIDTH // 2, dtype=torch.float64, generator=generator) * 6 for _, n in sizes]
    twice = (lambda x: torch.cat([x, x], -1)) if half else (lambda x: x.repeat_interleave(2, -1))
    tables = [torch.cat([twice(a.sin()), twice(a.cos())], -1) for a in angles]
    rotary = Rotary(prefix, half)
    z = apply_rope(y.clone(), HEADS, rotary, tables, sizes)

    def pairs(rows):
        x = rows.view(-1, 3, HEADS, WIDTH)
        x = x.unflatten(-1, (2, -1)).transpose(-1, -2) if half else x.unflatten(-1, (-1, 2))
        return torch.view_as_complex(x.contiguous())

    start = 0
    for (count, n), a in zip(sizes, angles, strict=True):
        before, after = (pairs(rows[start : start + count * n]).view(count, n, 3, HEADS, -1) for rows in (y, z))
        turns = torch.polar(torch.ones_like(a), a)[:, None, None]
        assert torch.allclose(after[:, prefix:, :2], before[:, prefix:, :2] * turns, atol=1e-12)
        assert torch.equal(after[:, :prefix], before[:, :prefix]) and torch.equal(after[:, :, 2], before[:, :, 2])
        start += count * n
    assert torch.allclose(apply_rope(z.clone(), HEADS, rotary, tables, sizes, inverse=True), y, atol=1e-12)


@pytest.mark.parametrize("memory", ["fast", "balanced", "lean"])
@pytest.mark.parametrize("variant", ROTARY)
def test_trained_norms_and_blocks_beside_the_folded_ones(variant, memory):
    vit, images = model(variant, ("q", "v"), depth=3)
    vit.blocks[1].requires_grad_(True)
    for block in vit.blocks:
        block.norm1.requires_grad_(isinstance(block.norm1, torch.nn.LayerNorm))
    same_as_timm(vit, images, memory)
    assert set(fold.unsupported_blocks(vit)) == {1}


@pytest.mark.parametrize("variant", ["DINOv3", "DINOv3, SwiGLU, biases"])
def test_images_of_any_size(variant):
    vit, _ = model(variant, ("q", "v", "proj", "fc1", "fc2"))
    run = engine.build(vit, torch.float32)
    for side in ((16, 16), (48, 32), (80, 112), (48, 32)):
        images = torch.randn(2, 3, *side)
        expected, expected_grads = gradients(vit, lambda x: features(vit, x), images)
        got, grads = gradients(vit, run.features, images)
        assert relative(got, expected) < 1e-5 and relative(run.forward_only(images), expected) < 1e-5
        for ours, theirs in zip(grads, expected_grads, strict=True):
            assert relative(ours, theirs) < 1e-4


def test_a_table_is_made_once_a_size(monkeypatch):
    vit, images = model("DINOv3")
    made = []
    real = vit.rope._create_embed
    monkeypatch.setattr(vit.rope, "_create_embed", lambda *args, **more: made.append(args) or real(*args, **more))
    run = engine.build(vit, torch.float32)
    for side in (48, 48, 32, 48, 32):
        run.features(images[..., :side, :side])
        run.forward_only(images[..., :side, :side])
    assert len(made) == 2


def test_positions_that_training_draws_anew_are_drawn_as_timm_does():
    vit, images = model("rotary, qk-norm")
    vit.train()
    run = engine.build(vit, torch.float32).features
    first, second = run(images).detach(), run(images).detach()
    assert relative(first, second) > 1e-4
    same_as_timm(vit, images)
    assert relative(run(images), first) > 1e-4
    vit.eval()  # as in evaluation between two epochs
    assert relative(run(images), features(vit, images)) < 1e-5


@pytest.mark.parametrize("memory", ["fast", "balanced", "lean"])
def test_several_sizes_in_one_pass(memory):
    vit, _ = model("DINOv3", ("q", "v", "fc2"))
    run = engine.build(vit, torch.float32, memory)
    crops = [torch.randn(count, 3, *side) for count, side in ((3, (48, 48)), (1, (16, 32)), (4, (32, 64)))]
    weights = [p for p in vit.parameters() if p.requires_grad]

    def gradients_of(outputs):
        return torch.autograd.grad(sum(f.sin().sum() + f.square().sum() for f in outputs), weights)

    def together():
        tables = [run.ropes(x)[0] for x in crops]
        return [engine.head(vit, tokens) for tokens in run.through_blocks([run.embed(x) for x in crops], tables)]

    expected = [features(vit, x) for x in crops]
    for ours, theirs in zip(together(), expected, strict=True):
        assert relative(ours, theirs) < 1e-5
    for ours, theirs in zip(gradients_of(together()), gradients_of(expected), strict=True):
        assert relative(ours, theirs) < 1e-4
    with pytest.raises(ValueError, match="rotary positions, and no tables were given"):
        run.through_blocks([run.embed(x) for x in crops])


def test_what_the_engine_leaves_to_timm_is_named():
    vit, images = model("rotary, qk-norm", depth=3)
    middle = timm.create_model(
        "vit_base_patch16_sapiens2", img_size=48, embed_dim=96, num_heads=3, num_kv_heads=1, depth=1, num_classes=0
    )
    vit.blocks[1] = middle.blocks[0].requires_grad_(False)
    assert fold.unsupported_blocks(vit) == {1: "shares k and v among heads"}
    same_as_timm(vit, images)
    vit, images = model("DINOv3, SwiGLU, biases")
    vit.blocks[0].attn.v_bias.requires_grad_(True)
    assert fold.unsupported_blocks(vit) == {0: "trains the bias of q or v"}
    same_as_timm(vit, images)
    assert [isinstance(block, fold.FoldedBlock) for block in fold.fold(vit, torch.float32)] == [False, True]


@pytest.mark.parametrize("arch", ["vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3_qkvb"])
def test_adapt_runs_a_dinov3_on_the_engine_and_peft_serves_its_adapter(arch, photos, tmp_path, caplog):
    args = dict(img_size=48, embed_dim=48, depth=2, num_heads=3, num_classes=0, init_values=1.0)
    timm.models.save_for_hf(timm.create_model(arch, **args), tmp_path / "base", model_args=args)
    options = dict(model=f"local-dir:{tmp_path / 'base'}", data=(str(photos),), device="cpu", precision="fp32")
    options |= dict(
        steps=6, batch_size=8, prototypes=8, head_hidden=32, head_dim=16, gate="none", num_workers=0, lr=0.02
    )
    losses = {}
    for implementation in ("reference", "auto"):
        out = tmp_path / implementation
        upstep_fast.adapt(**options, out=str(out), implementation=implementation)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[implementation] = [row["loss"] for row in rows if "loss" in row]
    assert len(losses["auto"]) == 6 and "plain model" not in caplog.text
    assert losses["auto"] == pytest.approx(losses["reference"], abs=1e-4)

    images = torch.randn(2, 3, 48, 48)
    ours = upstep_fast.load_adapted(options["model"], tmp_path / "auto" / "adapter")
    theirs = timm.create_model(options["model"], pretrained=True).eval()
    for block in theirs.blocks:
        block.attn.qkv_bias_separate = True  # docs/models.md
    base = features(theirs, images)
    served = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "auto" / "adapter")).eval().base_model.model
    assert relative(features(served, images), features(ours, images)) < 1e-5
    assert relative(features(served, images), base) > 1e-4


@pytest.mark.parametrize("gated", [False, True])
def test_the_engine_gives_what_transformers_dinov3_gives(gated, tmp_path):
    torch.manual_seed(0)
    config = transformers.DINOv3ViTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
        num_register_tokens=4,
        image_size=64,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
        layerscale_value=1.0,
        initializer_range=0.2,
    )
    theirs = transformers.DINOv3ViTModel(config).eval()
    theirs.save_pretrained(tmp_path)
    vit = backbone.load(f"local-dir:{tmp_path}").vit
    run = engine.build(vit, torch.float32)
    for side in ((64, 64), (48, 80)):
        images = torch.randn(2, 3, *side)
        with torch.no_grad():
            expected = theirs(images).last_hidden_state
            ours = vit.norm(run.through_blocks([run.embed(images)], run.ropes(images))[0])
        assert relative(ours, expected) < 1e-5
