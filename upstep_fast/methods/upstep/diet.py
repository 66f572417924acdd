"""DIET: every image is a class of its own, which a linear classifier on the features learns with LoRA (losses/diet.py).

    z = f / |f|,  f = vit(view)                    L = cross-entropy of z W^T with the image's number, smoothed

DIET (Balestriero 2023, arXiv 2302.10260) trains whole networks from scratch; DIET-CP (Rodas et al. 2025, arXiv
2509.06990) pretrained ones, and the code of one of its authors has features of unit length, no bias and a smoothing
of 0.3. LoRA, the gate on the mean of z and the chunks of the loss are ours. The classifier is discarded afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.diet import DietConfig
from upstep_fast.data.loading.loader import Batch
from upstep_fast.data.views.types import Views, register_views
from upstep_fast.methods.embeddings import Embeddings
from upstep_fast.methods.losses.diet import diet_loss
from upstep_fast.methods.upstep.upstep import UpStep


@dataclass(frozen=True, kw_only=True)
class NumberedViews(Views):
    """Views of B images, and their positions in the data set."""

    images: Tensor  # [B] int64


register_views(NumberedViews)


class Diet(UpStep):
    """UpStep's adapters, gate and embeddings without a head; its learned prototypes are the classifier."""

    config: DietConfig

    def _make_prototypes(self, config: AdaptConfig) -> None:
        # torch.nn.Linear's initialization, as in DIET-CP's code
        bound, generator = self.embedding_dim**-0.5, torch.Generator().manual_seed(config.runtime.seed)
        rows = torch.empty(config.objective.prototypes, self.embedding_dim)
        self.prototypes = nn.Parameter(rows.uniform_(-bound, bound, generator=generator))

    def views(self, batch: Batch, device: torch.device) -> Views:
        """Return one view of each image, in layout asymmetric one more for the gate, and the images' positions."""
        views = super().views(batch, device)
        return NumberedViews(**vars(views), images=batch.indices.to(device, non_blocking=device.type == "cuda"))

    def embed(self, views: Views) -> Embeddings[Tensor]:
        """Return the unit features of all views; the extras are the images' positions, [B]."""
        assert isinstance(views, NumberedViews)
        embeddings = super().embed(views)
        return Embeddings(**vars(embeddings) | {"extras": views.images})

    def loss(self, student: Embeddings[Any], teacher: Embeddings[Any] | None = None) -> Tensor:
        """Return the mean cross-entropy of the student's views, a scalar in fp32; the teacher is the gate's alone."""
        images = student.extras.repeat(len(student.z))
        return diet_loss(student.z.flatten(0, 1), self.prototypes, images, self.config.diet.label_smoothing)
