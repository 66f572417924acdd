"""Unit embeddings and their center vector, on one rank and on several."""

import pytest
import torch
import torch.nn.functional as F

from upstep_fast.kernels import _dispatch as dispatch
from upstep_fast.methods.embeddings import unit_embeddings


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("views", [1, 2])
def test_values_and_gradients_against_the_formulas(views, dtype, implementation):
    u = (3 * torch.randn(views, 7, 12)).to(dtype).requires_grad_()
    weights = torch.randn(views, 7, 12)
    with dispatch.forced(implementation):
        found = unit_embeddings(u)
        ((found.z * weights).sum() + found.center.square().sum()).backward()
    assert found.z.dtype == found.center.dtype == found.magnitudes.dtype == torch.float32
    wide = u.detach().double().requires_grad_()
    z = F.normalize(wide, dim=-1)
    center = z.mean((0, 1))
    ((z * weights).sum() + center.square().sum()).backward()
    view_lengths = z.mean(1).norm(dim=-1)
    for ours, theirs in (
        (found.z, z),
        (found.center, center),
        (found.magnitudes, torch.cat([center.norm()[None], view_lengths])),
        (found.local_stats, torch.cat([z.sum(1).flatten(), z.new_tensor([7.0])])),
    ):
        torch.testing.assert_close(ours.detach().double(), theirs.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(u.grad, wide.grad.to(dtype))


def test_center_of_two_ranks_is_that_of_all_images():
    u = torch.randn(2, 8, 5)
    parts = [unit_embeddings(part) for part in u.chunk(2, dim=1)]
    whole, stats = unit_embeddings(u), sum(part.local_stats for part in parts)
    for part in parts:
        torch.testing.assert_close(part.with_global_stats(stats).center, whole.center)
        torch.testing.assert_close(part.with_global_stats(stats).magnitudes, whole.magnitudes)
