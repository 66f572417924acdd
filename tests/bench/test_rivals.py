"""Time to gain and its rivals: SimCLR's loss against its definition in float64, and the gains of a row."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCH / "quality"), *sys.path])


def info_nce(a, b, temperature):
    """Chen et al. 2020, equation 1, in float64: one pair after the other."""
    z = np.concatenate([a, b])
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    total, num = 0.0, len(a)
    for i in range(2 * num):
        other = (i + num) % (2 * num)
        rest = sum(np.exp(z[i] @ z[k] / temperature) for k in range(2 * num) if k != i)
        total -= np.log(np.exp(z[i] @ z[other] / temperature) / rest)
    return total / (2 * num)


def test_simclr_is_its_definition_in_float64(quality):
    import plain_peft

    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(7, 5, generator=g).requires_grad_() for _ in range(2))
    loss = plain_peft.simclr((a, b), 0.3)
    x, y = a.detach().double().numpy(), b.detach().double().numpy()
    assert loss.item() == pytest.approx(info_nce(x, y, 0.3), rel=1e-6)
    loss.backward()
    for of, at in ((0, (3, 2)), (1, (6, 4))):  # central differences of two entries
        moved = [x.copy(), y.copy()]
        moved[of][at] += 1e-6
        up = info_nce(*moved, 0.3)
        moved[of][at] -= 2e-6
        assert (a, b)[of].grad[at].item() == pytest.approx((up - info_nce(*moved, 0.3)) / 2e-6, rel=1e-4)


def test_gains_are_points_over_the_plain_base_features(quality):
    import time_to_gain

    forms = {"base": (60.0, 67.5), "adapted": (65.25, 70.0), "ensemble": (59.0, 66.0)}
    scores = {name: {"knn": plain, "knn_whitened": whitened} for name, (plain, whitened) in forms.items()}
    assert time_to_gain.gains(scores) == {
        **{"base whitened": 7.5, "adapted": 5.25, "adapted whitened": 10.0},
        **{"ensemble": -1.0, "ensemble whitened": 6.0},
    }
