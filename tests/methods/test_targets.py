"""Additions to UpStep: --queue, --base-targets, --gate-statistic and --cvr-on."""

import json

import pytest
import torch
import torch.nn.functional as F
from adapt_configs import upstep_config
from references.upstep import sinkhorn

import upstep_fast
from upstep_fast.data.views.types import Views
from upstep_fast.errors import ConfigError
from upstep_fast.kernels.sinkhorn import sinkhorn as sinkhorn_op
from upstep_fast.methods import build as build_method
from upstep_fast.methods import gate
from upstep_fast.methods.losses import clustering
from upstep_fast.methods.upstep import upstep
from upstep_fast.model import backbone, pooling
from upstep_fast.runtime.device import resolve
from upstep_fast.train import loop as trainer
from upstep_fast.train import step as steps
from upstep_fast.train.state import fresh_state


@pytest.fixture
def options(options):
    return options | dict(steps=8, gate="none", cvr="off", report_images=False)


def build(options, **changes):
    """A method whose adapters are far from the base model."""
    config = upstep_config(**{**options, "data": ("",), "out": "", **changes})
    method = build_method(backbone.load(options["model"]), config)
    with torch.no_grad():
        for adapter in method.adapters.values():
            adapter.lora_b.normal_(generator=torch.Generator().manual_seed(1))
    return method


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assigned(z, method, *more):
    """float64 targets of each view of z, balanced over `more` rows too."""
    prototypes = F.normalize(method.prototypes.double(), dim=-1)
    rows = [torch.cat([view, *(x[v] for x in more)]).double() for v, view in enumerate(z)]
    c = method.config.objective
    return torch.stack(
        [sinkhorn(r @ prototypes.T, c.epsilon, c.sinkhorn_iterations)[: z.shape[1]] for r in rows]
    ), prototypes


def swapped(z, q, prototypes, temperature=0.1):
    """The mean over both views of the cross-entropy with the other's targets, in float64."""
    log_p = ((z.double() @ prototypes.T) / temperature).log_softmax(-1)
    return -(q[0] * log_p[1] + q[1] * log_p[0]).sum(-1).mean() / 2


