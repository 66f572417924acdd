"""UpStep with our additions to the paper's algorithm; all are off by default.

    distil                  L + w distance(features, base model's features)                 losses/distillation.py
    local_views             small crops that predict the targets of the global views (SwAV's multi-crop)
    experimental options    without gain in our measurements (bench/results/quality.md):
      queue                 targets balanced over embeddings of earlier steps as well (SwAV)
      base_targets          q = (1 - w) q_adapted + w q_base, w from 1 to 0 over the first part of the run
      adapter_ema           an average of the adapter over the updates is saved in place of the last one
      gate_statistic        the gate compares the clustering loss, or the distance between an image's views
      gate_unit             the gate chooses images instead of steps
      cvr_on                the penalty is on the center of the backbone's features

Local views make no targets, and neither the center nor the gate looks at them, so skipped steps do not run them (Caron
et al. 2020, section 3.2).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.objective import ExperimentalConfig
from upstep_fast.data.views.types import Views
from upstep_fast.engine.block import Memory
from upstep_fast.methods.embeddings import Embeddings, unit_embeddings
from upstep_fast.methods.gate import select_images
from upstep_fast.methods.losses import clustering
from upstep_fast.methods.losses.distillation import distillation_loss
from upstep_fast.methods.microbatch import in_microbatches
from upstep_fast.methods.upstep.adapter_ema import Average
from upstep_fast.methods.upstep.dynamic_size import allow_any_size
from upstep_fast.methods.upstep.upstep import UpStep
from upstep_fast.model import lora
from upstep_fast.model.backbone import Backbone
from upstep_fast.model.pooling import features
from upstep_fast.runtime import distributed


def has_additions(config: AdaptConfig) -> bool:
    """Return True if the configuration asks for more than the paper's algorithm."""
    is_experimental = config.experimental != ExperimentalConfig()
    return is_experimental or config.objective.distil != "off" or config.views.local_views > 0


@dataclass(frozen=True)
class Extras:
    """What the loss needs besides the embeddings; None where no option asks for it."""

    views: Tensor | None  # [V, B, C, H, W], for the base model's features
    features: Tensor | None  # [V B, D] with gradient
    local: Tensor | None  # [n, B, C, h, w]
    selected: Tensor | None = None  # [b] int64, of target views: images whose other view is trained; None: all


