"""Distillation from the base model, and sharpened targets, against float64 and closed forms."""

import json
import math

import pytest
import torch
from adapt_configs import upstep_config

import upstep_fast
from upstep_fast.data.views.types import Views
from upstep_fast.errors import ConfigError
from upstep_fast.methods import build
from upstep_fast.methods.losses.distillation import distillation_loss, sharpen
from upstep_fast.model import backbone, lora, pooling


def draw(num, width, seed):
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed))


def test_penalty_is_zero_for_the_base_model_and_when_off():
    f = draw(6, 5, 0)
    for form in ("feature", "relational"):
        assert distillation_loss(form, 3 * f, f, 0.1).item() == pytest.approx(0, abs=1e-6)
    assert distillation_loss("off", draw(6, 5, 1), f, 0.1).item() == 0


def test_feature_distance_of_orthogonal_and_opposite_features():
    f = torch.eye(4)
    assert distillation_loss("feature", f, f.roll(1, 0), 0.1).item() == pytest.approx(1)
    assert distillation_loss("feature", f, -f, 0.1).item() == pytest.approx(2)


def test_relational_penalty_is_invariant_to_rotation():
    f = draw(7, 5, 0)
    turned = f @ torch.linalg.qr(draw(5, 5, 1))[0]
    assert distillation_loss("relational", turned, f, 0.1).item() == pytest.approx(0, abs=1e-5)
    assert distillation_loss("feature", turned, f, 0.1).item() > 0.1


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_relational_distance_is_the_kl_divergence(temperature):
    f, g = draw(6, 5, 0).double(), draw(6, 5, 1).double()
    f, g = f / f.norm(dim=1, keepdim=True), g / g.norm(dim=1, keepdim=True)
    expected = 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        p, q = (torch.stack([x[i] @ x[j] for j in others]).div(temperature).exp() for x in (f, g))
        p, q = p / p.sum(), q / q.sum()
        expected += sum(float(q[j] * math.log(q[j] / p[j])) for j in range(5)) / 6
    assert distillation_loss("relational", f, g, temperature).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", ["feature", "relational"])
def test_gradient_is_of_the_adapted_features_only_and_descends(form):
    g = draw(8, 5, 1).requires_grad_()
    f = (g.detach() + 0.5 * draw(8, 5, 2)).requires_grad_()
    before = distillation_loss(form, f, g, 0.2)
    before.backward()
    assert g.grad is None
    after = distillation_loss(form, f.detach() - 0.05 * f.grad / f.grad.norm(), g, 0.2)
    assert after.item() < before.item()


def test_sharpening():
    q = torch.tensor([[0.5, 0.25, 0.25]])
    assert sharpen(q, 1) is q
    assert torch.allclose(sharpen(q, 2), torch.tensor([[2 / 3, 1 / 6, 1 / 6]]))
    assert sharpen(q, 60)[0, 0].item() == pytest.approx(1)
    assert torch.allclose(sharpen(torch.full((2, 4), 0.25), 4), torch.full((2, 4), 0.25))


@pytest.fixture
def options(options):
    return options | dict(steps=4, gate="none")


@pytest.mark.parametrize("form", ["feature", "relational"])
def test_loss_contains_the_distance_from_the_base_model(options, form):
    config = upstep_config(**{**options, "data": ("",), "out": ""}, distil=form, distil_weight=0.7)
    method = build(backbone.load(options["model"]), config)
    method.accelerate(torch.float32)
    pixels = torch.randn(2, 6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for adapter in method.adapters.values():
            adapter.lora_b.normal_(generator=torch.Generator().manual_seed(1))
    adapted = pooling.features(method.vit, pixels.flatten(0, 1))
    base = pooling.features(backbone.load(options["model"]).vit, pixels.flatten(0, 1))
    learning = method.embed(Views.of(pixels))
    with_penalty = method.loss(learning)
    method.config = upstep_config(**{**options, "data": ("",), "out": ""})
    expected = 0.7 * distillation_loss(form, adapted, base, 0.1)
    assert expected.item() > 0.01
    assert (with_penalty - method.loss(learning)).item() == pytest.approx(expected.item(), rel=1e-3)
    with_penalty.backward()
    # what the engine held for the backward pass is still the adapted model
    again = method.embed(Views.of(pixels))
    again_gradient = torch.autograd.grad(method.loss(again) + expected.detach(), method.adapter_parameters()[0])
    assert all(g.isfinite().all() for g in again_gradient)


def test_disabled_adapters_give_the_base_model_temporarily(model):
    vit = backbone.load(model).vit
    x = torch.randn(2, 3, 32, 32)
    base = pooling.features(vit, x)
    adapters = lora.inject(vit, lora.LoraSpec(r=2, alpha=4))
    for adapter in adapters.values():
        torch.nn.init.normal_(adapter.lora_b)
    adapted = pooling.features(vit, x)
    with lora.disabled(adapters.values()):
        assert torch.equal(pooling.features(vit, x), base)
    assert torch.equal(pooling.features(vit, x), adapted) and not torch.equal(adapted, base)


def test_large_penalty_keeps_features_near_the_base_model(options, tmp_path):
    distances = {}
    base = backbone.load(options["model"]).vit
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    for name, more in {"plain": {}, "near": dict(distil="feature", distil_weight=30.0)}.items():
        run = upstep_fast.adapt(**options | {"out": tmp_path / name, "steps": 10, "lr": 1e-2}, **more)
        adapted = upstep_fast.load_adapted(options["model"], run.adapter)
        f, g = pooling.features(adapted, x), pooling.features(base, x)
        distances[name] = distillation_loss("feature", f, g, 0.1).item()
    assert distances["near"] < distances["plain"] / 2


def test_gate_by_image_trains_half_of_the_images(options, tmp_path):
    image = dict(gate_unit="image", layout="asymmetric", gate="quantile", gate_rate=0.5)
    result = upstep_fast.adapt(**options | image)
    written = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert result.opened == 4 and [row["learnt"] for row in written] == [4] * 4
    for wrong in ({"layout": "symmetric"}, {"gate": "ema"}):
        with pytest.raises(ConfigError, match="gate_unit: image needs"):
            upstep_fast.adapt(**options | image | wrong)