def test_one_sinkhorn_call_equals_one_per_view(options, monkeypatch):
    def trajectory(out):
        upstep_fast.adapt(**options | {"out": options["out"] / out})
        lines = (options["out"] / out / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    calls = []

    def counted(scores, *args, **kwargs):
        calls.append(scores.shape)
        return sinkhorn_op(scores, *args, **kwargs)

    monkeypatch.setattr(upstep, "sinkhorn", counted)
    together = trajectory("together")
    assert set(calls) == {(2, 8, 8)}
    monkeypatch.setattr(upstep, "sinkhorn", lambda s, *a, **k: torch.stack([sinkhorn_op(view, *a, **k) for view in s]))
    assert together == pytest.approx(trajectory("each"), rel=1e-5)


def test_targets_are_balanced_over_the_queue_and_the_loss_is_the_batchs(options):
    method = build(options, queue=20)
    queue = F.normalize(draw(2, 20, 16, seed=3), dim=-1)
    method.queue.copy_(queue)
    learning = method.embed(Views.of(draw(2, 6, 3, 32, 32)))
    q, prototypes = assigned(learning.z.detach(), method, queue)
    assert method.loss(learning).item() == pytest.approx(swapped(learning.z, q, prototypes).item(), rel=1e-5)
    alone, _ = assigned(learning.z.detach(), method)
    assert (q - alone).abs().max() > 0.05


@pytest.mark.parametrize("layout", ["symmetric", "asymmetric"])
def test_queue_starts_full_and_takes_embeddings_of_update_steps(options, layout):
    config = upstep_config(**{**options, "data": ("",), "out": "", "layout": layout, "queue": 10, "gate": "alternate"})
    state = fresh_state(config, compute := resolve("cpu", "fp32"), backbone.load(options["model"]))
    method, views = state.method, 2 if layout == "symmetric" else 1
    assert method.needs_init
    first = [Views.of(draw(2, 8, 3, 32, 32, seed=seed)) for seed in (0, 1)]
    method.initialize_from_data(iter(first))
    with torch.no_grad():
        z = torch.cat([method.embed(x).z for x in first], 1)
    torch.testing.assert_close(method.queue, z[:views, :10])
    for number in range(3):  # open, closed, open
        before, x = method.queue.clone(), Views.of(draw(2, 4, 3, 32, 32, seed=10 + number))
        with torch.no_grad():
            z = method.embed(x).z[:views]
        row = steps.step(state, x, trainer.gate_rule(config), config, compute)
        assert row["open"] == (number != 1)
        expected = torch.cat([z, before], 1)[:, :10] if row["open"] else before
        torch.testing.assert_close(method.queue, expected)
    assert "queue" in method.state_tensors()


def test_a_small_data_set_shortens_the_queue(options, caplog):
    upstep_fast.adapt(**options | {"steps": 2}, queue=50)
    assert "queue: reduced from 50 to the 24 images there are" in caplog.text


@pytest.mark.parametrize("layout", ["symmetric", "asymmetric"])
def test_base_model_targets_are_blended_in_early(options, layout):
    method = build(options, base_targets=0.5, steps=8, layout=layout)
    base_vit, views = backbone.load(options["model"]).vit, Views.of(draw(2, 6, 3, 32, 32))
    optimizer = torch.optim.SGD(method.adapter_parameters(), lr=0.0)
    losses = []
    for step, share in ((0, 1.0), (1, 0.75), (3, 0.25), (4, 0.0), (7, 0.0)):
        method.schedule(optimizer, step)
        assert method.base_share == share
        with torch.no_grad():
            f = pooling.features(base_vit, views.pixels.flatten(0, 1))
            base = F.normalize(method.head(f), dim=-1).view(2, 6, -1)
        both = method.embed(views)
        z = both.z.detach()
        q, prototypes = assigned(z, method)
        q = (1 - share) * q + share * assigned(base, method)[0]
        torch.testing.assert_close(q.sum(-1), torch.ones(2, 6, dtype=q.dtype))
        if layout == "symmetric":
            losses.append(method.loss(both).item())
            expected = swapped(z, q, prototypes)
        else:
            losses.append(method.loss(method.embed(views[1:]), method.embed(views[:1])).item())
            expected = -(q[0] * ((z[1].double() @ prototypes.T) / 0.1).log_softmax(-1)).sum(-1).mean()
        assert losses[-1] == pytest.approx(expected.item(), rel=1e-5)
    assert max(losses) - min(losses) > 0.01 and losses[-1] == losses[-2]


def test_disagreement_of_equal_orthogonal_and_opposite_views():
    z = torch.eye(4)
    for other, expected in ((z, 0), (z.roll(1, 0), 1), (-z, 2)):
        assert clustering.disagreement(torch.stack([z, other])).item() == pytest.approx(expected)


def test_the_loss_as_statistic_is_the_clustering_loss(options):
    method = build(options, gate_statistic="loss", gate="ema")
    learning = method.embed(Views.of(draw(2, 6, 3, 32, 32)))
    found = method.with_global_stats(learning, learning.local_stats)
    q, prototypes = assigned(learning.z.detach(), method)
    assert found.magnitudes.shape == (4,) and not found.magnitudes.requires_grad
    assert found.magnitudes[3].item() == pytest.approx(swapped(learning.z, q, prototypes).item(), rel=1e-5)
    assert found.magnitudes[0].item() == pytest.approx(learning.z.mean((0, 1)).norm().item(), rel=1e-5)


@pytest.mark.parametrize("when", ["low", "high"])
def test_the_gate_compares_the_statistic_it_was_given(when):
    rule, state, opened = gate.GateRule("prev", when, statistic="disagreement"), gate.GateState(), []
    for center, value in ((0.5, 0.3), (0.4, 0.6), (0.6, 0.2), (0.5, 0.1)):
        is_open, state = gate.decide(rule, state, (center, center, center, value))
        opened.append(is_open)
        assert state.reference == value
    assert opened == {"low": [True, False, True, True], "high": [True, True, False, False]}[when]
    assert gate.decide(rule, state, (0.5, 0.5, 0.5, float("nan")))[0] is False


@pytest.mark.parametrize("statistic", ["loss", "disagreement"])
def test_run_gated_by_another_statistic_still_logs_the_center(options, tmp_path, statistic):
    centers = []
    for name in (statistic, "center"):
        upstep_fast.adapt(**options | {"out": tmp_path / name, "gate": "prev"}, gate_statistic=name)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        centers.append([row["center"] for row in rows])
    assert centers[0][0] == centers[1][0] and max(centers[0]) <= 1


@pytest.mark.parametrize(
    "wrong", [{"gate": "random"}, {"gate": "views"}, {"gate": "none"}, {"gate": "ema", "layout": "asymmetric"}]
)
def test_statistic_that_no_rule_compares_raises(options, wrong):
    with pytest.raises(ConfigError, match="gate_statistic: loss needs --gate prev, ema, median or quantile, --layout"):
        upstep_fast.adapt(**options | wrong, gate_statistic="loss")


def test_wrong_values_raise_one_line(options):
    for name, value in (("queue", -1), ("base_targets", 1.5)):
        with pytest.raises(ConfigError, match=f"{name}: got {value}"):
            upstep_fast.adapt(**options | {name: value})
        with pytest.raises(ConfigError, match=f"{name}: belongs to --method upstep"):
            upstep_fast.adapt(**options | {name: 1, "method": "explora", "cvr": "sq"})


@pytest.mark.parametrize(("form", "power"), [("sq", 2), ("norm", 1)])
def test_the_penalty_on_features_is_on_their_mean(options, form, power):
    views = Views.of(draw(2, 6, 3, 32, 32))

    def loss(**changes):
        method = build(options, **changes)
        return method.loss(method.embed(views)), method

    plain, method = loss(cvr="off")
    found, penalized = loss(cvr=form, cvr_on="features", cvr_weight=2.0)
    f = F.normalize(pooling.features(method.vit, views.pixels.flatten(0, 1)).double(), dim=-1)
    assert (found - plain).item() == pytest.approx(2 * f.mean(0).norm().item() ** power, rel=1e-4)
    head = [
        torch.autograd.grad(x, list(m.head.parameters()), retain_graph=True)
        for x, m in ((plain, method), (found, penalized))
    ]
    for without, with_it in zip(*head, strict=True):
        assert torch.equal(without, with_it)  # the head has no part in it
    adapters = [torch.autograd.grad(x, m.adapter_parameters()) for x, m in ((plain, method), (found, penalized))]
    assert any(not torch.allclose(a, b) for a, b in zip(*adapters, strict=True))


def test_penalty_on_features_supports_sq_and_norm_only(options):
    with pytest.raises(ConfigError, match="cvr_on: features needs --cvr sq or norm, got anchor"):
        build(options, cvr="anchor", cvr_on="features")


@pytest.mark.parametrize("changes", [{}, {"base_targets": 0.5}, {"queue": 20}])
def test_loss_under_bf16_autocast_follows_the_float64_formula(options, monkeypatch, changes):
    # in bf16 a cosine's rounding, divided by epsilon, would move targets by percents
    method, dtypes = build(options, **changes), []
    original = upstep.sinkhorn
    monkeypatch.setattr(upstep, "sinkhorn", lambda s, *a, **k: dtypes.append(s.dtype) or original(s, *a, **k))
    if "queue" in changes:
        method.queue.copy_(F.normalize(draw(2, 20, 16, seed=3), dim=-1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student = method.embed(Views.of(draw(2, 6, 3, 32, 32)))
        loss = method.loss(student)
    assert set(dtypes) == {torch.float32}
    if "base_targets" not in changes:
        q, prototypes = assigned(student.z.detach(), method, *([method.queue] if "queue" in changes else []))
        assert loss.item() == pytest.approx(swapped(student.z, q, prototypes).item(), rel=1e-5)
