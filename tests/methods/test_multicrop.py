"""Local views: loss, gradients, skipped steps, and input sizes other than the model's own."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from adapt_configs import upstep_config

import upstep_fast
from upstep_fast.config.explora import MaeConfig
from upstep_fast.config.flat import from_flat
from upstep_fast.data.loading.loader import Batch
from upstep_fast.data.views.make_views import multi_crop
from upstep_fast.errors import ConfigError
from upstep_fast.methods.upstep.dynamic_size import allow_any_size
from upstep_fast.methods.upstep.extended import ExtendedUpStep
from upstep_fast.model import backbone, pooling


@pytest.fixture
def options(options):
    return options | dict(steps=4, local_views=3, memory_check=False)


def build(options, **changes):
    """A method whose adapters are far from the base model, and the views of a batch of six images."""
    config = upstep_config(**{**options, "data": ("",), "out": "", **changes})
    method = ExtendedUpStep(backbone.load(options["model"]), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in method.adapters.values():
            adapter.lora_b.normal_(generator=generator)
    images = [torch.randint(256, (3, 40, 50), dtype=torch.uint8, generator=generator) for _ in range(6)]
    return method, method.views(Batch(images, torch.arange(6), 0, 0), torch.device("cpu")), images


def cross_entropy(q, z, method):
    log_p = (
        z.double() @ F.normalize(method.prototypes.double(), dim=-1).T / method.config.objective.temperature
    ).log_softmax(-1)
    return -(q * log_p).sum(-1).mean()


def test_global_and_local_crops_draw_different_random_numbers(options):
    method, views, images = build(options)
    assert views.pixels.shape == (2, 6, 3, 32, 32) and views.local.shape == (3, 6, 3, 16, 16)
    expected = multi_crop(images, method.view_configs, seed=0, epoch=0, indices=range(6))
    assert torch.equal(views.pixels, expected[0]) and torch.equal(views.local, expected[1])
    assert torch.equal(views.pixels, build(options, local_views=0)[1].pixels)
    assert method.view_configs[1][0].crop_scale == (0.05, 0.25)
    assert build(options, local_size=8)[1].local.shape[-2:] == (8, 8)
    some = views[1:, torch.tensor([4, 1])]
    assert torch.equal(some.pixels, views.pixels[1:, [4, 1]]) and torch.equal(some.local, views.local[:, [4, 1]])


@pytest.mark.parametrize("layout", ["symmetric", "asymmetric"])
def test_the_loss_is_the_mean_over_all_pairs_of_a_target_and_another_view(options, layout):
    method, views, _ = build(options, layout=layout, cvr="off")
    z = [F.normalize(method.head(pooling.features(method.vit, x)), dim=-1) for x in (*views.pixels, *views.local)]
    if layout == "symmetric":
        learning = method.embed(views)
        loss = method.loss(learning)
        targets = {v: q.double() for v, q in enumerate(method._targets(learning, scores(method, z[:2]), None))}
    else:
        target, learning = method.embed(views[:1]), method.embed(views[1:])
        loss = method.loss(learning, target)
        targets = {0: method._targets(target, scores(method, z[:1]), None)[0].double()}
    pairs = [cross_entropy(q, z[w], method) for v, q in targets.items() for w in range(5) if w != v]
    assert loss.item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-5)


def scores(method, z):
    return torch.stack(z).detach() @ F.normalize(method.prototypes, dim=-1).T


def test_engine_has_the_plain_models_gradients(options):
    gradients = []
    for is_fast in (False, True):
        method, views, _ = build(options)
        if is_fast:
            method.accelerate(torch.float32)
        method.loss(method.embed(views)).backward()
        gradients.append([p.grad for p in method.adapter_parameters()])
    for plain, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, fast, rtol=1e-3, atol=1e-5)
    # and in several passes, what it learns in one
    method.zero_grad()
    method.num_microbatches = 2
    method.loss(method.embed(views)).backward()
    for fast, again in zip(gradients[1], [p.grad for p in method.adapter_parameters()], strict=True):
        torch.testing.assert_close(fast, again, rtol=1e-3, atol=1e-5)


def test_any_input_size_equals_timms_dynamic_img_size(model):
    x, small = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 24)
    own, dynamic = timm.create_model(model, pretrained=True), timm.create_model(model, True, dynamic_img_size=True)
    before = own.eval().forward_features(x)
    allow_any_size(own, "m")
    assert torch.equal(own.forward_features(x), before)
    assert torch.equal(own.forward_features(small), dynamic.eval().forward_features(small))
    with pytest.raises(ConfigError, match="local_views: m is a Linear"):
        allow_any_size(torch.nn.Linear(1, 1), "m")


def test_skipped_steps_do_not_run_local_views(options, monkeypatch):
    seen = []
    real = ExtendedUpStep._with_local
    monkeypatch.setattr(
        ExtendedUpStep, "_with_local", lambda self, *args: (seen.append(len(args[1])), real(self, *args))[1]
    )
    upstep_fast.adapt(**options, gate="alternate")
    rows = [json.loads(line) for line in (options["out"] / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and seen == [3] * sum(row["open"] for row in rows) == [3, 3]


def test_local_views_of_selected_images_only(options, monkeypatch):
    seen = []
    real = ExtendedUpStep._with_local
    monkeypatch.setattr(
        ExtendedUpStep, "_with_local", lambda self, *args: (seen.append(args[1].shape[:2]), real(self, *args))[1]
    )
    upstep_fast.adapt(**options, gate="quantile", gate_unit="image", layout="asymmetric", gate_rate=0.25)
    assert seen == [(3, 2)] * 4


def test_unsupported_options_raise():
    for options, named in (
        ({"local_views": -1}, "local_views: got -1"),
        ({"local_views": 1, "cuda_graphs": True}, "cuda_graphs and local_views"),
    ):
        with pytest.raises(ConfigError, match=named):
            upstep_config(model="m", data=("d",), out="o", **options)
    with pytest.raises(ConfigError, match="local_views: --objective mae"):
        from_flat(MaeConfig, model="m", data=("d",), out="o", local_views=2)
