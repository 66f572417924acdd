"""The loop: schedule, gate, skipped steps, non-finite steps, layouts, interruption, what is written."""

import json
import math
import signal

import pytest
import torch
from adapt_configs import upstep_config

import upstep_fast
from upstep_fast.config.resolve import resolve as resolve_length
from upstep_fast.data.views.types import Views
from upstep_fast.errors import CheckFailedError, ConfigError, Interrupted, RunFailedError
from upstep_fast.methods import gate, registry
from upstep_fast.methods.schedules import warmup_cosine
from upstep_fast.methods.upstep.upstep import UpStep
from upstep_fast.model import backbone, lora, peft_format, pooling
from upstep_fast.runtime.device import resolve
from upstep_fast.train import state as run_state
from upstep_fast.train import step as steps
from upstep_fast.train.state import fresh_state


@pytest.fixture
def options(options):
    return options | dict(memory_check=False)  # the check counts a step, whose calls the tests here would count too


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_what_is_promised(options, tmp_path):
    result = upstep_fast.adapt(**options, gate="alternate")
    out = tmp_path / "out"
    for name in (
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "config.toml",
        "skipped.csv",
    ):
        assert (out / name).is_file(), name
    written = rows(out)
    assert [row["step"] for row in written] == list(range(6))
    assert [row["open"] for row in written] == [True, False] * 3
    for row in written:
        assert (row["loss"] is None) != row["open"]
        assert {"step", "loss", "center", "open", "lr", "images_per_s", "data_wait"} <= row.keys()
    assert (result.steps, result.opened) == (6, 3)
    adapted = upstep_fast.load_adapted(options["model"], result.adapter)
    base = backbone.load(options["model"]).vit
    x = torch.randn(2, 3, 32, 32)
    assert (pooling.features(adapted, x) - pooling.features(base, x)).abs().max() > 1e-5


