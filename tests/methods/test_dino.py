"""DINO, iBOT, KoLeo and the teacher's targets against loops in float64 and DINOv2's own formulas."""

import math

import numpy as np
import pytest
import torch

from upstep_fast.kernels.sinkhorn import sinkhorn
from upstep_fast.methods import schedules
from upstep_fast.methods.losses import dino


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.mark.parametrize("num_local", [0, 3])
def test_the_class_token_loss_is_the_mean_over_pairs_of_different_views(draw, num_local):
    views, images, prototypes, temperature = 2 + num_local, 4, 5, 0.1
    student, targets = draw(views, images, prototypes), draw(2, images, prototypes).softmax(-1)
    s, t = student.double().numpy(), targets.double().numpy()
    terms = [
        -np.mean([np.sum(t[w, b] * np.log(softmax(s[v, b] / temperature))) for b in range(images)])
        for w in range(2)
        for v in range(views)
        if v != w
    ]
    found = dino.class_token_loss(student, targets, temperature)
    assert len(terms) == 2 * (views - 1)
    assert found.item() == pytest.approx(np.mean(terms), rel=1e-6)


def test_class_token_loss_weights_crops_as_dinov2_does(draw):
    # DINOv2: the local terms' sum and twice the mean of the two global ones, each over (2 n_local + 2) pairs
    student, targets = draw(10, 4, 5).double(), draw(2, 4, 5).softmax(-1).double()

    def cross_entropy(v, w):
        return -(targets[w] * (student[v] / 0.1).log_softmax(-1)).sum(-1).mean()

    local = sum(cross_entropy(v, w) for v in range(2, 10) for w in range(2)) / (16 + 2)
    flat = torch.cat([student[0], student[1]])
    swapped = torch.cat([targets[1], targets[0]])
    whole = -(swapped * (flat / 0.1).log_softmax(-1)).sum(-1).mean() * 2 / (16 + 2)
    assert dino.class_token_loss(student, targets, 0.1).item() == pytest.approx((local + whole).item(), rel=1e-5)


def test_without_local_crops_dinov2_divides_by_a_pair_more(draw):
    student, targets = draw(2, 4, 5).double(), draw(2, 4, 5).softmax(-1).double()
    flat, swapped = torch.cat([student[0], student[1]]), torch.cat([targets[1], targets[0]])
    # DINOv2: loss_scales 2, n_global_crops_loss_terms 2, n_local_crops_loss_terms max(0 * 2, 1)
    official = -(swapped * (flat / 0.1).log_softmax(-1)).sum(-1).mean() * 2 / (2 + 1)
    assert dino.class_token_loss(student, targets, 0.1).item() == pytest.approx(1.5 * official.item(), rel=1e-6)


def test_the_patch_loss_is_a_mean_over_images_of_means_over_their_masked_patches(draw):
    of_image, prototypes = [2, 0, 5], 6
    student, targets = draw(7, prototypes), draw(7, prototypes).softmax(-1)
    weights = torch.cat([torch.full((n,), 1 / n) for n in of_image if n])
    s, t = student.double().numpy(), targets.double().numpy()
    each = -(t * np.log(softmax(s / 0.1))).sum(-1)
    expected = (each[:2].mean() + 0 + each[2:].mean()) / 3
    assert dino.patch_loss(student, targets, weights, 3, 0.1).item() == pytest.approx(expected, rel=1e-6)
    none = dino.patch_loss(student[:0], targets[:0], weights[:0], 3, 0.1)
    assert none.item() == 0


def test_koleo_is_the_log_distance_to_the_nearest_neighbor(draw):
    x = draw(6, 4)
    unit = x.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    nearest = [min(np.linalg.norm(unit[i] - unit[j]) for j in range(6) if j != i) for i in range(6)]
    assert dino.koleo(x).item() == pytest.approx(-np.mean(np.log(nearest)), rel=1e-6)
    together = torch.ones(3, 4) + 1e-3 * draw(3, 4)
    assert dino.koleo(together) > dino.koleo(x) + 3


def test_koleo_pushes_neighbors_apart(draw):
    x = draw(8, 3).requires_grad_()
    before = dino.koleo(x)
    before.backward()
    assert dino.koleo(x.detach() - 1e-3 * x.grad) < before


def test_softmax_targets(draw):
    scores, center = draw(5, 7), draw(7)
    expected = softmax((scores.double().numpy() - center.double().numpy()) / 0.04)
    assert np.allclose(dino.softmax_targets(scores, center, 0.04).numpy(), expected, atol=1e-6)


def test_sinkhorn_kernel_equals_dinov2s(draw):
    """As written there: Q = exp(s / tau)^T over its sum; 3 x (rows over their sums and K, columns over theirs, B)."""
    scores, temperature = (draw(12, 9) / 4).double(), 0.07
    Q = (scores / temperature).exp().T
    Q /= Q.sum()
    for _ in range(3):
        Q /= Q.sum(1, keepdim=True)
        Q /= 9
        Q /= Q.sum(0, keepdim=True)
        Q /= 12
    assert torch.allclose(sinkhorn(scores.float(), temperature, 3).double(), (Q * 12).T, atol=1e-5)


def test_entropy_is_a_fraction_of_the_largest():
    assert dino.entropy(torch.full((3, 8), 1 / 8)).item() == pytest.approx(1)
    assert dino.entropy(torch.eye(4)).item() == 0
    p = torch.tensor([[0.5, 0.25, 0.25]])
    assert dino.entropy(p).item() == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(4)) / math.log(3))


def test_schedules_against_closed_forms():
    assert schedules.cosine(0, 11, 0.04, 0.4) == pytest.approx(0.04)
    assert schedules.cosine(5, 11, 0.04, 0.4) == pytest.approx(0.22)
    assert schedules.cosine(10, 11, 0.04, 0.4) == pytest.approx(0.4)
    assert schedules.cosine(0, 1, 0.992, 1.0) == 0.992
    for step in range(11):
        expected = 0.4 - 0.18 * (1 + math.cos(math.pi * step / 10))
        assert schedules.cosine(step, 11, 0.04, 0.4) == pytest.approx(expected)
    temperatures = [schedules.linear_warmup(step, 100, 0.3, 0.04, 0.07) for step in range(100)]
    assert temperatures[0] == 0.04 and temperatures[15] == pytest.approx(0.055) and set(temperatures[30:]) == {0.07}
    assert schedules.linear_warmup(3, 100, 6, 0.0, 1.0) == 0.5 and schedules.linear_warmup(0, 100, 0, 0.0, 1.0) == 1.0
    rates = [schedules.warmup_cosine(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and max(rates) == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 90)))
