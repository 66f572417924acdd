"""The moving average of the adapters that is saved in place of the last one (--adapter-ema)."""

import pytest
import torch
from adapt_configs import upstep_config
from safetensors.torch import load_file

import upstep_fast
from upstep_fast.config.explora import Dinov2Config
from upstep_fast.config.flat import from_flat
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import ConfigError
from upstep_fast.methods.upstep.adapter_ema import Average
from upstep_fast.methods.upstep.extended import ExtendedUpStep
from upstep_fast.model import backbone, peft_format
from upstep_fast.runtime.device import resolve
from upstep_fast.train import validator
from upstep_fast.train.state import fresh_state


@pytest.fixture
def options(options):
    return options | dict(report_images=False)


def states(monkeypatch):
    """The factors after each update, and a look at the method."""
    found, real = [], ExtendedUpStep.after_update

    def after_update(self, applied):
        real(self, applied)
        found.append((self, [p.detach().double().clone() for p in self.adapter_parameters()]))

    monkeypatch.setattr(ExtendedUpStep, "after_update", after_update)
    return found


@pytest.mark.parametrize("beta", [0.5, 0.99, 0.9999])
def test_average_is_the_weighted_mean_of_all_updates(beta):
    p = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    average = Average(p, beta)
    seen = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    for n, values in enumerate(seen, 1):
        p[0].data.copy_(values[:6].view(2, 3))
        p[1].data.copy_(values[6:])
        average.update(p, torch.tensor(True))
        before = average.values.clone()
        average.update([torch.nn.Parameter(torch.full_like(x, 9.0)) for x in p], torch.tensor(False))
        assert torch.equal(average.values, before)
        weights = beta ** torch.arange(n - 1, -1, -1, dtype=torch.float64)
        expected = (weights @ seen[:n].double()) / weights.sum()
        torch.testing.assert_close(average.values.double(), expected, rtol=1e-5, atol=1e-6)
    with average.in_place_of(p):
        assert torch.equal(torch.cat([p[0].flatten(), p[1]]), average.values)
    assert torch.equal(torch.cat([p[0].flatten(), p[1]]), seen[-1])


def test_adapter_folder_holds_the_average_over_update_steps(options, monkeypatch):
    found = states(monkeypatch)
    adapter = upstep_fast.adapt(**options, adapter_ema=0.8, gate="alternate").adapter
    assert len(found) == 3  # of six steps
    weights = torch.tensor([0.64, 0.8, 1.0], dtype=torch.float64) / 2.44
    of_one = zip(*(factors for _, factors in found), strict=True)  # a matrix after each of the updates
    means = [sum(w * p for w, p in zip(weights, matrix, strict=True)) for matrix in of_one]
    pairs = {name: a.as_one() for name, a in peft_format.attach(backbone.load(options["model"]).vit, adapter).items()}
    for (name, trained), a, b in zip(found[-1][0].adapters.items(), means[::2], means[1::2], strict=True):
        trained.lora_a.data.copy_(a)
        trained.lora_b.data.copy_(b)
        for got, want in zip(pairs[name], trained.as_one(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_training_does_not_depend_on_the_average(options, tmp_path):
    tensors = []
    for name, beta in (("with", 0.9), ("without", 0.0)):
        upstep_fast.adapt(**options | {"out": tmp_path / name, "adapter_ema": beta})
        tensors.append(load_file(tmp_path / name / "checkpoints/step-00000006/state.safetensors"))
    assert tensors[0].keys() - tensors[1].keys() == {"method.average.values", "method.average.updates"}
    assert all(torch.equal(tensors[0][name], value) for name, value in tensors[1].items())


def test_steps_that_are_not_applied_do_not_count(options, monkeypatch, tmp_path):
    real, calls = ExtendedUpStep.loss, iter(range(100))
    monkeypatch.setattr(ExtendedUpStep, "loss", lambda *a: real(*a) * (float("nan") if next(calls) == 2 else 1))
    upstep_fast.adapt(**options, adapter_ema=0.9, gate="none")
    state = load_file(tmp_path / "out/checkpoints/step-00000006/state.safetensors")
    assert state["method.average.updates"].item() == 5


def test_validator_evaluates_the_saved_weights(options, tmp_path, monkeypatch, photos):
    held_out = open_source(photos)
    config = upstep_config(**{**options, "data": ("",), "out": "", "adapter_ema": 0.9})
    compute = resolve("cpu", "fp32")
    judge = validator.Validator(config, held_out, backbone.load(options["model"]), compute, tmp_path)
    looked = []
    monkeypatch.setattr(validator, "judge", lambda base, adapted: looked.append(adapted) or {})
    monkeypatch.setattr(validator, "predicted_gain", lambda scores: 1.0)
    state = fresh_state(
        upstep_config(**{**options, "data": ("",), "out": "", "adapter_ema": 0.9, "memory": "fast"}),
        compute,
        backbone.load(options["model"]),
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p in state.method.adapter_parameters():
            p.data.normal_(generator=generator)
        state.method.after_update(torch.tensor(True))
    judge.validate(state)
    vit = upstep_fast.load_adapted(options["model"], tmp_path / validator.BEST, merged=False)
    torch.testing.assert_close(looked[0], judge._features(vit), rtol=1e-4, atol=1e-5)
    last = judge._features(state.method.vit)
    assert not torch.allclose(looked[0], last, rtol=1e-2)


def test_explora_dinov2_saves_the_teacher(options):
    config = from_flat(Dinov2Config, **{**options, "data": ("",), "out": "", "prototypes": 16, "memory": "fast"})
    method = fresh_state(config, resolve("cpu", "fp32"), backbone.load(options["model"])).method
    with method.weights_to_save() as vit:
        assert vit is method.teacher


def test_wrong_values_raise_one_line(options):
    for value in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=f"adapter_ema: got {value}, must be at least 0 and below 1"):
            upstep_fast.adapt(**options | {"adapter_ema": value})
    with pytest.raises(ConfigError, match="adapter_ema: belongs to --method upstep"):
        upstep_fast.adapt(**options | {"adapter_ema": 0.9, "method": "explora"})
