"""Out of memory: the error, micro-batches with an equal result, no step applied in part; gradient accumulation."""

import json

import pytest
import torch
from adapt_configs import upstep_config
from torch import nn

import upstep_fast
from upstep_fast.data.views.types import Views
from upstep_fast.errors import Interrupted, RunFailedError
from upstep_fast.methods import gate
from upstep_fast.methods.microbatch import in_microbatches
from upstep_fast.methods.upstep.upstep import UpStep
from upstep_fast.model import backbone
from upstep_fast.runtime import checkpoint
from upstep_fast.runtime.device import resolve
from upstep_fast.train import loop as trainer
from upstep_fast.train import step
from upstep_fast.train.out_of_memory import is_out_of_memory
from upstep_fast.train.state import fresh_state


@pytest.fixture
def options(options):
    return options | dict(data=str(options["data"]), out=str(options["out"]), memory_check=False, report_images=False)


def limit(monkeypatch, views, after=0):
    """From the `after`-th call on the model has memory for so many views at once."""
    real, count, seen = UpStep.__init__, iter(range(10**6)), []

    def limited(self, *args):
        real(self, *args)
        plain = None

        def features(images):
            seen.append(len(images))
            if len(images) > views and next(count) >= after:
                raise torch.OutOfMemoryError("planted")
            return plain(images)

        accelerate = self.accelerate

        def wrapped(*args):
            nonlocal plain
            accelerate(*args)
            plain, self.features = self.features, features

        self.accelerate = wrapped

    monkeypatch.setattr(UpStep, "__init__", limited)
    return seen


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("passes", [2, 3, 8, 50])
def test_micro_batches_have_the_values_and_gradients_of_one_batch(passes):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.GELU(), nn.Linear(7, 5)).double()
    images, weight = torch.randn(8, 3, 2, 2).double(), torch.randn(8, 5).double()
    whole = in_microbatches(net, images, 1)
    wanted = torch.autograd.grad((whole * weight).sum(), list(net.parameters()))
    y = in_microbatches(net, images, passes)
    (y * weight).sum().backward()
    torch.testing.assert_close(y, whole)
    torch.testing.assert_close([p.grad for p in net.parameters()], list(wanted))


