"""Crops of several sizes in one pass of the engine against a pass of the plain timm model for each."""

import pytest
import timm
import torch
from torch import nn

from upstep_fast.engine import vit as engine
from upstep_fast.engine.fold import unsupported_blocks
from upstep_fast.engine.packing import (
    attend_first,
    attend_first_backward,
    drop_path_scale,
    pack,
    sizes_of,
    unpack,
)
from upstep_fast.methods.explora import unfrozen_blocks as explora
from upstep_fast.methods.explora.tokens import Encoder, embed, encode
from upstep_fast.model import lora
from upstep_fast.model.pooling import features, pooled

MODELS = {
    "class token": ("vit_tiny_patch16_224", dict(img_size=48, patch_size=8, embed_dim=96, num_heads=3)),
    "registers, LayerScale": ("vit_small_patch14_reg4_dinov2", dict(img_size=56, embed_dim=128, num_heads=2)),
    "mean of patches": ("vit_tiny_patch16_224", dict(img_size=48, embed_dim=96, num_heads=3, global_pool="avg")),
    "qk-norm": ("vit_tiny_patch16_224", dict(img_size=48, patch_size=8, embed_dim=96, num_heads=3, qk_norm=True)),
}
# (images, height, width): odd batches, a size that is the model's own, oblong ones, one image
BATCHES = [(3, 4, 4), (5, 2, 3), (1, 1, 2)]


class FixedPath(timm.layers.DropPath):
    """Drop path whose draw depends on its seed and the number of samples alone, so that two runs can be compared."""

    def __init__(self, seed):
        super().__init__(0.4)
        self.seed = seed

    def forward(self, x):
        if not self.training:
            return x
        generator = torch.Generator().manual_seed(1000 * self.seed + len(x))
        keep = torch.rand(len(x), 1, 1, generator=generator) >= self.drop_prob
        return x * keep / (1 - self.drop_prob)


def model(variant="class token", unfrozen=(), drops=False):
    """A timm model as ExPLoRA trains it, but for the norms of q and k, and crops of three sizes."""
    name, args = MODELS[variant]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = timm.create_model(name, depth=3, num_classes=0, dynamic_img_size=True, **args).train()
        for parameter in vit.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, 1.0, 0.1)
        adapters = explora.extend(vit, unfrozen, lora.LoraSpec(r=4, alpha=6, targets=("q", "v")), positions=True)
        for adapter in adapters.values():
            nn.init.normal_(adapter.lora_b, std=0.05)
        for block in vit.blocks:
            block.attn.q_norm.requires_grad_(False), block.attn.k_norm.requires_grad_(False)
        for number, block in enumerate(vit.blocks):
            if drops:
                block.drop_path1, block.drop_path2 = FixedPath(2 * number), FixedPath(2 * number + 1)
        side = vit.patch_embed.patch_size[0]
        crops = [torch.randn(batch, 3, rows * side, columns * side) for batch, rows, columns in BATCHES]
    return vit, crops


def gradients(vit, outputs):
    parameters = {name: p for name, p in vit.named_parameters() if p.requires_grad}
    weights = [torch.linspace(-1, 1, f.numel()).view_as(f) for f in outputs]
    loss = sum((f * w + f.sin()).sum() for f, w in zip(outputs, weights, strict=True))
    return dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def same_as_timm(vit, crops, memory):
    expected = [features(vit, x) for x in crops]
    expected_grads = gradients(vit, expected)
    encoder = Encoder(vit)
    assert encoder.accelerate(torch.float32, memory) is None
    got = [pooled(vit, tokens) for tokens in encoder(*(embed(vit, x) for x in crops))]
    for ours, theirs in zip(got, expected, strict=True):
        assert relative(ours, theirs) < 1e-5
    for name, gradient in gradients(vit, got).items():
        assert relative(gradient, expected_grads[name]) < 1e-4, name


@pytest.mark.parametrize("memory", ["fast", "balanced", "lean"])
@pytest.mark.parametrize("variant", MODELS)
def test_one_pass_is_the_passes_of_timm(variant, memory):
    same_as_timm(*model(variant), memory)


@pytest.mark.parametrize("memory", ["fast", "balanced", "lean"])
@pytest.mark.parametrize("unfrozen", [(0,), (1,), (2,)])
def test_blocks_trained_whole_stand_anywhere(unfrozen, memory):
    same_as_timm(*model("registers, LayerScale", unfrozen), memory)


