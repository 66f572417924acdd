"""Clustering losses and penalties against hand computation, float64 and the identities of METHODS 1.2."""

import math

import pytest
import torch
import torch.nn.functional as F
from references.upstep import sinkhorn as sinkhorn_by_logs
from references.upstep import upstep_loss

from upstep_fast.kernels.sinkhorn import sinkhorn
from upstep_fast.methods.losses import clustering
from upstep_fast.methods.losses.distillation import sharpen


def unit(*shape, seed=0, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def test_loss_of_two_images_and_two_prototypes_by_hand():
    # both views of image 0 lie on prototype 0, of image 1 on prototype 1; scores 1 and 0; targets by equal usage
    scores = torch.eye(2).expand(2, 2, 2)
    temperature, epsilon = 0.5, 0.25
    targets = sinkhorn(scores, epsilon, 3)
    q = 1 / (1 + math.exp(-1 / epsilon))  # the matrix [[e^4, 1], [1, e^4]] is balanced by its row sums alone
    torch.testing.assert_close(targets[0], torch.tensor([[q, 1 - q], [1 - q, q]]))
    log_p = -math.log(1 + math.exp(-1 / temperature)), -math.log(1 + math.exp(1 / temperature))
    by_hand = -(q * log_p[0] + (1 - q) * log_p[1])
    loss = clustering.swapped_loss(scores, targets, temperature)
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("V", [2, 3])
@pytest.mark.parametrize("power", [1, 4])
def test_loss_is_the_sum_over_pairs_of_views(V, power):
    g = torch.Generator().manual_seed(V)
    scores = torch.randn(V, 20, 30, generator=g).requires_grad_()
    targets = sharpen(torch.randn(V, 20, 30, generator=g).mul(3).softmax(-1), power)
    exact = scores.detach().double().requires_grad_()
    log_p = F.log_softmax(exact / 0.1, -1)
    pairs = [-(targets[v] * log_p[w]).sum(-1).mean() for v in range(V) for w in range(V) if v != w]
    loss, wanted = clustering.swapped_loss(scores, targets, 0.1), sum(pairs) / len(pairs)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    loss.backward(), wanted.backward()
    torch.testing.assert_close(scores.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_gradient_by_hand():
    # d loss / d scores_w = (softmax(scores_w / tau) - mean over the other views of q) / (tau B V)
    scores = torch.randn(3, 5, 4, dtype=torch.float32, requires_grad=True)
    targets = torch.softmax(torch.randn(3, 5, 4), -1)
    clustering.swapped_loss(scores, targets, 0.3).backward()
    others = (targets.sum(0) - targets) / 2
    expected = (torch.softmax(scores.detach() / 0.3, -1) - others) / (0.3 * 5 * 3)
    torch.testing.assert_close(scores.grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("epsilon", [0.05, 0.03, 0.01])
def test_full_objective_and_its_gradient_against_float64(epsilon):
    u = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    prototypes = unit(12, 16)
    u64 = u.clone().requires_grad_()
    expected = upstep_loss(u64, prototypes, epsilon=epsilon, iterations=3, temperature=0.1, cvr_weight=0.7)
    expected.backward()
    u32 = u.float().requires_grad_()
    z = F.normalize(u32, dim=-1)
    scores = z @ prototypes.float().T
    targets = sinkhorn(scores.detach(), epsilon, 3)
    loss = clustering.swapped_loss(scores, targets, 0.1) + 0.7 * z.mean((0, 1)).square().sum()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (u32.grad.double() - u64.grad).norm() / u64.grad.norm() < 1e-4


def test_collapsed_batch_gives_uniform_targets_and_log_k():
    scores = torch.full((2, 32, 10), 0.3)
    targets = sinkhorn(scores, 0.05, 3)
    torch.testing.assert_close(targets, torch.full_like(targets, 0.1))
    assert clustering.swapped_loss(scores, targets, 0.1).item() == pytest.approx(math.log(10), rel=1e-6)


def test_reference_sinkhorn_reaches_both_marginals():
    q = sinkhorn_by_logs(unit(40, 8) @ unit(10, 8, seed=1).T, 0.05, 200)
    torch.testing.assert_close(q.sum(1), torch.ones(40, dtype=q.dtype))
    torch.testing.assert_close(q.sum(0), torch.full((10,), 4.0, dtype=q.dtype))


def test_one_sided_loss_is_half_of_the_swapped_one():
    scores = unit(2, 9, 6).float()
    targets = torch.softmax(unit(2, 9, 6, seed=1).float(), -1)
    halves = [clustering.one_sided_loss(scores[1 - v], targets[v], 0.1) for v in (0, 1)]
    torch.testing.assert_close(clustering.swapped_loss(scores, targets, 0.1), sum(halves) / 2)


def test_distance_of_views_and_the_mean_magnitude():
    # METHODS 1.2: E |z1 - z2|^2 = 4 (1 - E |(z1 + z2) / 2|^2) for unit vectors
    z1, z2 = unit(500, 12), unit(500, 12, seed=1)
    apart = (z1 - z2).square().sum(-1).mean()
    torch.testing.assert_close(apart, 4 * (1 - ((z1 + z2) / 2).square().sum(-1).mean()))


def test_center_and_spread_share_the_mean_magnitude():
    # METHODS 1.2: E |z|^2 = |s|^2 + trace of the covariance
    z = (unit(500, 12) + unit(500, 12, seed=1) + 1) / 2
    s = z.mean(0)
    torch.testing.assert_close(z.square().sum(-1).mean(), s @ s + torch.cov(z.T, correction=0).trace())


def test_gradient_of_the_penalty_is_the_same_for_every_embedding():
    # METHODS 1.2: d |s|^2 / d z_i = 2 s / (B V)
    z = unit(2, 7, 5).requires_grad_()
    s = z.mean((0, 1))
    s.square().sum().backward()
    torch.testing.assert_close(z.grad, (2 / 14 * s.detach()).expand(2, 7, 5))


def penalty(form, center, running=None, base=None, magnitude=0.2):
    zero = torch.zeros_like(center)
    return clustering.cvr_penalty(
        form,
        center,
        running_center=zero if running is None else running,
        base_center=zero if base is None else base,
        running_magnitude=torch.tensor(magnitude),
    ).item()


def test_every_penalty_by_its_formula():
    s, base, running = torch.tensor([0.3, 0.4]), torch.tensor([0.3, 0.0]), torch.tensor([0.1, -0.1])
    assert penalty("off", s) == 0
    assert penalty("sq", s) == pytest.approx(0.25)
    assert penalty("norm", s) == pytest.approx(0.5)
    assert penalty("anchor", s, base=base) == pytest.approx(0.16)
    assert penalty("hinge", s, magnitude=0.2) == pytest.approx(0.09)
    assert penalty("hinge", s, magnitude=0.6) == 0
    assert penalty("ema", s, running=running) == pytest.approx((0.09 + 0.03) ** 2 + (-0.09 + 0.04) ** 2)


def test_random_prototypes_are_unit_and_centered():
    c = clustering.random_prototypes(300, 128, torch.Generator().manual_seed(0))
    torch.testing.assert_close(c.norm(dim=-1), torch.ones(300))
    assert c.mean(0).norm() < 1e-4  # uncentered ones have about 1 / sqrt(300) = 0.06
    again = clustering.random_prototypes(300, 128, torch.Generator().manual_seed(0))
    assert torch.equal(c, again)


def test_orthogonal_prototypes():
    c = clustering.orthogonal_prototypes(20, 32, torch.Generator().manual_seed(0))
    torch.testing.assert_close(c @ c.T, torch.eye(20), atol=1e-5, rtol=0)
    more = clustering.orthogonal_prototypes(50, 32, torch.Generator().manual_seed(0))
    assert more.shape == (50, 32)
    torch.testing.assert_close(more.norm(dim=-1), torch.ones(50))


def test_spherical_kmeans_finds_the_clusters():
    centers = torch.eye(6)
    z = F.normalize(
        centers.repeat(50, 1) + 0.05 * torch.randn(300, 6, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    c = clustering.spherical_kmeans(z, 12, torch.Generator().manual_seed(0))
    assert ((c @ centers.T).max(0).values > 0.98).all()
    torch.testing.assert_close(c.norm(dim=-1), torch.ones(12))