def test_micro_batches_keep_at_most_one_part():
    kept = []
    net = nn.Linear(4, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        in_microbatches(net, torch.randn(8, 4), 4)
    # checkpoint keeps each part's input, none of what the model makes of it
    assert all(shape[0] <= 2 for shape in kept if len(shape))


@pytest.mark.parametrize("extra", [{}, {"layout": "asymmetric"}, {"gate": "alternate", "prototype_init": "learned"}])
def test_micro_batches_are_halved_and_the_result_is_equal(options, monkeypatch, tmp_path, caplog, extra):
    options |= extra
    upstep_fast.adapt(**options | {"out": tmp_path / "whole"})
    seen = limit(monkeypatch, views=3, after=2)
    upstep_fast.adapt(**options, auto_batch=True)
    assert "out of memory; from now on each step runs in" in caplog.text
    assert max(seen[-10:]) <= 3
    whole, passes = rows(tmp_path / "whole"), rows(tmp_path / "out")
    assert [row["open"] for row in whole] == [row["open"] for row in passes]
    for a, b in zip(whole, passes, strict=True):
        assert a["center"] == pytest.approx(b["center"], abs=1e-5)
        assert a["loss"] is None or a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_the_number_of_micro_batches_is_saved_and_the_resume_is_exact(options, monkeypatch, tmp_path):
    limit(monkeypatch, views=4)
    upstep_fast.adapt(**options | {"out": tmp_path / "whole"}, auto_batch=True)
    real, count = UpStep.update_running_stats, iter(range(1, 100))

    def stop(self, embedded):
        real(self, embedded)
        if next(count) == 3:
            import signal

            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(UpStep, "update_running_stats", stop)
        with pytest.raises(Interrupted):
            upstep_fast.adapt(**options, auto_batch=True)
    assert checkpoint.newest(tmp_path / "out" / "checkpoints").manifest["state"]["passes"] == 4
    upstep_fast.adapt(**options, auto_batch=True, resume=True)
    a, b = (checkpoint.newest(tmp_path / name / "checkpoints") for name in ("out", "whole"))
    assert a.files == b.files and a.manifest["state"] == b.manifest["state"]


def test_without_auto_batch_the_run_ends_with_what_to_do(options, monkeypatch, tmp_path):
    limit(monkeypatch, views=15, after=2)
    with pytest.raises(RunFailedError) as error:
        upstep_fast.adapt(**options)
    text = str(error.value)
    for words in (
        "step 2: out of memory on cpu",
        "8 images of 32 x 32",
        "--memory fast",
        "--auto-batch",
        "--batch-size",
    ):
        assert words in text
    assert "\n" not in text and len(rows(tmp_path / "out")) == 2


def test_when_one_view_is_too_much_the_run_ends(options, monkeypatch):
    limit(monkeypatch, views=0)
    with pytest.raises(RunFailedError, match=r"out of memory .* in 16 micro-batches .* lower --batch-size"):
        upstep_fast.adapt(**options, auto_batch=True)


@pytest.mark.parametrize("where", ["backward", "optimizer"])
def test_no_step_is_applied_in_part(options, monkeypatch, tmp_path, where):
    states = []
    real = fresh_state
    monkeypatch.setattr(trainer, "fresh_state", lambda *a: states.append(real(*a)) or states[-1])
    before = {}

    def planted(*args, **kwargs):
        before.update({name: p.detach().clone() for name, p in states[0].method.named_parameters()})
        raise torch.OutOfMemoryError("planted")

    target = (torch.Tensor, "backward") if where == "backward" else (torch.optim.AdamW, "step")
    monkeypatch.setattr(*target, planted)
    with pytest.raises(RunFailedError, match=r"step 0: out of memory .* no step was applied in part"):
        upstep_fast.adapt(**options)
    after = dict(states[0].method.named_parameters())
    assert before and all(torch.equal(before[name], after[name]) for name in before)
    assert states[0].step == 0 and states[0].gate == gate.GateState() and not states[0].optimizer.state


def test_the_hosts_memory_counts_too():
    assert is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def build(options, **changes):
    config = upstep_config(**options | changes | {"data": (options["data"],)})
    compute = resolve("cpu", "fp32")
    return config, compute, fresh_state(config, compute, backbone.load(config.model.name))


def test_an_update_is_that_of_the_mean_gradient_of_its_open_steps(options, monkeypatch):
    """Oracle: autograd's gradients of each batch alone, at the weights before the update."""
    config, compute, state = build(options, accumulate=3, gate="none", clip=0.0)
    rule, learned = trainer.gate_rule(config), {n: p for n, p in state.method.named_parameters() if p.requires_grad}
    batches = [Views.of(pixels) for pixels in torch.randn(3, 2, 8, 3, 32, 32)]
    wanted = {}
    for images in batches:
        loss = state.method.loss(state.method.embed(images))
        for name, grad in zip(learned, torch.autograd.grad(loss, list(learned.values())), strict=True):
            wanted[name] = wanted.get(name, 0) + grad.double() / 3
    start = {name: p.detach().clone() for name, p in learned.items()}
    found = {}
    real = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: (found.update({n: p.grad.clone() for n, p in learned.items()}), real(self)),
    )
    updated = []
    for images in batches:
        assert all(torch.equal(start[name], p) for name, p in learned.items())
        updated.append(step.step(state, images, rule, config, compute)["updated"])
    assert updated == [False, False, True] and not state.gradients
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name].double(), grad, rtol=1e-4, atol=1e-7)


def test_closed_and_bad_steps_do_not_count_towards_an_update(options, monkeypatch):
    config, compute, state = build(options, accumulate=2, gate="alternate")
    rule, images = trainer.gate_rule(config), Views.of(torch.randn(2, 8, 3, 32, 32))
    real, count = UpStep.loss, iter(range(100))
    monkeypatch.setattr(UpStep, "loss", lambda self, *a: real(self, *a) * (float("nan") if next(count) == 1 else 1))
    rows = [step.step(state, images, rule, config, compute) for _ in range(6)]
    step.flush(state)
    assert [row["open"] for row in rows] == [True, False] * 3
    assert [row["bad"] is not None for row in rows] == [False, False, True, False, False, False]
    assert [row["updated"] for row in rows] == [False, False, False, False, True, False]