@pytest.mark.parametrize("memory", ["fast", "balanced", "lean"])
def test_drop_path_drops_whole_samples(memory):
    vit, crops = model(unfrozen=(1,), drops=True)
    with torch.no_grad():
        dropped = features(vit, crops[0])
        assert relative(dropped, features(vit.eval(), crops[0])) > 1e-2
    same_as_timm(vit.train(), crops, memory)


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("unfrozen", [(), (0,), (2,), (0, 2)])
@pytest.mark.parametrize("variant", MODELS)
def test_features_and_some_patches_are_those_of_a_pass_over_all_tokens(variant, unfrozen, memory):
    vit, crops = model(variant, unfrozen, drops=True)
    places = torch.tensor([0, 3, 15, 16, 40])  # of the 3 x 16 patches of the first size
    passes = [vit.norm(vit.blocks(embed(vit, x))) for x in crops]
    patches = passes[0][:, vit.num_prefix_tokens :].flatten(0, 1)[places]
    expected = [torch.cat([vit.forward_head(x, pre_logits=True) for x in passes]), patches]
    expected_grads = gradients(vit, expected)
    encoder = Encoder(vit)
    assert encoder.accelerate(torch.float32, memory) is None
    got = encode(vit, encoder, [embed(vit, x) for x in crops], places)
    for ours, theirs in zip(got, expected, strict=True):
        assert relative(ours, theirs) < 1e-5
    for name, gradient in gradients(vit, got).items():
        assert relative(gradient, expected_grads[name]) < 1e-4, name


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("count", [1, 3])
def test_attention_of_the_first_tokens_and_its_gradient_are_those_of_float64(count, dtype, limit):
    torch.manual_seed(0)
    y, heads = (2 * torch.randn(3, 11, 48)).to(dtype), 2
    exact = y.double().requires_grad_()
    q, k, v = exact.unflatten(-1, (3, heads, 8)).permute(2, 0, 3, 1, 4)
    o = ((q @ k.mT * 8**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)[:, :count]
    d_o = torch.randn(o.shape).to(dtype)
    (d_y,) = torch.autograd.grad(o, exact, d_o.double())
    for ours, truth in ((attend_first(y, heads, count), o), (attend_first_backward(d_o, y, heads), d_y)):
        assert ours.dtype == dtype and (ours - truth).norm() < limit * truth.norm()


def test_one_draw_a_sequence():
    x = [torch.ones(40, 3, 2), torch.ones(60, 5, 2)]
    path, sizes = timm.layers.DropPath(0.5), sizes_of(x)
    torch.manual_seed(0)
    keep = drop_path_scale(path, pack(x), sizes)
    assert keep.shape == (40 * 3 + 60 * 5, 1)
    for group in unpack(keep, sizes):
        assert (group == group[:, :1]).all() and set(group.unique().tolist()) == {0.0, 2.0}


def test_trained_norms_of_q_and_k_are_left_to_the_plain_model():
    vit, _ = model("qk-norm")
    vit.blocks[0].attn.q_norm.requires_grad_(True)
    assert unsupported_blocks(vit) == {0: "trains a norm that the engine only folds"}
    for block in vit.blocks:
        block.attn.q_norm.requires_grad_(True)
    assert Encoder(vit).accelerate(torch.float32, "fast") == "block 0 trains a norm that the engine only folds"


def test_no_token_sees_another_image():
    vit, crops = model()
    run = engine.build(vit.eval(), torch.float32).through_blocks
    tokens = [embed(vit, x).detach().requires_grad_() for x in crops]
    run(tokens)[1][2].sum().backward()
    for number, group in enumerate(tokens):
        seen = group.grad.abs().sum((1, 2)) > 0
        assert seen.tolist() == [number == 1 and image == 2 for image in range(len(group))]


def test_bf16_and_forward_only_give_what_separate_passes_give():
    vit, crops = model("registers, LayerScale", (2,))
    for dtype in (torch.float32, torch.bfloat16):
        run = engine.build(vit.eval(), dtype).through_blocks
        with torch.no_grad():
            tokens = [embed(vit, x) for x in crops]
            for ours, group in zip(run(tokens), tokens, strict=True):
                # the library may take the rows of a product in another order
                assert ours.dtype == dtype and relative(ours.float(), run([group])[0].float()) < (
                    1e-6 if dtype == torch.float32 else 1e-2
                )


def test_adapters_are_merged_once_for_all_sizes(monkeypatch):
    vit, crops = model()
    merged = []
    real = engine.make_merger

    def counting(blocks):
        ready = real(blocks)
        return lambda: merged.append(1) or ready()

    monkeypatch.setattr(engine, "make_merger", counting)
    engine.build(vit, torch.float32).through_blocks([embed(vit, x) for x in crops])
    assert len(merged) == 1
