"""Features alone on a CPU: packed weights, and the last block on the class token, against timm in float64."""

import copy
import platform

import pytest
import torch
from engine_models import ROTARY, SWIGLU, model, relative

from upstep_fast.engine import block, inference, packed_weights
from upstep_fast.engine import vit as engine
from upstep_fast.engine.projections import PackedProjection
from upstep_fast.model.pooling import features, pooled_and_patch_mean, pooled_only

VARIANTS = ["class token", "registers, LayerScale", "QuickGELU, norm_pre", "qk-norm", *SWIGLU, *ROTARY]
needs_onednn = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available(),
    reason="weights are packed on x86 with oneDNN",
)


def frozen(vit, dtype=torch.float32, **options):
    run = engine.build(vit, dtype, frozen=True, **options).features

    def call(images):
        with torch.no_grad():
            return run(images)

    return call


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_those_of_timm_in_float64(variant):
    vit, images = model(variant, ())
    truth = features(copy.deepcopy(vit).double(), images.double())
    assert relative(frozen(vit)(images), truth) < 1e-5
    assert relative(frozen(vit, pool=pooled_only)(images)[:, 0], truth) < 1e-5
    # parts of `pooled_and_patch_mean` need every token
    assert relative(frozen(vit, pool=pooled_and_patch_mean)(images)[:, 0], truth) < 1e-5


@pytest.mark.parametrize("variant", ["class token", "registers, LayerScale", *SWIGLU[:1], *ROTARY[:1]])
def test_bf16_is_as_near_to_the_truth_as_with_gradients(variant):
    vit, images = model(variant, ())
    truth = features(copy.deepcopy(vit).double(), images.double())
    with_gradients = relative(engine.build(vit, torch.bfloat16).features(images.requires_grad_()), truth)
    assert relative(frozen(vit, torch.bfloat16)(images.detach()), truth) < 1.5 * with_gradients


@needs_onednn
def test_weights_are_packed_once_and_only_the_class_token_leaves_the_last_block(monkeypatch):
    vit, images = model("class token", ())
    shapes = []
    product, gelu_product = PackedProjection.product, PackedProjection.gelu_product
    monkeypatch.setattr(PackedProjection, "product", lambda s, x: shapes.append(x.shape[1]) or product(s, x))
    monkeypatch.setattr(
        PackedProjection, "gelu_product", lambda s, x, a: shapes.append(-x.shape[1]) or gelu_product(s, x, a)
    )
    run, tokens = frozen(vit), vit.pos_embed.shape[1]
    run(images)
    blocks = len(vit.blocks)
    assert shapes == [tokens, tokens, -tokens, tokens] * (blocks - 1) + [tokens, 1, -1, 1]
    monkeypatch.setattr(inference, "pack", lambda merged: pytest.fail("packed again"))
    run(images)


def test_an_adapter_is_not_packed_and_its_changes_are_seen():
    vit, images = model("class token")
    run = frozen(vit)
    before = run(images)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if "lora_b" in name:
                parameter += 0.1
    after = run(images)
    assert not torch.allclose(before, after)
    assert relative(after, features(vit, images).detach()) < 1e-4


def test_a_pixel_that_is_not_a_number_shows_in_the_features():
    vit, images = model("class token", ())
    images = images.detach().clone()
    images[0, 0, 0, 0] = float("nan")
    found = frozen(vit)(images)
    assert found[0].isnan().all() and found[1:].isfinite().all()


def pool_by_mean(vit):
    vit.global_pool = "avg"


def pool_by_maximum(vit):
    vit.forward_head = lambda tokens, pre_logits: tokens.amax(1)


def mix_tokens_by_a_hook(vit):
    vit.norm.register_forward_hook(lambda module, inputs, out: out + out.mean(1, keepdim=True))


def mix_tokens_by_another_forward(vit):
    norm = vit.norm.forward
    vit.norm.forward = lambda x: norm(x) + x.mean(1, keepdim=True)


@pytest.mark.parametrize("change", [pool_by_mean, pool_by_maximum, mix_tokens_by_a_hook, mix_tokens_by_another_forward])
def test_what_is_changed_behind_the_blocks_afterwards_gets_every_token(change):
    vit, images = model("class token", ())
    run = frozen(vit)
    before = run(images)
    change(vit)
    truth = features(copy.deepcopy(vit), images).detach()
    assert relative(run(images), truth) < 1e-5 < relative(before, truth)


def wrong_packed_product(monkeypatch):
    product = PackedProjection.product
    monkeypatch.setattr(PackedProjection, "product", lambda self, x: 1.1 * product(self, x))


def wrong_attention_of_the_class_token(monkeypatch):
    attend_first = block.attend_first
    monkeypatch.setattr(block, "attend_first", lambda y, heads, count: -10 * attend_first(y, heads, count))


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        pytest.param(wrong_packed_product, "features without gradients", marks=needs_onednn),
        (wrong_attention_of_the_class_token, "features"),
    ],
)
def test_the_self_check_runs_this_path_and_says_that_the_plain_model_runs(fault, named, monkeypatch, caplog):
    vit, images = model("class token", ())
    fault(monkeypatch)
    run, _ = engine.make_features(vit, torch.float32, "fast", lambda x: features(vit, x), frozen=True)
    assert torch.equal(run(images), features(vit, images))
    assert f"running the plain model instead, since its {named} differ" in caplog.text


@needs_onednn
def test_a_packed_weight_has_no_gradient():
    vit, _ = model("class token", ())
    packed = packed_weights.pack(engine.build(vit, torch.float32).merge_adapters())
    with pytest.raises(NotImplementedError, match="no gradient"):
        packed[0].projections[0].input_gradient(torch.zeros(1, 96))
