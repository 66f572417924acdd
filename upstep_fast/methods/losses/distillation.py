"""Distillation from the base model: penalties on the distance between adapted and base features of the views.

    f, g      [N, D]   features of N views by the adapted and by the base model; g carries no gradient

    feature      1 - mean_i cos(f_i, g_i)
    relational   mean_i KL( softmax_j cos(g_i, g_j) / T  ||  softmax_j cos(f_i, f_j) / T ),  j over the N - 1 others

The relational form allows a rotation of all features: it only keeps similarities (relational knowledge distillation,
Park 2019; similarities as distributions, Passalis and Tefas 2018). Ours, not the paper's; measured in
bench/results/quality.md.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Distil = Literal["off", "feature", "relational"]


def distillation_loss(form: Distil, adapted: Tensor, base: Tensor, temperature: float) -> Tensor:
    """Compute the penalty, a scalar in fp32. adapted: [N, D] with gradient; base: [N, D]; N of at least 2."""
    f, g = F.normalize(adapted.float(), dim=-1), F.normalize(base.detach().float(), dim=-1)
    if form == "feature":
        return 1 - (f * g).sum(-1).mean()
    if form == "relational":
        log_p, log_q = ((_of_others(x @ x.T) / temperature).log_softmax(-1) for x in (f, g))
        return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    return adapted.new_zeros(())


def _of_others(x: Tensor) -> Tensor:
    """Remove the diagonal of [N, N]: [N, N - 1]. By shape, since a mask would make the host wait for the device."""
    return x.flatten()[1:].view(len(x) - 1, len(x) + 1)[:, :-1].reshape(len(x), -1)


def sharpen(targets: Tensor, power: float) -> Tensor:
    """Return q^power over its sum, row by row (target sharpening of MSN, Assran 2022, T = 1 / power). q: [..., K]."""
    if power == 1:
        return targets
    raised = targets**power
    return raised / raised.sum(-1, keepdim=True)
