"""An exponential moving average of the adapters over the updates, saved in place of the last ones.

    average_n = sum_i beta^(n - i) x_i / sum_i beta^(n - i),   x_i: all LoRA matrices after update i = 1 .. n

The average of the factors A and B is an adapter of rank r; an average of the products B A is not. The two differ by the
covariance of B and A over the last 1 / (1 - beta) updates, a second-order term where both have moved little. Ours, not
the paper's: Polyak averaging of weights (Tarvainen and Valpola 2017 for a teacher).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector


class Average(nn.Module):
    """The average and the number of updates in it."""

    values: Tensor  # [P] fp32, all matrices in a row
    updates: Tensor  # [] fp64

    def __init__(self, parameters: Sequence[nn.Parameter], beta: float):
        super().__init__()
        self.beta = beta
        self.register_buffer("values", parameters_to_vector(parameters).detach().clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, parameters: Sequence[nn.Parameter], applied: Tensor) -> None:
        """Add the parameters after an update. applied: bool scalar, False if the update changed nothing."""
        self.updates += applied
        weight = (1 - self.beta) / (
            1 - self.beta**self.updates
        )  # 1 at the first update: the initial B = 0 has no share
        weight = torch.where(applied, weight, 0.0)
        self.values.lerp_(parameters_to_vector(parameters), weight.to(self.values.dtype))

    @contextlib.contextmanager
    def in_place_of(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Return a context within which the parameters hold the average; afterwards their own values, bit for bit."""
        last = parameters_to_vector(parameters).detach().clone()
        try:
            _fill(parameters, self.values)
            yield
        finally:
            _fill(parameters, last)


@torch.no_grad()
def _fill(parameters: Sequence[nn.Parameter], values: Tensor) -> None:
    for p, value in zip(parameters, values.split([p.numel() for p in parameters]), strict=True):
        p.copy_(value.view_as(p))
