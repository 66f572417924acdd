"""Training steps replayed as CUDA graphs: when they are captured, and that they change nothing."""

import pytest
import torch
from engine_models import gradients, model, trajectory

import upstep_fast
from upstep_fast.engine import vit as engine
from upstep_fast.engine.cuda_graphs import graphed
from upstep_fast.errors import ConfigError


@pytest.fixture
def captured(monkeypatch):
    """Shapes that were captured, by a stand-in that reads its images from one place as a graph does."""
    shapes = []

    def stand_in(module, sample_args):
        (place,) = sample_args
        shapes.append(tuple(place.shape))
        trained = [p for p in module.parameters() if p.requires_grad]
        assert trained and not torch.is_autocast_enabled("cpu") and not torch.is_autocast_cache_enabled()
        return lambda images: module(place.copy_(images))

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    return shapes


def test_each_shape_is_captured_once_and_only_for_gradients(captured):
    vit, images = model()
    built = engine.build(vit, torch.float32)
    features, before = graphed(vit, built.features, built.check_unchanged), images.clone()
    for batch in (images, 2 * images, images[:2], images):
        f, grads = gradients(vit, features, batch)
        expected, expected_grads = gradients(vit, built.features, batch)
        assert torch.equal(f, expected)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
    with torch.no_grad():
        assert torch.equal(features(images[:1]), built.features(images[:1]))
    assert captured == [tuple(images.shape), tuple(images[:2].shape)]
    assert torch.equal(images, before)


def test_a_changed_model_is_not_replayed(captured):
    vit, images = model()
    built = engine.build(vit, torch.float32)
    features = graphed(vit, built.features, built.check_unchanged)
    features(images)
    vit.norm.double()
    with pytest.raises(RuntimeError, match=r"norm\.weight was changed after folding"):
        features(images)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, "cuda_graphs: needs a GPU, the device is cpu"),
        ({"auto_batch": True}, "cuda_graphs and auto_batch"),
        ({"shard_weights": True}, "cuda_graphs and shard_weights"),
        ({"implementation": "reference"}, "cuda_graphs: only the engine is captured"),
        ({"method": "explora"}, "cuda_graphs: --method explora cannot"),
    ],
)
def test_what_cannot_be_captured_is_refused(model, photos, tmp_path, extra, message):
    with pytest.raises(ConfigError, match=message):
        upstep_fast.adapt(
            model=model, data=(str(photos),), out=str(tmp_path / "out"), device="cpu", cuda_graphs=True, **extra
        )


def test_a_model_the_engine_cannot_run_is_refused():
    vit = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="cuda_graphs: only the engine is captured, and it cannot run this model"):
        engine.make_features(vit, torch.float32, "fast", fallback=vit, graphs=True)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["fast", "balanced", "lean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["class token", "registers, LayerScale", "SwiGLU"])
def test_replays_give_the_values_and_gradients_of_the_engine(variant, dtype, memory):
    vit, images = model(variant, ("q", "v", "proj", "fc1"))
    vit, images = vit.cuda(), images.cuda()
    built = engine.build(vit, dtype, memory)
    features = graphed(vit, built.features, built.check_unchanged)
    optimizer = torch.optim.AdamW([p for p in vit.parameters() if p.requires_grad], lr=1e-2, fused=True)
    for factor in (1, 0.5, 2):
        skipped = features(3 * images)  # a closed step: no backward
        f, grads = gradients(vit, features, factor * images)
        expected, expected_grads = gradients(vit, built.features, factor * images)
        assert torch.equal(f, expected) and skipped.shape == f.shape
        assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
        with torch.no_grad():
            torch.testing.assert_close(features(images), built.features(images))
        optimizer.zero_grad()
        features(images).square().mean().backward()
        optimizer.step()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("gate", ["ema", "alternate"])
def test_a_run_is_the_same_with_and_without(gate, layout):
    plain, replayed = (
        trajectory("auto", 12, "bf16", device="cuda", gate=gate, layout=layout, cuda_graphs=graphs)
        for graphs in (False, True)
    )
    assert [(row["open"], row["loss"], row["center"]) for row in replayed] == [
        (row["open"], row["loss"], row["center"]) for row in plain
    ]
