"""UpStep (arXiv 2502.21313): LoRA, online clustering against fixed prototypes, a penalty on the centre vector.

One step, on V = 2 views of B images:

    u = head(vit(views)); z = u / |u|; s = mean z; m = |s|            embed
    the gate compares m with its reference (gate.py); closed: nothing more happens
    P = z C^T; q = sinkhorn(P); L = swapped(P, q) + lambda cvr(s)     loss

The paper's formulas for the gate and the penalty are not published; what is ours is marked in gate.py and
losses/clustering.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.data.loading.loader import Batch
from upstep_fast.data.views.views import multi_crop
from upstep_fast.engine import vit as engine
from upstep_fast.engine.block import Memory
from upstep_fast.errors import ConfigError
from upstep_fast.kernels.patchify import unpatchify_reference
from upstep_fast.kernels.sinkhorn import sinkhorn
from upstep_fast.methods import crops, trainable
from upstep_fast.methods.embeddings import Embeddings, embedded
from upstep_fast.methods.gate import choose_images
from upstep_fast.methods.losses import clustering
from upstep_fast.methods.losses.distillation import distillation_loss, sharpen
from upstep_fast.methods.microbatch import in_microbatches
from upstep_fast.methods.schedules import warmup_cosine
from upstep_fast.methods.upstep.adapter_ema import Average
from upstep_fast.methods.upstep.head import make_head, make_prototypes
from upstep_fast.methods.upstep.multicrop import Crops, take_any_size
from upstep_fast.model import lora
from upstep_fast.model.backbone import Backbone
from upstep_fast.model.pooling import features
from upstep_fast.runtime import distributed

ONE_DIRECTION = 0.999  # a centre of unit embeddings this long means collapse (METHODS 1.2)


class UpStep(nn.Module):
    """The adapted ViT, the head and the prototypes; what training changes and a checkpoint holds."""

    prototypes: Tensor
    running_centre: Tensor
    base_centre: Tensor
    running_magnitude: Tensor
    seen: Tensor  # whether the running values hold anything yet
    queue: Tensor | None  # [V, N, d] embeddings that made targets in earlier steps, the newest first

    def __init__(self, backbone: Backbone, config: AdaptConfig, num_prototypes: int):
        super().__init__()
        self.config, self.recipes, self.num_microbatches, self._learnt = config, crops.recipes(config, backbone), 1, 0
        self.base_share = float(config.experimental.base_targets > 0)  # in the targets; `schedule` moves it
        self._fresh: Tensor | None = None  # [V, B, d], what made the targets of this step
        self._patch, self._view_dtype = 0, torch.float32  # of `views`; 0: pictures
        if config.views.local_views:
            take_any_size(backbone.vit, backbone.name)
        # parts of torch.nn draw from the global generator: set it for this block only
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.runtime.seed)
            self.adapters = _prepare(backbone.vit, config)
            self.head = make_head(config, backbone.width)
        self.vit = backbone.vit
        decay, queue = config.experimental.adapter_ema, config.experimental.queue
        self.average = Average(self.adapter_parameters(), decay) if decay else None
        self.features: Callable[[Tensor], Tensor] = partial(features, self.vit)
        width = backbone.width if config.objective.head == "none" else config.objective.head_dim
        prototypes = make_prototypes(config, num_prototypes, width)
        if config.objective.prototype_init == "learned":
            self.prototypes = nn.Parameter(prototypes)
        else:
            self.register_buffer("prototypes", prototypes)
        self.register_buffer("running_centre", torch.zeros(width))
        self.register_buffer("base_centre", torch.zeros(width))
        self.register_buffer("running_magnitude", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))
        num_views = 2 if config.objective.layout == "symmetric" else 1
        self.register_buffer("queue", torch.zeros(num_views, queue, width) if queue else None)

    def accelerate(self, dtype: torch.dtype, memory: Memory = "fast", fp8: bool = False) -> None:
        """Run the backbone on the engine from now on, in `dtype`; the plain model where the engine cannot.

        To be called once the module is on its device, since the frozen weights are folded into copies.
        """
        self.features = engine.make_features(
            self.vit, dtype, memory, fallback=self.features, fp8=fp8, graphs=self.config.memory.cuda_graphs
        )
        # the base model is the plain one, and patches do not say how large their image is
        needs_base = self.config.objective.distil != "off" or self.config.experimental.base_targets
        if not needs_base and not self.config.views.local_views:
            self._patch, self._view_dtype = engine.patch_side(self.vit), dtype

    @property
    def needs_init(self) -> bool:
        """Whether `initialize_from_data` must see embeddings of the data before the first step."""
        objective, queue = self.config.objective, self.config.experimental.queue
        return objective.prototype_init == "kmeans" or objective.cvr == "anchor" or queue > 0

    @torch.no_grad()
    def initialize_from_data(self, views: Iterable[Tensor]) -> None:
        """Set what is computed once from the base model's embeddings; views: [V, B, C, H, W] batches."""
        of_batches = [distributed.gather_rows(self.embed(batch).z, 1) for batch in views]
        if self.queue is not None:
            self._push(z := torch.cat(of_batches, 1), z.isfinite().all())
        z = torch.cat([part.flatten(0, 1) for part in of_batches])
        self.base_centre.copy_(z.mean(0))
        if self.config.objective.prototype_init == "kmeans":
            if len(z) < len(self.prototypes):
                raise ValueError(f"prototypes: k-means needs at least {len(self.prototypes)} embeddings, got {len(z)}")
            generator = torch.Generator().manual_seed(self.config.runtime.seed)
            self.prototypes.copy_(clustering.kmeans_prototypes(z, len(self.prototypes), generator))

    def schedule(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the learning rate of this step, and the base model's share in its targets."""
        run, base_targets = self.config.optimization, self.config.experimental.base_targets
        for group in optimizer.param_groups:
            group["lr"] = run.lr * warmup_cosine(step, run.num_steps, run.warmup)
        self.base_share = max(0.0, 1 - step / (base_targets * run.num_steps)) if base_targets else 0.0
        self._fresh = None

    def views(self, batch: Batch, device: torch.device) -> Tensor | Crops:
        """Two random views: [2, B, C, H, W], or patches [2, B, N, C P P] as the engine's first product wants them.

        With --local-views these and the local ones.
        """
        found = multi_crop(
            batch.images,
            self.recipes,
            seed=self.config.runtime.seed,
            epoch=batch.epoch,
            indices=batch.indices,
            device=device,
            patch=self._patch,
            dtype=self._view_dtype if self._patch else torch.float32,
        )
        return Crops(*found) if self.config.views.local_views else found[0]

    @property
    def min_side(self) -> int:
        """Pixels that the views need of an image's sides."""
        return max(recipe.min_side for recipe, _ in self.recipes)

    def images(self, views: Tensor | Crops) -> Tensor:
        """The first view of each image, as a picture."""
        whole = views.whole if isinstance(views, Crops) else views
        if whole.dim() == 5:
            return whole[0]
        recipe, _ = self.recipes[0]
        return unpatchify_reference(whole[0], self._patch, recipe.height, recipe.width, torch.float32)

    def embed(self, views: Tensor | Crops) -> Embeddings:
        """views: normalised, as `views` makes them, or [V, B, C, H, W]. The backbone sees all V B in one batch."""
        if isinstance(views, Crops):
            return replace(self.embed(views.whole), local=views.local)
        f = in_microbatches(self.features, views.flatten(0, 1), self.num_microbatches)
        result = embedded(self.head(f).unflatten(0, views.shape[:2]))
        if self.config.experimental.gate_statistic != "center":
            result = replace(result, statistic=self._statistic)
        if self.base_share or self.config.objective.distil != "off":
            result = replace(result, views=views)
        is_looked_at = self.config.objective.distil != "off" or self.config.experimental.cvr_on == "features"
        return replace(result, features=f) if is_looked_at else result

    def _unit(self, f: Tensor) -> Tensor:
        return F.normalize(self.head(f).float(), dim=-1)

    def num_stats(self, views: int) -> int:
        """How many numbers `Embeddings.local_stats` of so many views are."""
        return views * self.prototypes.shape[1] + 1

    def metrics(self) -> dict[str, Any]:
        """How many images learnt, where the gate chooses images."""
        return {"learnt": self._learnt} if self.config.experimental.gate_unit == "image" else {}

    def after_update(self, applied: Tensor) -> None:
        """Take the adapters into their running mean."""
        if self.average:
            self.average.update(self.adapter_parameters(), applied)

    @torch.no_grad()
    def update_running_stats(self, embedded: Embeddings) -> None:
        """Move the running centre and magnitude and the queue, unless the step is not finite."""
        centre, magnitude = embedded.centre.detach(), embedded.magnitudes[0]
        weight, finite = torch.where(self.seen, 1 - clustering.CVR_EMA_BETA, 1.0), magnitude.isfinite()
        for running, value in ((self.running_centre, centre), (self.running_magnitude, magnitude)):
            running.copy_(torch.where(finite, running.lerp(value, weight), running))
        self.seen |= finite
        if self.queue is not None and self._fresh is not None:
            self._push(distributed.gather_rows(self._fresh, 1), finite)

    def _push(self, z: Tensor, finite: Tensor) -> None:
        """Put embeddings of all ranks, [V, B, d], before those of the queue; the oldest fall out."""
        assert self.queue is not None
        moved = torch.cat([z[: len(self.queue)], self.queue], 1)[:, : self.queue.shape[1]]
        self.queue.copy_(torch.where(finite, moved, self.queue))

    def loss(self, student: Embeddings, teacher: Embeddings | None = None) -> Tensor:
        """The objective of an update step, a scalar in fp32.

        student: views that carry gradient. teacher: views that make the targets without gradient (layout
        asymmetric); None: every view makes the targets of the others.
        """
        c = self.config.objective
        prototypes = F.normalize(self.prototypes, dim=-1)
        scores = student.z @ prototypes.T  # [V, B, K]
        base = self._base_features(student) if c.distil != "off" or (self.base_share and teacher is None) else None
        if teacher is None:
            targets = self._targets(student, scores, prototypes, base)
            clustering_loss = clustering.swapped_loss(scores, targets, c.temperature)
        else:
            base_of_target = self._base_features(teacher) if self.base_share else None
            targets = self._targets(teacher, teacher.z @ prototypes.T, prototypes, base_of_target)[0]
            targets = targets if teacher.chosen is None else targets[teacher.chosen]
            clustering_loss = clustering.one_sided_loss(scores[0], targets, c.temperature)
        if student.local is not None:
            clustering_loss = self._with_local(clustering_loss, student.local, targets, prototypes)
        distance: Tensor | float = 0.0
        if c.distil != "off":
            assert student.features is not None and base is not None
            distance = distillation_loss(c.distil, student.features, base, c.distil_temperature)
        penalty = clustering.cvr_penalty(
            c.cvr,
            student.centre if self.config.experimental.cvr_on == "head" else _feature_centre(student),
            running_centre=self.running_centre,
            base_centre=self.base_centre,
            running_magnitude=self.running_magnitude,
        )
        return clustering_loss + c.cvr_weight * penalty + c.distil_weight * distance

    def _with_local(self, loss: Tensor, local: Tensor, targets: Tensor, prototypes: Tensor) -> Tensor:
        """The mean over all pairs of a target and another view; loss: over the pairs of global views.

        local: [n, B, C, h, w], each of which predicts every target of its image; targets: [V, B, K] or [B, K].
        """
        z = self._unit(in_microbatches(self.features, local.flatten(0, 1), self.num_microbatches))
        q = targets.view(-1, *targets.shape[-2:]).mean(0).repeat(len(local), 1)
        of_local = clustering.one_sided_loss(z @ prototypes.T, q, self.config.objective.temperature)
        return (loss + len(local) * of_local) / (1 + len(local))

    @torch.no_grad()
    def _targets(self, made_by: Embeddings, scores: Tensor, prototypes: Tensor, base: Tensor | None) -> Tensor:
        """Q [V, B, K]: (1 - w) q_adapted + w q_base; base: the base model's features [V B, D], wanted while w > 0."""
        self._fresh = made_by.z.detach()
        q = self._assign(scores, prototypes)
        if not self.base_share or base is None:
            return q
        z = self._unit(base).view_as(made_by.z)
        return q.lerp(self._assign(z @ prototypes.T, prototypes), self.base_share)

    def _assign(self, scores: Tensor, prototypes: Tensor) -> Tensor:
        """Each view's Sinkhorn targets, [V, B, K], balanced over these rows and the queue's."""
        c, own, all_reduce = self.config.objective, scores.shape[1], distributed.reducer()
        if self.queue is not None:
            part = distributed.own_part(self.queue.shape[1])
            scores = torch.cat([scores, self.queue[:, part.start : part.stop] @ prototypes.T], 1)
        q = sinkhorn(scores.detach(), c.epsilon, c.sinkhorn_iterations, all_reduce=all_reduce)
        return sharpen(q[:, :own], c.sharpen)

    @torch.no_grad()
    def _statistic(self, z: Tensor) -> Tensor:
        """What --gate-statistic names, of the own images; z: [2, B, d]."""
        if self.config.experimental.gate_statistic == "disagreement":
            return clustering.disagreement(z)
        prototypes = F.normalize(self.prototypes, dim=-1)
        scores = z @ prototypes.T
        return clustering.swapped_loss(scores, self._assign(scores, prototypes), self.config.objective.temperature)

    @torch.no_grad()
    def _base_features(self, of: Embeddings) -> Tensor:
        """The base model's features of the same views, [V B, D]."""
        assert of.views is not None
        # on the plain model: the engine's merged weights are those that the backward pass will want
        with lora.disabled(self.adapters.values()):
            return torch.cat([features(self.vit, part) for part in of.views.flatten(0, 1).chunk(self.num_microbatches)])

    @torch.no_grad()
    def choose(self, target: Embeddings, step: int) -> Embeddings:
        """For --gate-unit image: which images' other view learns, by what each adds to the centre."""
        gate = self.config.gate
        added = target.z[0] @ target.centre
        chosen = choose_images(gate.rule, added, gate.rate, gate.update_when, self.config.runtime.seed, step)
        self._learnt = len(chosen)
        return replace(target, chosen=chosen)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The LoRA matrices; with --tune full the model itself."""
        return list(trainable.trained(self.vit).values())

    def collapsed(self, row: dict[str, Any]) -> str | None:
        """A word on why the embeddings tell images no longer apart, if they do not."""
        return "the embeddings of all images point one way" if row["center"] > ONE_DIRECTION else None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Weight decay on the head alone."""
        groups: list[dict[str, Any]] = [{"params": self.adapter_parameters(), "weight_decay": 0.0}]
        if others := self.other_parameters():
            groups.append({"params": others, "weight_decay": self.config.optimization.weight_decay})
        return groups

    def gradient_parts(self) -> list[tuple[list[nn.Parameter], float]]:
        """The adapters are clipped, the head is not."""
        return [(self.adapter_parameters(), self.config.optimization.clip), (self.other_parameters(), 0.0)]

    def must_receive_grad(self) -> dict[str, nn.Parameter]:
        """Each adapter's B; with --tune full every weight."""
        return trainable.must_receive_grad(self.vit, self.adapters)

    def state_tensors(self) -> dict[str, Tensor]:
        """What learns, the prototypes and the running values."""
        learned = {name: p for name, p in self.named_parameters() if p.requires_grad}
        average = self.average.state_dict(prefix="average.") if self.average else {}
        return learned | dict(self.named_buffers(recurse=False)) | average

    @contextlib.contextmanager
    def weights_to_save(self) -> Iterator[nn.Module]:
        """Within this context the adapters are those that `result_files` writes."""
        with self.average.in_place_of(self.adapter_parameters()) if self.average else contextlib.nullcontext():
            yield self.vit

    def result_files(self) -> dict[str, bytes]:
        """The adapter as PEFT reads it."""
        with self.weights_to_save():
            return trainable.result_files(self.vit, self.adapters, self.config.model.name, trainable.trained(self.vit))

    def other_parameters(self) -> list[nn.Parameter]:
        """What is trained beside them and thrown away afterwards."""
        learned = [self.prototypes] if isinstance(self.prototypes, nn.Parameter) else []
        return [*self.head.parameters(), *learned]


def _feature_centre(learning: Embeddings) -> Tensor:
    """The mean unit feature of all ranks' images, [D], with the gradient of the own ones' mean."""
    assert learning.features is not None
    own = F.normalize(learning.features.float(), dim=-1).mean(0)
    whole = distributed.reduce(own.detach().clone()) / distributed.size()
    return own + (whole - own.detach())


def _prepare(vit: nn.Module, config: AdaptConfig) -> dict[str, lora.LoraLinear]:
    """What of the model learns: adapters, put on it in place, on all blocks or the last; or all of it."""
    if config.lora.tune == "full":
        vit.requires_grad_(True)
        for name in ("head", "head_dist"):  # a classifier behind the features, which learns nothing here
            getattr(vit, name, nn.Identity()).requires_grad_(False)
        return {}
    depth = len(vit.blocks)  # type: ignore[arg-type]
    num = depth if config.lora.blocks is None else config.lora.blocks
    if num > depth:
        raise ConfigError(f"lora_blocks: got {num}, but {config.model.name} has {depth} blocks")
    return lora.inject(vit, lora.LoraSpec.from_config(config.lora), leave_out=range(depth - num))
