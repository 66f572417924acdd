"""Distances from the base model, and sharpened targets, against float64 and closed forms."""

import math

import pytest
import torch

from upstep_fast.methods.losses.distillation import distillation_loss, sharpen


def draw(num, width, seed):
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed))


def test_the_base_itself_costs_nothing_and_off_costs_nothing():
    f = draw(6, 5, 0)
    for form in ("feature", "relational"):
        assert distillation_loss(form, 3 * f, f, 0.1).item() == pytest.approx(0, abs=1e-6)
    assert distillation_loss("off", draw(6, 5, 1), f, 0.1).item() == 0


def test_feature_distance_of_orthogonal_and_opposite_features():
    f = torch.eye(4)
    assert distillation_loss("feature", f, f.roll(1, 0), 0.1).item() == pytest.approx(1)
    assert distillation_loss("feature", f, -f, 0.1).item() == pytest.approx(2)


def test_relations_do_not_see_a_rotation():
    f = draw(7, 5, 0)
    turned = f @ torch.linalg.qr(draw(5, 5, 1))[0]
    assert distillation_loss("relational", turned, f, 0.1).item() == pytest.approx(0, abs=1e-5)
    assert distillation_loss("feature", turned, f, 0.1).item() > 0.1


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_relational_distance_is_the_kl_divergence(temperature):
    f, g = draw(6, 5, 0).double(), draw(6, 5, 1).double()
    f, g = f / f.norm(dim=1, keepdim=True), g / g.norm(dim=1, keepdim=True)
    expected = 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        p, q = (torch.stack([x[i] @ x[j] for j in others]).div(temperature).exp() for x in (f, g))
        p, q = p / p.sum(), q / q.sum()
        expected += sum(float(q[j] * math.log(q[j] / p[j])) for j in range(5)) / 6
    assert distillation_loss("relational", f, g, temperature).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", ["feature", "relational"])
def test_only_the_adapted_side_learns_and_going_down_brings_it_back(form):
    g = draw(8, 5, 1).requires_grad_()
    f = (g.detach() + 0.5 * draw(8, 5, 2)).requires_grad_()
    before = distillation_loss(form, f, g, 0.2)
    before.backward()
    assert g.grad is None
    after = distillation_loss(form, f.detach() - 0.05 * f.grad / f.grad.norm(), g, 0.2)
    assert after.item() < before.item()


def test_sharpening():
    q = torch.tensor([[0.5, 0.25, 0.25]])
    assert sharpen(q, 1) is q
    assert torch.allclose(sharpen(q, 2), torch.tensor([[2 / 3, 1 / 6, 1 / 6]]))
    assert sharpen(q, 60)[0, 0].item() == pytest.approx(1)
    assert torch.allclose(sharpen(torch.full((2, 4), 0.25), 4), torch.full((2, 4), 0.25))
