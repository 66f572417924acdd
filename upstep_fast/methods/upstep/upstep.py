"""UpStep (arXiv 2502.21313): LoRA, online clustering against fixed prototypes, a penalty on the center vector.

One step, on V = 2 views of B images:

    u = head(vit(views)); z = u / |u|; s = mean z; m = |s|            embed
    the gate compares m with its reference (gate.py); a skipped step ends here
    P = z C^T; q = sinkhorn(P); L = swapped(P, q) + lambda cvr(s)     loss

The paper's formulas for the gate and the penalty are not published; what is ours is marked in gate.py and
losses/clustering.py. What we added to the algorithm is in extended.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.data.loading.loader import Batch
from upstep_fast.data.views.make_views import multi_crop, random_views
from upstep_fast.data.views.types import Views
from upstep_fast.engine import vit as engine
from upstep_fast.engine.block import Memory
from upstep_fast.engine.split import split
from upstep_fast.engine.vit import EngineViT
from upstep_fast.kernels.sinkhorn import sinkhorn
from upstep_fast.methods import crops, trainable
from upstep_fast.methods.embeddings import Embeddings, unit_embeddings
from upstep_fast.methods.losses import clustering
from upstep_fast.methods.losses.distillation import sharpen
from upstep_fast.methods.method import Method
from upstep_fast.methods.microbatch import in_microbatches
from upstep_fast.methods.upstep.head import make_head, make_prototypes
from upstep_fast.methods.view_bank import TokenBank, pair
from upstep_fast.model.backbone import Backbone
from upstep_fast.model.pooling import features
from upstep_fast.runtime import distributed, machine

BANK_SHARE = 0.25  # of the free main memory, for tokens of a bank of views
COLLAPSED = 0.999  # center length of unit embeddings that means collapse (METHODS 1.2)


class UpStep(Method):
    """The adapted ViT, the projection head and the prototypes. Puts its adapters on `backbone`, in place."""

    prototypes: Tensor  # [K, d]
    running_center: Tensor  # [d]
    base_center: Tensor  # [d], of the base model's embeddings
    running_magnitude: Tensor  # []
    seen: Tensor  # [] bool, True once the running values hold anything
    takes_tokens: ClassVar[bool] = True  # `embed` needs no more of the views than the tokens of a bank
    names_on_disk: ClassVar = {"running_center": "running_centre", "base_center": "base_centre"}

    def __init__(self, backbone: Backbone, config: AdaptConfig):
        super().__init__(config, crops.view_configs(config, backbone))
        # parts of torch.nn draw from the global generator: set it for this block only
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.runtime.seed)
            self.adapters = trainable.prepare(backbone.vit, config)
            self.head = make_head(config, backbone.width)
        self.vit = backbone.vit
        self.features: Callable[[Tensor], Tensor] = partial(features, self.vit)
        self.embedding_dim = backbone.width if config.objective.head == "none" else config.objective.head_dim
        self._make_prototypes(config)
        self.register_buffer("running_center", torch.zeros(self.embedding_dim))
        self.register_buffer("base_center", torch.zeros(self.embedding_dim))
        self.register_buffer("running_magnitude", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))

    def _make_prototypes(self, config: AdaptConfig) -> None:
        prototypes = make_prototypes(config, self.embedding_dim)
        if config.objective.prototype_init == "learned":
            self.prototypes = nn.Parameter(prototypes)
        else:
            self.register_buffer("prototypes", prototypes)

    def accelerate(self, dtype: torch.dtype, memory: Memory = "fast", fp8: bool = False) -> None:
        """Run the backbone on the engine in `dtype`; the plain model where the engine cannot.

        To be called once the module is on its device, since the frozen weights are folded into copies.
        """
        graphs = self.config.memory.cuda_graphs
        self.features, self.patch_size = engine.make_features(
            self.vit, dtype, memory, fallback=self.features, fp8=fp8, graphs=graphs, take=self._behind_bank
        )
        self.view_dtype = dtype

    def _behind_bank(self, whole: EngineViT) -> EngineViT:
        """Return the blocks with adapters alone, where what the others make of a view is kept."""
        # with several ranks an image is another rank's in each epoch; a GPU would wait for copies, which none has timed
        is_alone_on_cpu = distributed.size() == 1 and next(self.vit.parameters()).device.type == "cpu"
        if self.config.views.uses == 1 or not self.takes_tokens or not is_alone_on_cpu:
            return whole
        if (parts := split(whole)) is None:
            return whole
        free = machine.free_bytes(torch.device("cpu"))
        limit = math.inf if free is None else BANK_SHARE * free
        self.bank = TokenBank(parts.tokens, parts.frozen, limit, machine.spare_bytes)
        return parts.rest

    @property
    def needs_init(self) -> bool:
        """True if prototypes or the penalty's anchor come from embeddings of the data."""
        return self.config.objective.prototype_init == "kmeans" or self.config.objective.cvr == "anchor"

    @torch.no_grad()
    def initialize_from_data(self, views: Iterable[Views]) -> None:
        """Compute the base model's center and k-means prototypes. Raises ValueError for too few embeddings."""
        self._initialize([distributed.gather_rows(self.embed(batch).z, 1) for batch in views])

    def _initialize(self, batches: Sequence[Tensor]) -> None:
        """Set the base model's center and k-means prototypes from all ranks' embeddings, [V, B, d] each."""
        z = torch.cat([batch.flatten(0, 1) for batch in batches])
        self.base_center.copy_(z.mean(0))
        if self.config.objective.prototype_init == "kmeans":
            num = len(self.prototypes)
            if len(z) < num:
                raise ValueError(f"prototypes: k-means needs at least {num} embeddings, got {len(z)}")
            generator = torch.Generator().manual_seed(self.config.runtime.seed)
            self.prototypes.copy_(clustering.spherical_kmeans(z, num, generator))

    def views(self, batch: Batch, device: torch.device) -> Views:
        """Return two random views of each image: as images, patches for the engine's first product, or tokens."""
        config, _ = self.view_configs[0]
        if (uses := self.config.views.uses) > 1:
            numbers = pair(batch.epoch, uses)
            if self.bank is not None:
                self.bank.forget_before(numbers[0])
            reused = torch.stack([self._reused_view(batch, number, device) for number in numbers])
            return Views(reused, config.height, config.width)
        pixels = multi_crop(
            batch.images,
            self.view_configs,
            seed=self.config.runtime.seed,
            epoch=batch.epoch,
            indices=batch.indices,
            device=device,
            patch=self.patch_size,
            dtype=self.view_dtype if self.patch_size else torch.float32,
        )
        return Views(pixels[0], config.height, config.width, *pixels[1:])

    def _reused_view(self, batch: Batch, number: int, device: torch.device) -> Tensor:
        """Return the view of a number, as `views` returns it."""

        def make(positions: list[int]) -> Tensor:
            dtype = self.view_dtype if self.patch_size else torch.float32
            return self._numbered_view(batch, positions, number, device, patch=self.patch_size, dtype=dtype)

        if self.bank is None:
            return make([*range(len(batch.images))])
        return self.bank.tokens(number, batch.indices.tolist(), make, device)

    def _numbered_view(
        self, batch: Batch, positions: list[int], number: int, device: torch.device, **layout: Any
    ) -> Tensor:
        images, indices = [batch.images[at] for at in positions], batch.indices[positions]
        key: dict[str, Any] = {"seed": self.config.runtime.seed, "epoch": 0, "indices": indices}
        return random_views(images, self.view_configs[0][0], **key, views=1, first=number, device=device, **layout)[0]

    def pictures(self, batch: Batch, device: torch.device) -> Tensor:
        """Return the first view of each image, as an image, [B, C, H, W] in fp32."""
        if self.config.views.uses == 1:
            return super().pictures(batch, device)
        return self._numbered_view(batch, [*range(len(batch.images))], 0, device)

    def embed(self, views: Views) -> Embeddings[Any]:
        """Embed all views, in one batch of V B images."""
        f = in_microbatches(self.features, views.pixels.flatten(0, 1), self.num_microbatches)
        return unit_embeddings(self.head(f).unflatten(0, views.pixels.shape[:2]))

    def loss(self, student: Embeddings[Any], teacher: Embeddings[Any] | None = None) -> Tensor:
        """Return the clustering loss plus the penalty on the center, a scalar in fp32.

        student: views that carry gradient. teacher: views that make the targets, without gradient (layout
        asymmetric); None: each view makes the targets of the other.
        """
        prototypes = F.normalize(self.prototypes, dim=-1)
        scores = clustering.prototype_scores(student.z, prototypes)  # [V, B, K]
        if teacher is None:
            targets = self._targets(student, scores, prototypes)
        else:
            targets = self._targets(teacher, clustering.prototype_scores(teacher.z, prototypes), prototypes)
        clustering_loss = self._clustering_loss(student, scores, targets, prototypes)
        return clustering_loss + self.config.objective.cvr_weight * self._penalty(student)

    @torch.no_grad()
    def _targets(self, source: Embeddings[Any], scores: Tensor, prototypes: Tensor) -> Tensor:
        """Compute the targets [V, B, K] of the views that make them. scores: of their embeddings."""
        return self._assign(scores, prototypes)

    def _assign(self, scores: Tensor, prototypes: Tensor) -> Tensor:
        """Compute Sinkhorn targets [V, B, K] of scores, balanced over all ranks' images of each view."""
        c = self.config.objective
        q = sinkhorn(scores.detach(), c.epsilon, c.sinkhorn_iterations, all_reduce=distributed.reducer())
        return sharpen(q, c.sharpen)

    def _clustering_loss(self, student: Embeddings[Any], scores: Tensor, targets: Tensor, prototypes: Tensor) -> Tensor:
        """Compute the mean cross-entropy of the student's views with the targets of other views."""
        if len(scores) > 1:
            return clustering.swapped_loss(scores, targets, self.config.objective.temperature)
        return clustering.one_sided_loss(scores[0], targets[0], self.config.objective.temperature)

    def _penalty(self, student: Embeddings[Any]) -> Tensor:
        """Compute the center-vector regularization of the student's embeddings."""
        return clustering.cvr_penalty(
            self.config.objective.cvr,
            self._regularized_center(student),
            running_center=self.running_center,
            base_center=self.base_center,
            running_magnitude=self.running_magnitude,
        )

    def _regularized_center(self, student: Embeddings[Any]) -> Tensor:
        return student.center

    @property
    def follows_skipped_steps(self) -> bool:
        """True if the penalty looks at the running center or magnitude."""
        return self.config.objective.cvr in ("ema", "hinge")

    @torch.no_grad()
    def update_running_stats(self, embeddings: Embeddings[Any]) -> None:
        """Update the running center and magnitude, unless the step is not finite."""
        center, magnitude = embeddings.center.detach(), embeddings.magnitudes[0]
        weight, finite = torch.where(self.seen, 1 - clustering.CVR_EMA_BETA, 1.0), magnitude.isfinite()
        for running, value in ((self.running_center, center), (self.running_magnitude, magnitude)):
            running.copy_(torch.where(finite, running.lerp(value, weight), running))
        self.seen |= finite

    def collapsed(self, row: dict[str, Any]) -> str | None:
        """Return the reason if all embeddings have become one, else None. row: metrics of the step."""
        return "the embeddings of all images point one way" if row["center"] > COLLAPSED else None

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Return the LoRA matrices; with --tune full the model's weights."""
        return list(trainable.trained(self.vit).values())

    def other_parameters(self) -> list[nn.Parameter]:
        """Return what trains besides and is discarded afterwards: the head, and prototypes that are learned."""
        learned = [self.prototypes] if isinstance(self.prototypes, nn.Parameter) else []
        return [*self.head.parameters(), *learned]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return AdamW's groups: adapters without weight decay, the head with it."""
        groups: list[dict[str, Any]] = [{"params": self.adapter_parameters(), "weight_decay": 0.0}]
        if others := self.other_parameters():
            groups.append({"params": others, "weight_decay": self.config.optimization.weight_decay})
        return groups

    def gradient_parts(self) -> list[tuple[list[nn.Parameter], float]]:
        """Return the adapters, which are clipped, and the head, which is not."""
        return [(self.adapter_parameters(), self.config.optimization.clip), (self.other_parameters(), 0.0)]