def test_schedule_is_linear_then_cosine():
    factors = [warmup_cosine(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11) and factors[9] == pytest.approx(10 / 11) and factors[10] == 1
    assert factors[55] == pytest.approx(0.5) and factors[99] < 1e-3
    assert factors[:11] == sorted(set(factors[:11]))
    assert [warmup_cosine(s, 100, 10) for s in range(100)] == factors
    assert warmup_cosine(0, 1, 0.0) == 1


@pytest.mark.parametrize("extra", [{}, {"gate": "views"}, {"layout": "asymmetric"}, {"precision": "bf16"}])
def test_the_same_seed_gives_the_same_adapter(options, tmp_path, extra):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        upstep_fast.adapt(**{**options, **extra, "out": tmp_path / name, "seed": seed})
    a, b, c = ((tmp_path / name / "adapter" / peft_format.WEIGHTS).read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("cvr", ["off", "sq", "norm", "anchor", "hinge", "ema"])
@pytest.mark.parametrize("layout", ["symmetric", "asymmetric"])
def test_every_penalty_runs_in_both_layouts(options, cvr, layout):
    assert math.isfinite(upstep_fast.adapt(**{**options, "steps": 3}, cvr=cvr, layout=layout, gate="none").loss)


def test_a_lean_run_is_a_fast_run(options, tmp_path):
    for memory in ("fast", "lean"):
        upstep_fast.adapt(**{**options, "out": tmp_path / memory}, memory=memory, gate="none")
    fast, lean = ((tmp_path / name / "adapter" / peft_format.WEIGHTS).read_bytes() for name in ("fast", "lean"))
    assert fast == lean


@pytest.mark.parametrize("prototype_init", ["random", "orthogonal", "kmeans", "learned"])
@pytest.mark.parametrize("head", ["mlp", "linear", "none"])
def test_every_prototype_form_runs_with_every_head(options, prototype_init, head):
    result = upstep_fast.adapt(**{**options, "steps": 3}, prototype_init=prototype_init, head=head, gate="none")
    assert math.isfinite(result.loss)


@pytest.mark.parametrize("rule", ["none", "prev", "ema", "median", "quantile", "views", "random", "alternate"])
def test_every_gate_runs(options, tmp_path, rule):
    result = upstep_fast.adapt(**options, gate=rule)
    assert result.opened == sum(row["open"] for row in rows(tmp_path / "out"))


def build(options, **extra):
    config = upstep_config(**{**options, "data": ("d",), "out": "o", **extra})
    method = UpStep(backbone.load(options["model"]), config)
    return config, method


def test_only_adapters_and_head_learn(options):
    _, method = build(options)
    learning = {name for name, p in method.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in name or name.startswith("head.") for name in learning)
    assert "prototypes" in dict(method.named_buffers())


def test_a_skipped_step_does_no_backward_and_leaves_the_optimizer_alone(options, monkeypatch):
    seen = []
    real = steps.update

    def spy(loss, state, config):
        applied, optimizer = real(loss, state, config), state.optimizer
        seen.append({id(p): float(optimizer.state[p]["step"]) for g in optimizer.param_groups for p in g["params"]})
        return applied

    monkeypatch.setattr(steps, "update", spy)
    backwards = []
    monkeypatch.setattr(
        torch.Tensor,
        "backward",
        lambda self, *a, _b=torch.Tensor.backward, **k: (backwards.append(1), _b(self, *a, **k))[1],
    )
    upstep_fast.adapt(**{**options, "steps": 9}, gate="alternate")
    assert len(seen) == len(backwards) == 5
    # AdamW's own count of steps equals the open ones, so skipped steps did not touch its moments
    assert set(seen[-1].values()) == {5.0}


@pytest.mark.parametrize("layout", ["symmetric", "asymmetric"])
def test_a_closed_step_keeps_no_graph(options, layout):
    config, _ = build(options, layout=layout)
    compute = resolve("cpu", "fp32")
    state = fresh_state(config, compute, backbone.load(config.model.name))
    state.gate = gate.GateState(step=1, reference=-1.0)
    images = Views.of(torch.randn(2, 4, 3, 32, 32))
    is_open, learning, _, _ = steps.forward(state, images, gate.GateRule("ema"), config, compute)
    assert not is_open and not learning.z.requires_grad and not learning.center.requires_grad
    is_open, learning, target, _ = steps.forward(state, images, gate.GateRule("none"), config, compute)
    assert is_open and learning.z.requires_grad
    assert (target is None) == (layout == "symmetric") and (target is None or not target.z.requires_grad)


def test_a_gate_known_ahead_runs_its_skipped_steps_without_gradients(options):
    config, _ = build(options)
    compute, recorded = resolve("cpu", "fp32"), []
    state = fresh_state(config, compute, backbone.load(config.model.name))
    method, real = state.method, state.method.embed
    method.embed = lambda views: (recorded.append(torch.is_grad_enabled()), real(views))[1]
    images = Views.of(torch.randn(2, 4, 3, 32, 32))
    for _ in range(4):
        *_, state.gate = steps.forward(state, images, gate.GateRule("alternate"), config, compute)
    assert recorded == [True, False, True, False]


def run_with_embeddings_counted(options, monkeypatch, out, **extra):
    """Runs adapt; returns the steps whose views were embedded, its rows, and its adapter's bytes."""
    embedded, real = [], UpStep.embed
    monkeypatch.setattr(UpStep, "embed", lambda self, views: (embedded.append(len(views)), real(self, views))[1])
    upstep_fast.adapt(**{**options, "out": out, **extra})
    monkeypatch.setattr(UpStep, "embed", real)
    return len(embedded), rows(out), (out / "adapter" / peft_format.WEIGHTS).read_bytes()


@pytest.mark.parametrize("extra", [{"gate": "alternate"}, {"gate": "random"}, {"gate": "alternate", "cvr": "ema"}])
def test_a_step_known_ahead_to_be_skipped_computes_nothing_unless_the_penalty_follows_it(
    options, monkeypatch, tmp_path, extra
):
    extra = {"layout": "asymmetric", "seed": 1} | extra if extra["gate"] == "random" else extra
    num, now, adapter = run_with_embeddings_counted(options, monkeypatch, tmp_path / "now", **extra)
    monkeypatch.setattr(UpStep, "follows_skipped_steps", True)
    num_all, then, same_adapter = run_with_embeddings_counted(options, monkeypatch, tmp_path / "then", **extra)
    is_open = [row["open"] for row in now]
    assert adapter == same_adapter and is_open == [row["open"] for row in then] and not all(is_open)
    assert [row["loss"] for row in now] == [row["loss"] for row in then]
    assert all(row["center"] is not None for row in then)
    per_update, follows = (2 if "layout" in extra else 1), "cvr" in extra
    assert num_all == 6 + sum(is_open) * (per_update - 1)
    assert num == (num_all if follows else per_update * sum(is_open))
    assert [row["center"] is not None for row in now] == [follows or opened for opened in is_open]


def poison(monkeypatch, bad_steps):
    """Makes the loss of the given open steps NaN."""
    real, count = UpStep.loss, iter(range(10**6))
    monkeypatch.setattr(UpStep, "loss", lambda self, *a: real(self, *a) * (math.nan if next(count) in bad_steps else 1))


def test_a_nan_step_is_not_applied(options, monkeypatch, tmp_path, caplog):
    poison(monkeypatch, {1, 2, 4})
    result = upstep_fast.adapt(**options, gate="none")
    assert (result.steps, result.opened) == (6, 6)
    assert [row["loss"] is None for row in rows(tmp_path / "out")] == [False, True, True, False, True, False]


def test_three_nan_steps_in_a_row_stop_the_run_with_the_last_good_adapter(options, monkeypatch, tmp_path):
    upstep_fast.adapt(**{**options, "steps": 6, "out": tmp_path / "good"}, gate="none")
    kept = {}
    real = steps.update

    def spy(loss, state, config):
        applied = real(loss, state, config)
        if math.isfinite(loss.item()):
            kept["b"] = [a.lora_b.detach().clone() for a in state.method.adapters.values()]
        return applied

    monkeypatch.setattr(steps, "update", spy)
    poison(monkeypatch, {2, 3, 4})
    with pytest.raises(RunFailedError, match="3 steps in a row") as error:
        upstep_fast.adapt(**options, gate="none")
    assert error.value.exit_code == 1
    saved = upstep_fast.load_adapted(options["model"], tmp_path / "out" / "adapter", merged=False)
    assert all(a.lora_b.isfinite().all() for a in lora.find(saved).values())
    for adapter, b in zip(lora.find(saved).values(), kept["b"], strict=True):
        width, r = b.shape[1:]
        assert torch.equal(adapter.lora_b[0, :width, :r], b[0])


def test_a_stop_signal_leaves_a_loadable_adapter(options, tmp_path, monkeypatch):
    real = UpStep.update_running_stats
    count = iter(range(100))

    def interrupt(self, embedded):
        if next(count) == 2:
            signal.raise_signal(signal.SIGTERM)
        real(self, embedded)

    monkeypatch.setattr(UpStep, "update_running_stats", interrupt)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="after 3 of 6 steps") as stop:
        upstep_fast.adapt(**options, gate="none")
    assert stop.value.exit_code == 75 and signal.getsignal(signal.SIGTERM) is before
    upstep_fast.load_adapted(options["model"], tmp_path / "out" / "adapter")
    assert len(rows(tmp_path / "out")) == 3


def test_the_adapter_check_detects_an_adapter_without_gradient(options, monkeypatch, tmp_path):
    real = registry.make_optimizer

    def without_block_1(method, config):
        for name, adapter in method.adapters.items():
            adapter.requires_grad_(not name.startswith("blocks.1"))
            adapter.base.requires_grad_(False)
        for adapter in method.adapters.values():
            adapter.lora_b.grad = torch.zeros_like(adapter.lora_b)
        return real(method, config)

    monkeypatch.setattr(run_state, "make_optimizer", without_block_1)
    monkeypatch.setattr(
        torch.optim.AdamW,
        "zero_grad",
        lambda self, set_to_none=True: [
            p.grad.zero_() for g in self.param_groups for p in g["params"] if p.grad is not None
        ],
    )
    with pytest.raises(CheckFailedError, match=r"blocks\.1\.attn\.qkv never received a gradient") as error:
        upstep_fast.adapt(**options, gate="none")
    assert error.value.exit_code == 4


def test_the_adapter_check_detects_zeros(options, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    with pytest.raises(CheckFailedError, match="all zero"):
        upstep_fast.adapt(**options, gate="none")


def test_small_data_reduces_batch_and_prototypes_with_a_warning(options, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="upstep_fast"):
        upstep_fast.adapt(**{**options, "batch_size": 64, "prototypes": 300, "steps": 2})
    text = (tmp_path / "out" / "config.toml").read_text()
    assert "batch_size = 24\n" in text and "prototypes = 24\n" in text
    assert "reduced from 64 to the 24" in caplog.text and "reduced from 300 to the 24" in caplog.text


def test_a_non_empty_out_is_left_alone(options, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not empty"):
        upstep_fast.adapt(**options)
    with pytest.raises(ConfigError, match="no run of upstep-fast"):
        upstep_fast.adapt(**options, overwrite=True)
    assert (out / "thesis.txt").read_text() == "years of work"


def test_overwrite_replaces_an_earlier_run(options, tmp_path):
    upstep_fast.adapt(**{**options, "steps": 3})
    with pytest.raises(ConfigError, match="not empty"):
        upstep_fast.adapt(**options)
    assert len(rows(tmp_path / "out")) == 3
    upstep_fast.adapt(**options, overwrite=True)
    assert len(rows(tmp_path / "out")) == 6


def test_length_by_epochs_and_by_default(options):
    config = upstep_config(**{**options, "data": ("d",), "out": "o", "steps": None})
    assert resolve_length(config, 24).config.optimization.steps == 90
    assert resolve_length(config, 8000).config.optimization.steps == 10_000
    by_epochs = upstep_config(**{**options, "data": ("d",), "out": "o", "steps": None, "epochs": 2.5})
    assert resolve_length(by_epochs, 80).config.optimization.steps == 25


def test_the_global_random_state_is_the_callers(options):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    upstep_fast.adapt(**options)
    assert torch.equal(torch.rand(3), expected)


def test_the_engine_sees_every_step_of_the_optimizer(options, monkeypatch):
    # the fused optimizer moves no version counter; without help the engine would go on with the first weights
    real, differences = UpStep.embed, []

    def embed(self, views):
        found = real(self, views)
        pictures = torch.cat([self.first_view(views[v : v + 1]) for v in range(2)])
        plain = self.head(pooling.features(self.vit, pictures)).view(2, views.num_images, -1)
        differences.append((found.z - torch.nn.functional.normalize(plain, dim=-1)).abs().max().item())
        return found

    monkeypatch.setattr(UpStep, "embed", embed)
    upstep_fast.adapt(**options | {"lr": 1e-1}, gate="none")
    assert len(differences) == 6 and max(differences) < 1e-4


@pytest.mark.parametrize("every", [1, 2, 100])
def test_a_collapse_that_passes_is_warned_of_once_and_stands_in_its_rows(options, monkeypatch, tmp_path, caplog, every):
    # a step after which a checkpoint is saved is read with the one before it
    monkeypatch.setattr(UpStep, "collapsed", lambda self, row: "gone" if row["step"] in (3, 4) else None)
    with caplog.at_level("WARNING", logger="upstep_fast"):
        upstep_fast.adapt(**options, gate="none", checkpoint_every=every)
    assert [message for message in caplog.messages if "collapse" in message] == ["step 3: collapse: gone"]
    assert [row["step"] for row in rows(tmp_path / "out") if "collapsed" in row] == [3, 4]
