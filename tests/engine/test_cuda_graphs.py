"""Training steps replayed as CUDA graphs: when they are captured, and that they change nothing."""

import contextlib

import pytest
import torch
from engine_models import gradients, model, trajectory

import upstep_fast
from upstep_fast.engine import cuda_graphs
from upstep_fast.engine import vit as engine
from upstep_fast.engine.cuda_graphs import graphed
from upstep_fast.errors import ConfigError


@pytest.fixture
def captured(monkeypatch):
    """Shapes that were captured, by a stand-in that reads its images from one place as a graph does."""
    shapes = []

    def stand_in(features, place, trained):
        shapes.append(tuple(place.shape))
        assert trained and all(p.requires_grad for p in trained)
        assert not torch.is_autocast_enabled("cpu") and not torch.is_autocast_cache_enabled()
        return lambda images: features(place.copy_(images))

    monkeypatch.setattr(cuda_graphs, "capture", stand_in)
    return shapes


@pytest.fixture
def captures(monkeypatch):
    """What each capture was told, and how often its graph was replayed; a replay leaves the values of the capture."""
    made = []

    class Graph:
        def __init__(self):
            self.replays = 0
            made.append(self)

        def replay(self):
            self.replays += 1

    @contextlib.contextmanager
    def capture(graph, **how):
        graph.how = how
        yield

    for name, value in {
        "CUDAGraph": Graph,
        "graph": capture,
        "Stream": object,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph_pool_handle": object,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made


def test_other_threads_may_allocate_during_the_capture(captures):
    vit, images = model()
    features = graphed(vit, engine.build(vit, torch.float32).features, lambda: None)
    features(images)
    forward, backward = captures
    assert forward.how == backward.how  # one stream, one pool of memory
    assert forward.how["capture_error_mode"] == "thread_local"  # "global": an allocation elsewhere makes it fail


def test_gradients_of_several_replays_are_accumulated(captures):
    vit, images = model()
    built = engine.build(vit, torch.float32)
    features = graphed(vit, built.features, built.check_unchanged)
    trained = [p for p in vit.parameters() if p.requires_grad]
    f = built.features(images)
    # the stand-in's replay leaves what the capture wrote: the gradients for this gradient of the features
    incoming = torch.linspace(-1, 1, f.numel()).view_as(f)
    expected = torch.autograd.grad(f, trained, incoming)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda x: incoming.clone() if x.shape == incoming.shape else x.clone())
        replayed = features(images)
    for _ in range(3):  # were the graph's own tensors the gradients, the third would be added to a multiple of itself
        replayed.backward(incoming)
        replayed = features(images)
    for p, g in zip(trained, expected, strict=True):
        torch.testing.assert_close(p.grad, 3 * g)
    assert [graph.replays for graph in captures] == [4, 3]


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
