"""VICReg's objective: float64 by hand, closed forms, and what it refuses."""

import json
import math

import numpy as np
import pytest
import torch

import upstep_fast
from upstep_fast.errors import ConfigError
from upstep_fast.methods.losses.vicreg import vicreg_loss


def by_numpy(a, b):
    """VICReg of two [B, d] float64 arrays, from the authors' definitions."""

    def moments(u):
        c = np.cov(u, rowvar=False)
        std = np.sqrt(np.diag(c) + 1e-4)
        return np.maximum(0, 1 - std).mean(), (c**2).sum() - (np.diag(c) ** 2).sum()

    (v, c), (w, e) = moments(a), moments(b)
    return 25 * ((a - b) ** 2).mean() + 25 * (v + w) / 2 + (c + e) / a.shape[1]


@pytest.mark.parametrize("scale", [0.01, 0.7, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_value_and_gradient_against_float64(scale, dtype):
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(40, 6, generator=g).mul(scale).to(dtype).requires_grad_() for _ in range(2))
    loss = vicreg_loss(a, b)
    x, y = a.detach().double().numpy(), b.detach().double().numpy()
    assert loss.item() == pytest.approx(by_numpy(x, y), rel=1e-5)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    loss.backward()
    for of, at in ((0, (3, 2)), (1, (17, 5))):  # central differences of two entries
        step, moved = 1e-6 * scale, [x.copy(), y.copy()]
        moved[of][at] += step
        up = by_numpy(*moved)
        moved[of][at] -= 2 * step
        slope = (up - by_numpy(*moved)) / (2 * step)
        assert (a, b)[of].grad[at].item() == pytest.approx(slope, rel=1e-2 if dtype == torch.bfloat16 else 1e-4)


def test_closed_forms():
    # equal views, orthogonal dimensions of variance 1: nothing is left to learn
    u = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64) * math.sqrt(3 / 4)
    assert vicreg_loss(u, u.clone()).item() == pytest.approx(0, abs=1e-12)
    # all embeddings one point: the variance term alone, at its largest
    one = torch.ones(5, 3, dtype=torch.float64)
    assert vicreg_loss(one, one.clone()).item() == pytest.approx(25 * (1 - math.sqrt(1e-4)))


def test_a_target_without_gradient_has_no_moments():
    a, b = torch.randn(20, 4, requires_grad=True), torch.zeros(20, 4)
    alone = vicreg_loss(a, b)
    both = vicreg_loss(a, b.clone().requires_grad_())
    x = a.detach().double().numpy()
    c = np.cov(x, rowvar=False)
    expected = 25 * (x**2).mean() + 25 * np.maximum(0, 1 - np.sqrt(np.diag(c) + 1e-4)).mean()
    expected += ((c**2).sum() - (np.diag(c) ** 2).sum()) / 4
    assert alone.item() == pytest.approx(expected, rel=1e-5)
    assert both.item() > alone.item()


@pytest.mark.parametrize("extra", [{"temperature": 0.2}, {"queue": 8}, {"distil": "feature"}, {"local_views": 2}])
def test_options_of_clustering_are_refused(model, photos, tmp_path, extra):
    with pytest.raises(ConfigError, match=f"{next(iter(extra))}: needs --objective clustering"):
        upstep_fast.adapt(model, photos, tmp_path / "out", objective="vicreg", steps=2, **extra)


def test_training_lowers_the_loss(options):
    options = {name: value for name, value in options.items() if name not in ("prototypes", "head_hidden", "head_dim")}
    own = dict(objective="vicreg", steps=20, batch_size=12, lr=1e-2, gate="none", cvr="off", verdict="off")
    upstep_fast.adapt(**options | own | {"whitening": "off", "report_images": False})
    losses = [json.loads(line)["loss"] for line in (options["out"] / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 20 and np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
