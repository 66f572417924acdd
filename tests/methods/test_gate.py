"""The gate's rules against a simulation (METHODS 1.6) and against their definitions."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from upstep_fast.methods.gate import GateRule, GateState, decide, known_ahead, select_images


def simulate(rule: GateRule, drift: float = 0.0, steps: int = 4000, noise: float = 0.01) -> list[bool]:
    """Open or not at each step, for a magnitude that drifts by `drift` over the run under noise."""
    random = np.random.default_rng(1)
    state, opened = GateState(), []
    for t in range(steps):
        views = 0.5 + drift * t / steps + noise * random.standard_normal(3)
        is_open, state = decide(rule, state, views.tolist())
        opened.append(is_open)
    return opened


def skip_rate(rule: GateRule, drift: float = 0.0) -> float:
    return 1 - float(np.mean(simulate(rule, drift)))


# the table of METHODS 1.6 was simulated by others; skipped there means m < reference, so direction "high"
@pytest.mark.parametrize(
    ("rule", "drift", "expected"),
    [
        ("prev", 0.0, 0.50),
        ("prev", -0.2, 0.50),
        ("ema", 0.0, 0.50),
        ("ema", -0.2, 0.52),
        ("ema", 0.1, 0.49),
        ("median", 0.0, 0.50),
        ("median", -0.2, 0.56),
        ("median", 0.1, 0.47),
        ("views", -0.2, 0.50),
        ("random", 0.0, 0.50),
        ("alternate", 0.0, 0.50),
    ],
)
def test_skip_rate_of_each_rule(rule, drift, expected):
    assert skip_rate(GateRule(rule, update_when="high", max_skips=10**6), drift) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("rule", ["ema", "median"])
def test_direction_low_is_the_complement_of_high(rule):
    low = simulate(GateRule(rule, update_when="low", max_skips=10**6), drift=-0.2)
    high = simulate(GateRule(rule, update_when="high", max_skips=10**6), drift=-0.2)
    assert all(a != b for a, b in zip(low[1:], high[1:], strict=True))


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("rule", ["quantile", "random", "alternate"])
@pytest.mark.parametrize("update_when", ["low", "high"])
def test_target_rate_is_realized(rule, rate, update_when):
    for drift in (0.0, -0.05):
        realized = 1 - skip_rate(GateRule(rule, update_when=update_when, rate=rate, max_skips=10**6), drift)
        assert realized == pytest.approx(rate, abs=0.06)


@pytest.mark.parametrize("update_when", ["low", "high"])
@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_the_quantile_keeps_its_rate_while_the_center_falls(rate, update_when):
    """From .6 to .1 along an exponential, METHODS section 6; in each hundred steps, not only in all."""
    random = np.random.default_rng(0)
    rule, state, opened = GateRule("quantile", update_when=update_when, rate=rate), GateState(), []
    for t in range(300):
        is_open, state = decide(rule, state, (0.1 + 0.5 * math.exp(-t / 60) + 0.01 * random.standard_normal(),))
        opened.append(is_open)
    assert sum(opened) / 300 == pytest.approx(rate, abs=0.02)
    for start in (0, 100, 200):
        assert sum(opened[start : start + 100]) / 100 == pytest.approx(rate, abs=0.08)


@pytest.mark.parametrize(
    "options",
    [
        {"rate": 0.05, "max_skips": 16},  # forced open more often than the rate allows
        {"rate": 0.5, "max_skips": 1},
        {"rate": 0.33, "max_skips": 2, "update_when": "high"},
        {"rate": 1.0},
        {"rate": 0.0},
    ],
)
def test_the_quantiles_threshold_stays_near_the_magnitudes(options):
    random = np.random.default_rng(0)
    rule, state, opened = GateRule("quantile", **options), GateState(), []
    for t in range(6000):
        m = math.nan if 1000 < t < 1300 else 0.3 + 0.01 * random.standard_normal()
        is_open, state = decide(rule, state, (m,))
        opened.append(is_open)
        # 0 and 1 are no quantiles: there it moves away, but by no more than a spread a step
        assert abs(state.reference - 0.3) < (0.1 if 0 < rule.rate < 1 else 0.025 * (t + 1)) and abs(state.debt) <= 20
    assert not any(opened[1001:1300])
    after, forced = sum(opened[1400:]) / len(opened[1400:]), 1 / (rule.max_skips + 1)
    assert max(rule.rate, forced) - 0.03 < after < min(1, rule.rate + forced) + 0.03


def test_reference_is_constant_when_the_gate_chooses_images():
    rule, state = GateRule("quantile", unit="image"), GateState()
    for m in np.random.default_rng(0).normal(0.3, 0.01, 1000):
        is_open, state = decide(rule, state, (m,))
        assert is_open
    assert state == GateState(step=1000, num_updates=1000)


def test_none_never_skips():
    assert all(simulate(GateRule("none"), steps=100))


def test_first_step_updates_for_every_rule():
    for rule in ("none", "prev", "ema", "median", "quantile", "views", "random", "alternate"):
        assert decide(GateRule(rule, rate=0.0), GateState(), (0.5, 0.9, 0.1))[0], rule


def test_update_is_forced_after_max_skips():
    rule = GateRule("ema", update_when="low", max_skips=16)
    state, opened = GateState(), []
    for t in range(60):  # a magnitude that only grows lies above its running mean: the rule alone would never open
        is_open, state = decide(rule, state, (1.0 + t,))
        opened.append(is_open)
    assert [t for t, is_open in enumerate(opened) if is_open] == [0, 17, 34, 51]
    assert state.num_updates == 4 and state.step == 60


def test_views_compares_the_two_views():
    rule, state = GateRule("views", update_when="low"), GateState(step=1)
    assert decide(rule, state, (0.9, 0.1, 0.2))[0]
    assert not decide(rule, state, (0.9, 0.2, 0.1))[0]


def test_reference_is_updated_on_skipped_steps():
    rule = GateRule("prev", update_when="low")
    _, state = decide(rule, GateState(), (0.5,))
    skipped, state = decide(rule, state, (0.7,))
    assert not skipped and state.reference == 0.7
    assert decide(rule, state, (0.6,))[0]  # below 0.7, though above the 0.5 of the last open step


def test_ema_reference_is_the_closed_form():
    rule, state, values = GateRule("ema", beta=0.9), GateState(), [0.5, 0.3, 0.8, 0.1]
    for m in values:
        _, state = decide(rule, state, (m,))
    expected = values[0] * 0.9**3 + 0.1 * sum(m * 0.9 ** (3 - i) for i, m in enumerate(values) if i)
    assert state.reference == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_magnitude_skips_and_leaves_the_reference(bad):
    for rule in ("none", "ema", "random"):
        _, state = decide(GateRule(rule), GateState(), (0.5,))
        is_open, after = decide(GateRule(rule), state, (bad,))
        assert not is_open and after.reference == state.reference and after.step == 2


def test_known_ahead_agrees_with_the_decision():
    for name in ("none", "random", "alternate"):
        rule, state = GateRule(name, rate=0.3, seed=5), GateState()
        for _ in range(200):
            ahead = known_ahead(rule, state)
            is_open, state = decide(rule, state, (0.5,))
            assert ahead == is_open
    assert known_ahead(GateRule("ema"), GateState()) is None


def test_random_depends_on_seed_and_step_only():
    same = simulate(GateRule("random", seed=3), steps=200), simulate(GateRule("random", seed=3), steps=200)
    assert same[0] == same[1] != simulate(GateRule("random", seed=4), steps=200)


def test_state_round_trips_through_json():
    rule, state = GateRule("median"), GateState()
    for m in (0.5, 0.4, 0.6):
        _, state = decide(rule, state, (m,))
    again = GateState.from_dict(json.loads(json.dumps(state.to_dict())))
    assert again == state
    assert decide(rule, again, (0.45,)) == decide(rule, state, (0.45,))
    assert replace(again, step=0) != state


def test_selected_images_add_least_or_most_to_the_center():
    added = torch.tensor([0.3, -0.2, 0.9, 0.1, 0.5, 0.0])
    assert select_images("quantile", added, 0.5, "low", 0, 0).tolist() == [1, 3, 5]
    assert select_images("quantile", added, 0.5, "high", 0, 0).tolist() == [0, 2, 4]
    assert select_images("quantile", added, 1.0, "low", 0, 0).tolist() == list(range(6))
    assert select_images("quantile", added, 0.0, "low", 0, 0).tolist() == [1]


def test_random_selection_depends_on_seed_and_step_and_covers_all_images():
    draws = [select_images("random", torch.zeros(10), 0.4, "low", 0, step) for step in range(500)]
    again = select_images("random", torch.rand(10), 0.4, "high", 0, 7)
    assert draws[7].tolist() == again.tolist() != select_images("random", torch.zeros(10), 0.4, "low", 1, 7).tolist()
    counts = torch.bincount(torch.cat(draws), minlength=10)
    assert all(len(set(d.tolist())) == 4 for d in draws)
    # 200 of 500 expected, one standard deviation is 11
    assert (counts - 200).abs().max() < 50


def test_every_step_updates_when_the_gate_chooses_images():
    rule, state = GateRule("quantile", unit="image"), GateState()
    for m in (0.5, 0.9, 0.1, 0.9):
        is_open, state = decide(rule, state, (m,))
        assert is_open


def test_replay_of_a_rule_on_a_recorded_run(bench, tmp_path, monkeypatch, capsys):
    rates = bench("gate_rates")
    rows = [{"step": t, "center": None if t == 3 else 1 / (1 + t)} for t in range(121)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = rates.magnitudes(path)
    assert len(values) == 120 and values[:4] == [1, 1 / 2, 1 / 3, 1 / 5]
    # it only falls: always below the step before
    assert rates.opened(GateRule("prev", update_when="low"), values) == 1
    assert rates.opened(GateRule("prev", update_when="high", max_skips=10**6), values) == 1 / 120
    monkeypatch.setattr("sys.argv", ["gate_rates.py", "--out", str(tmp_path / "r.json"), str(path)])
    rates.main()
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["open"]["alternate low"] == {"min": 0.5, "median": 0.5, "max": 0.5}
    assert len(found["magnitudes"][tmp_path.name]) == 120
