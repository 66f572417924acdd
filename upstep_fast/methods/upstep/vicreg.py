"""UpStep with VICReg's objective in place of clustering: no prototypes, no Sinkhorn (losses/vicreg.py).

The second moments of the embeddings are regularized as the center vector, their first, is. The adapter, the head, the
gate and the penalty on the center are UpStep's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.data.views.types import Views
from upstep_fast.methods.embeddings import Embeddings, unit_embeddings
from upstep_fast.methods.losses.vicreg import vicreg_loss
from upstep_fast.methods.microbatch import in_microbatches
from upstep_fast.methods.upstep.upstep import UpStep
from upstep_fast.runtime import distributed


class UpStepVicreg(UpStep):
    """UpStep whose loss is `vicreg_loss` of the head's outputs."""

    def _make_prototypes(self, config: AdaptConfig) -> None:
        self.register_buffer("prototypes", None)

    def embed(self, views: Views) -> Embeddings[Tensor]:
        """Embed all views, in one batch of V B images; the extras are the head's outputs, [V, B, d]."""
        f = in_microbatches(self.features, views.pixels.flatten(0, 1), self.num_microbatches)
        u = self.head(f).unflatten(0, views.pixels.shape[:2])
        return unit_embeddings(u, u)

    def loss(self, student: Embeddings[Any], teacher: Embeddings[Any] | None = None) -> Tensor:
        """Return VICReg's loss plus the penalty on the center, a scalar in fp32.

        student, teacher: as for UpStep. Moments are those of all ranks' images.
        """
        views = [*student.extras] if teacher is None else [student.extras[0], teacher.extras[0].detach()]
        whole = vicreg_loss(*map(_of_all_ranks, views))
        # every rank has the whole batch's loss, with the gradient of its own images: the ranks' mean is then the whole
        loss = whole.detach() + distributed.size() * (whole - whole.detach())
        return loss + self.config.objective.cvr_weight * self._penalty(student)


def _of_all_ranks(u: Tensor) -> Tensor:
    """Return the embeddings of all ranks' images, [B, d], with gradient for this rank's."""
    if distributed.size() == 1:
        return u
    rows = distributed.gather_rows(u.detach())
    own = distributed.own_part(len(rows))
    return rows.index_copy(0, torch.arange(own.start, own.stop, device=u.device), u)