class ExtendedUpStep(UpStep):
    """UpStep with what `has_additions` names."""

    takes_tokens = False
    queue: Tensor | None  # [V, N, d], embeddings that made targets in earlier steps, the newest first

    def __init__(self, backbone: Backbone, config: AdaptConfig):
        if config.views.local_views:
            allow_any_size(backbone.vit, backbone.name)
        super().__init__(backbone, config)
        decay, queue = config.experimental.adapter_ema, config.experimental.queue
        self.base_share = float(config.experimental.base_targets > 0)  # in the targets; `schedule` moves it
        self.average = Average(self.adapter_parameters(), decay) if decay else None
        self._target_source: Tensor | None = None  # [V, B, d], embeddings that made this step's targets
        self._num_selected = 0
        num_views = 2 if config.objective.layout == "symmetric" else 1
        self.register_buffer("queue", torch.zeros(num_views, queue, self.embedding_dim) if queue else None)

    def accelerate(self, dtype: torch.dtype, memory: Memory = "fast", fp8: bool = False) -> None:
        """Run the backbone on the engine in `dtype`; the plain model where the engine cannot."""
        super().accelerate(dtype, memory, fp8)
        # the base model is the plain one, and patches of two sizes would not say how large their image is
        needs_base = self.config.objective.distil != "off" or self.config.experimental.base_targets
        if needs_base or self.config.views.local_views:
            self.patch_size = 0

    @property
    def needs_init(self) -> bool:
        """True if prototypes, the penalty's anchor or the queue come from embeddings of the data."""
        return super().needs_init or self.config.experimental.queue > 0

    def _initialize(self, batches: Sequence[Tensor]) -> None:
        super()._initialize(batches)
        if self.queue is not None:
            self._push(z := torch.cat(list(batches), 1), z.isfinite().all())

    def schedule(self, optimizer: torch.optim.Optimizer, step: float) -> None:
        """Set the learning rate of the step, and the base model's share in its targets."""
        super().schedule(optimizer, step)
        steps, base_targets = self.config.optimization.num_steps, self.config.experimental.base_targets
        self.base_share = max(0.0, 1 - step / (base_targets * steps)) if base_targets else 0.0
        self._target_source = None

    def embed(self, views: Views) -> Embeddings[Extras]:
        """Embed all global views, in one batch of V B images."""
        c = self.config
        f = in_microbatches(self.features, views.pixels.flatten(0, 1), self.num_microbatches)
        extras = Extras(
            views=views.pixels if self.base_share or c.objective.distil != "off" else None,
            features=f if c.objective.distil != "off" or c.experimental.cvr_on == "features" else None,
            local=views.local,
        )
        return unit_embeddings(self.head(f).unflatten(0, views.pixels.shape[:2]), extras)

    def with_global_stats(self, embeddings: Embeddings[Extras], stats: Tensor) -> Embeddings[Extras]:
        """Return `embeddings` with the statistics of all ranks' images, the gate's own one (gate_statistic) last."""
        embeddings = embeddings.with_global_stats(stats)
        if self.config.experimental.gate_statistic == "center":
            return embeddings
        # a mean over images, of which every rank has the same number; Sinkhorn in it needs all ranks
        value = distributed.reduce(self._gate_statistic(embeddings.z.detach())) / distributed.size()
        return replace(embeddings, magnitudes=torch.cat([embeddings.magnitudes, value[None]]))

    @torch.no_grad()
    def _gate_statistic(self, z: Tensor) -> Tensor:
        """Compute the statistic of this rank's images. z: [2, B, d]."""
        if self.config.experimental.gate_statistic == "disagreement":
            return clustering.disagreement(z)
        prototypes = F.normalize(self.prototypes, dim=-1)
        scores = clustering.prototype_scores(z, prototypes)
        return clustering.swapped_loss(scores, self._assign(scores, prototypes), self.config.objective.temperature)

    @torch.no_grad()
    def select_images(self, teacher: Embeddings[Extras], step: int) -> tuple[Embeddings[Extras], Tensor]:
        """Choose the images whose other view is trained, by what each adds to the center (gate_unit image).

        Returns the teacher's embeddings, which know the choice, and the images' indices [b].
        """
        gate, contributions = self.config.gate, teacher.z[0] @ teacher.center
        seed = self.config.runtime.seed
        selected = select_images(gate.rule, contributions, gate.rate, gate.update_when, seed, step)
        self._num_selected = len(selected)
        return replace(teacher, extras=replace(teacher.extras, selected=selected)), selected

    def metrics(self) -> dict[str, Any]:
        """Return the number of trained images, where the gate chooses images."""
        return {"learnt": self._num_selected} if self.config.experimental.gate_unit == "image" else {}

    def loss(self, student: Embeddings[Extras], teacher: Embeddings[Extras] | None = None) -> Tensor:
        """Return UpStep's loss plus the distance from the base model, a scalar in fp32."""
        loss, c = super().loss(student, teacher), self.config.objective
        if c.distil == "off":
            return loss
        adapted, base = student.extras.features, self._base_features(student.extras)
        assert adapted is not None
        distance = distillation_loss(c.distil, adapted, base, c.distil_temperature)
        return loss + c.distil_weight * distance

    @torch.no_grad()
    def _base_features(self, extras: Extras) -> Tensor:
        """Compute the base model's features of the views, [V B, D]."""
        assert extras.views is not None
        # on the plain model: the engine's merged weights are those that the backward pass will want
        with lora.disabled(self.adapters.values()):
            parts = extras.views.flatten(0, 1).chunk(self.num_microbatches)
            return torch.cat([features(self.vit, part) for part in parts])

    @torch.no_grad()
    def _targets(self, source: Embeddings[Extras], scores: Tensor, prototypes: Tensor) -> Tensor:
        self._target_source = source.z.detach()
        q = self._assign(scores, prototypes)
        if self.base_share:
            z = self._unit(self._base_features(source.extras)).view_as(source.z)
            q = q.lerp(self._assign(clustering.prototype_scores(z, prototypes), prototypes), self.base_share)
        return q if source.extras.selected is None else q[:, source.extras.selected]

    def _assign(self, scores: Tensor, prototypes: Tensor) -> Tensor:
        """Compute Sinkhorn targets [V, B, K] of scores, balanced over all ranks' images and the queue."""
        if self.queue is None:
            return super()._assign(scores, prototypes)
        part, num_images = distributed.own_part(self.queue.shape[1]), scores.shape[1]
        queued = clustering.prototype_scores(self.queue[:, part.start : part.stop], prototypes)
        scores = torch.cat([scores, queued], 1)
        return super()._assign(scores, prototypes)[:, :num_images]

    def _clustering_loss(
        self, student: Embeddings[Extras], scores: Tensor, targets: Tensor, prototypes: Tensor
    ) -> Tensor:
        loss, local = super()._clustering_loss(student, scores, targets, prototypes), student.extras.local
        return loss if local is None else self._with_local(loss, local, targets, prototypes)

    def _with_local(self, loss: Tensor, local: Tensor, targets: Tensor, prototypes: Tensor) -> Tensor:
        """Return the mean over all pairs of a target and another view. loss: the mean over pairs of global views.

        local: [n, B, C, h, w]; each local view predicts every target of its image. targets: [V, B, K].
        """
        z = self._unit(in_microbatches(self.features, local.flatten(0, 1), self.num_microbatches))
        q = targets.mean(0).repeat(len(local), 1)
        local_loss = clustering.one_sided_loss(
            clustering.prototype_scores(z, prototypes), q, self.config.objective.temperature
        )
        return (loss + len(local) * local_loss) / (1 + len(local))

    def _unit(self, f: Tensor) -> Tensor:
        return F.normalize(self.head(f).float(), dim=-1)

    def _regularized_center(self, student: Embeddings[Extras]) -> Tensor:
        if self.config.experimental.cvr_on == "head":
            return student.center
        # the mean unit feature of all ranks' images, with the gradient of the local ones' mean
        assert student.extras.features is not None
        local = F.normalize(student.extras.features.float(), dim=-1).mean(0)
        whole = distributed.reduce(local.detach().clone()) / distributed.size()
        return local + (whole - local.detach())

    @torch.no_grad()
    def update_running_stats(self, embeddings: Embeddings[Any]) -> None:
        """Update the running values and the queue, unless the step is not finite."""
        super().update_running_stats(embeddings)
        if self.queue is not None and self._target_source is not None:
            z = distributed.gather_rows(self._target_source, 1)
            self._push(z, embeddings.magnitudes[0].isfinite())

    def _push(self, z: Tensor, finite: Tensor) -> None:
        """Put embeddings of all ranks, [V, B, d], before those of the queue; the oldest drop out."""
        assert self.queue is not None
        moved = torch.cat([z[: len(self.queue)], self.queue], 1)[:, : self.queue.shape[1]]
        self.queue.copy_(torch.where(finite, moved, self.queue))

    def after_update(self, applied: Tensor) -> None:
        """Add the adapters to their average."""
        if self.average:
            self.average.update(self.adapter_parameters(), applied)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return a checkpoint's tensors by name, those of the average included."""
        average = self.average.state_dict(prefix="average.") if self.average else {}
        return super().state_tensors() | average

    @contextlib.contextmanager
    def weights_to_save(self) -> Iterator[nn.Module]:
        """Return a context within which the adapters are their average, if there is one."""
        with self.average.in_place_of(self.adapter_parameters()) if self.average else contextlib.nullcontext():
            yield self.vit
