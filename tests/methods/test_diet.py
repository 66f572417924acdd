"""DIET: the loss against float64, closed forms and torch's own; classes, views and files of a run; what it refuses."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import upstep_fast
from upstep_fast.config.diet import DietConfig
from upstep_fast.config.flat import from_flat, replace_flat
from upstep_fast.config.plan import PlanConfig
from upstep_fast.data.loading.loader import Batch
from upstep_fast.errors import ConfigError
from upstep_fast.methods import build
from upstep_fast.methods.losses import diet
from upstep_fast.methods.losses.diet import diet_loss
from upstep_fast.model import backbone as backbones
from upstep_fast.runtime.device import Compute
from upstep_fast.train.memory.count import count
from upstep_fast.train.memory.measure import one_step


def by_numpy(z, w, y, e):
    """The loss in float64 from its definition."""
    scores = z @ w.T
    log_p = scores - scores.max(1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
    targets = np.full(scores.shape, e / len(w))
    targets[np.arange(len(z)), y] += 1 - e
    return -(targets * log_p).sum(1).mean()


def problem(num, classes, width=7, scale=1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(classes)
    z, w = (torch.randn(rows, width, generator=g).mul(scale).to(dtype).requires_grad_() for rows in (num, classes))
    return z, w, torch.randint(classes, (num,), generator=g)


@pytest.mark.parametrize("classes", [1, 2, 10, 11, 23, 40])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_value_and_gradients_in_chunks_are_those_of_the_plain_loss_in_float64(monkeypatch, classes, smoothing, dtype):
    monkeypatch.setattr(diet, "CHUNK", 10)
    z, w, y = problem(13, classes, scale=3.0, dtype=dtype)
    loss = diet_loss(z, w, y, smoothing)
    loss.backward()
    a, b = z.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    expected = F.cross_entropy(a @ b.T, y, label_smoothing=smoothing)
    expected.backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    by_hand = by_numpy(a.detach().numpy(), b.detach().numpy(), y.numpy(), smoothing)
    assert loss.item() == pytest.approx(by_hand, rel=1e-5, abs=1e-6)
    assert expected.item() == pytest.approx(by_hand, rel=1e-12, abs=1e-12)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 8e-3}[dtype]
    for ours, theirs in ((z.grad, a.grad), (w.grad, b.grad)):
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm() + 1e-6 * (dtype != torch.float64)


def test_closed_forms():
    y = torch.tensor([2, 0, 2])
    # features that tell nothing: the uniform guess
    assert diet_loss(torch.zeros(3, 4), torch.randn(9, 4), y, 0.3).item() == pytest.approx(math.log(9), rel=1e-6)
    # the best scores that targets of 1 - e + e/N and e/N allow: the loss is their entropy, and no gradient is left
    own, other = 1 - 0.3 + 0.3 / 9, 0.3 / 9
    w = torch.eye(9, dtype=torch.float64).mul(math.log(own / other)).requires_grad_()
    loss = diet_loss(torch.eye(9, dtype=torch.float64)[y], w, y, 0.3)
    loss.backward()
    assert loss.item() == pytest.approx(-own * math.log(own) - 8 * other * math.log(other), rel=1e-12)
    assert w.grad.abs().max() < 1e-15
    # scores beyond the range of exp
    far = diet_loss(torch.full((1, 1), 1e4), torch.tensor([[1.0], [-1.0]]), torch.tensor([1]), 0.0)
    assert far.item() == 2e4


def test_one_image_twice_in_a_batch_adds_up_and_autocast_rounds_nothing():
    z, w, _ = problem(6, 5)
    y = torch.tensor([3, 3, 3, 0, 3, 1])
    with torch.autocast("cpu", torch.bfloat16):
        loss = diet_loss(z, w, y, 0.3)
    loss.backward()
    a, b = z.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    F.cross_entropy(a @ b.T, y, label_smoothing=0.3).backward()
    assert (w.grad - b.grad).norm() < 2e-6 * b.grad.norm() and (z.grad - a.grad).norm() < 2e-6 * a.grad.norm()


class Largest(TorchDispatchMode):
    """Counts the numbers of the largest tensor that an operator returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(out) if torch.is_tensor(t)]
        self.numbers = max([self.numbers, *sizes])
        return out


def test_memory_does_not_grow_with_images_times_classes():
    z, w, y = problem(64, 60_000, width=4)
    with Largest() as largest, torch.autograd.set_multithreading_enabled(False):
        diet_loss(z, w, y, 0.3).backward()
    assert largest.numbers <= max(64 * diet.CHUNK, w.numel()) < 64 * len(w) / 5


def numbers_of(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def options(options):
    unused = ("prototypes", "head_hidden", "head_dim")
    own = dict(method="diet", batch_size=12, steps=20, lr=5e-2, verdict="off", whitening="off", report_images=False)
    return {name: value for name, value in options.items() if name not in unused} | own


def test_a_run_has_a_class_for_each_image_and_an_adapter_without_them(options):
    upstep_fast.adapt(**options)
    out = options["out"]
    losses = numbers_of(out)
    num = len(list(options["data"].iterdir()))
    # W is small at the start: nearly the uniform guess
    assert losses[0] == pytest.approx(math.log(num), rel=0.05)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.05
    state = load_file(sorted((out / "checkpoints").glob("step-*"))[-1] / "state.safetensors")
    assert state["method.prototypes"].shape == (num, 48)
    assert all("lora_" in name for name in load_file(out / "adapter" / "adapter_model.safetensors"))


def config_of(options, **more):
    given = {name: value for name, value in options.items() if name != "steps"} | more
    given["data"], given["out"] = (str(options["data"]),), str(options["out"])
    return from_flat(DietConfig, **given)


@pytest.mark.parametrize(("layout", "num_views"), [("symmetric", 1), ("asymmetric", 2)])
def test_views_carry_the_numbers_of_their_images_whatever_is_cut_from_them(options, layout, num_views):
    config = config_of(options, layout=layout, prototypes=20)
    method = build(backbones.load_from(config.model), config)
    batch = Batch([torch.zeros(3, 40, 40, dtype=torch.uint8)] * 3, torch.tensor([7, 0, 19]), 0, 0)
    views = method.views(batch, torch.device("cpu"))
    assert len(views) == num_views
    student = method.embed(views[num_views - 1 :])
    assert student.extras.tolist() == [7, 0, 19]
    z = student.z[0].double()
    expected = by_numpy(z.detach().numpy(), method.prototypes.detach().double().numpy(), [7, 0, 19], 0.3)
    assert method.loss(student).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "extra",
    [
        *({"head": "mlp"}, {"cvr": "sq"}, {"temperature": 0.2}, {"queue": 8}, {"distil": "feature"}),
        *({"objective": "vicreg"}, {"prototype_init": "kmeans"}, {"preset": "strong"}, {"gate": "views"}),
        *({"local_views": 2}, {"label_smoothing": 1.0}, {"label_smoothing": -0.1}),
    ],
    ids=str,
)
def test_what_has_no_effect_is_refused(options, extra):
    with pytest.raises(ConfigError, match=rf"^{next(iter(extra))}: .*(leave it out with|choose another|below 1)"):
        upstep_fast.adapt(**options | extra)


def test_a_measured_step_has_no_more_classes_than_the_classifier(options):
    config = config_of(options, prototypes=3)  # of 12 images: `plan` sees no images that would set the number
    take_step, seconds = one_step(replace_flat(config, memory="fast"), Compute(torch.device("cpu"), "fp32"))
    take_step()
    assert len(seconds) == 2


def test_plan_counts_the_classifier_its_gradient_and_its_moments(options):
    given = {name: value for name, value in options.items() if name in ("model", "img_size", "method")}
    plan = from_flat(PlanConfig, **given, batch_size=4, steps=1)
    few, many = (
        count(replace_flat(plan, prototypes=classes).to_adapt(), Compute(torch.device("cpu"), "fp32"))
        for classes in (100_000, 200_000)
    )
    assert many.trained - few.trained == 100_000 * 48
    assert many.peak - few.peak == pytest.approx(4 * 4 * 100_000 * 48, rel=0.01)
