"""ExPLoRA with DINOv2's objective (Oquab et al. 2023): a student follows a moving average of itself.

    student: 2 global crops, some patches masked, and n local crops; teacher: the global crops unmasked, no gradient
    L = DINO(class tokens) + w_i iBOT(masked patches) + w_k sum over the global crops of KoLeo(class tokens)
    teacher <- m teacher + (1 - m) student, after each update; m rises to 1

The teacher has adapters of its own, which are never merged: merged, it would ignore the average of their factors
(METHODS 2.2). The heads start from scratch, since DINOv2's are not published; so does the mask token, which timm's
models do not keep. Both are discarded afterwards.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from upstep_fast.config.explora import Dinov2Config
from upstep_fast.data.loading.loader import Batch
from upstep_fast.engine.block import Memory
from upstep_fast.kernels.sinkhorn import sinkhorn
from upstep_fast.methods import crops, trainable
from upstep_fast.methods.crops import GLOBAL_VIEWS
from upstep_fast.methods.embeddings import Embeddings, unit_embeddings
from upstep_fast.methods.explora import crops as explora_crops
from upstep_fast.methods.explora import unfrozen_blocks as explora
from upstep_fast.methods.explora.crops import MaskedCrops
from upstep_fast.methods.explora.dino_head import Head, scores
from upstep_fast.methods.explora.teacher import averaged_pairs, copy_module, make_teacher, own_weights
from upstep_fast.methods.explora.tokens import Encoder, embed, encode
from upstep_fast.methods.losses import dino
from upstep_fast.methods.method import Method
from upstep_fast.methods.schedules import cosine, learning_rate, linear_warmup
from upstep_fast.model.backbone import Backbone
from upstep_fast.runtime import distributed

log = logging.getLogger("upstep_fast")

CENTER_MOMENTUM = 0.9  # of softmax centering, as in DINO
MAX_ENTROPY, MAX_CENTER = 0.999, 0.999  # of the teacher's targets and the student's features; above: collapse


@dataclass(frozen=True)
class StudentOutput:
    """The student's output for all crops of a batch of B images."""

    crops: MaskedCrops
    features: Tensor  # [2 + n, B, D] of global and local crops
    patches: Tensor  # [M, D] tokens of the masked patches, in the order of `crops.indices`


class ExploraDinov2(Method):
    """Student, teacher and heads."""

    config: Dinov2Config
    class_center: Tensor
    patch_center: Tensor
    names_on_disk: ClassVar = {"class_center": "class_centre", "patch_center": "patch_centre"}

    def __init__(self, backbone: Backbone, config: Dinov2Config):
        super().__init__(config, crops.view_configs(config, backbone))
        vit: Any = backbone.vit
        self.grid, self.embedding_dim = tuple(vit.patch_embed.grid_size), vit.num_features
        size = (backbone.width, config.objective.head_hidden, config.objective.head_dim, config.objective.prototypes)
        # parts of torch.nn draw from the global generator: set it for this block only
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.runtime.seed)
            self.adapters = explora.prepare(backbone, config)
            self.head = Head(*size)
            self.patch_head = Head(*size) if config.dinov2.separate_heads else None
        self.vit = vit
        self.mask_token = nn.Parameter(torch.zeros(vit.embed_dim))
        self.teacher = make_teacher(vit, config.dinov2.ema)
        self.teacher_head = copy_module(self.head)
        self.teacher_patch_head = copy_module(self.patch_head) if self.patch_head else None
        pairs = ((self.teacher, vit), (self.teacher_head, self.head), (self.teacher_patch_head, self.patch_head))
        self._averaged = [pair for teacher, student in pairs for pair in averaged_pairs(teacher, student)]
        for average, _ in self._averaged:
            average.requires_grad_(False)
        self.register_buffer("class_center", torch.zeros(config.objective.prototypes))
        self.register_buffer("patch_center", torch.zeros(config.objective.prototypes))
        self.encoder, self.teacher_encoder = Encoder(vit), Encoder(self.teacher)
        self.temperature, self.momentum = config.dinov2.teacher_temperature_start, config.dinov2.momentum
        self._metrics: dict[str, Tensor] = {}
        self._entropy = 0.0  # of the last targets
        self._score_sums: list[Tensor] = []  # of the teacher's scores, with their number, for softmax centering

    def accelerate(self, dtype: torch.dtype, memory: Memory = "fast", fp8: bool = False) -> None:
        """Run the frozen blocks on the engine in `dtype`."""
        if not explora.accelerate(self.encoder, dtype, memory, fp8):
            return
        # what the teacher averages changes too: the engine must refer to it as to what trains, not fold it away
        shared = {id(q) for q in self.vit.parameters()}
        teachers = [p for p in self.teacher.parameters() if id(p) not in shared]
        for p in teachers:
            p.requires_grad_(True)
        self.teacher_encoder.accelerate(dtype, memory, fp8)
        for p in teachers:
            p.requires_grad_(False)
        log.info("engine: the fully trained blocks (%s) run as plain modules", self.config.explora.unfreeze)

    def schedule(self, optimizer: torch.optim.Optimizer, step: float) -> None:
        """Set learning rate, weight decay, the teacher's temperature and its momentum."""
        c, run = self.config.dinov2, self.config.optimization
        lr = learning_rate(run, step)
        is_frozen = step < (c.freeze_last_layer * run.num_steps if c.freeze_last_layer < 1 else c.freeze_last_layer)
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if group["last"] and is_frozen else lr
            group["weight_decay"] = cosine(step, run.num_steps, run.weight_decay, c.weight_decay_end) * group["decays"]
        start, end = c.teacher_temperature_start, c.teacher_temperature
        self.temperature = linear_warmup(step, run.num_steps, c.teacher_warmup, start, end)
        self.momentum = cosine(step, run.num_steps, c.momentum, 1.0)

    def views(self, batch: Batch, device: torch.device) -> MaskedCrops:
        """Return the crops of a batch with the masks of the global ones."""
        return explora_crops.draw(batch, self.view_configs, self.grid, self.config, device)

    def embed(self, views: MaskedCrops) -> Embeddings[StudentOutput]:  # type: ignore[override]
        """Run the student over all crops. The embeddings are the features of the global crops."""
        masked, token = views.masked.flatten(0, 1), self.mask_token
        global_tokens = embed(self.vit, views.pixels.flatten(0, 1), masked=masked, mask_token=token)
        local_tokens = [embed(self.vit, views.local.flatten(0, 1))] if len(views.local) else []
        features, patches = encode(self.vit, self.encoder, [global_tokens, *local_tokens], views.indices)
        features = features.unflatten(0, (-1, views.num_images))
        return unit_embeddings(features[:GLOBAL_VIEWS], StudentOutput(views, features, patches))

    def loss(self, student: Embeddings[StudentOutput], teacher: Embeddings[StudentOutput] | None = None) -> Tensor:
        """Return DINO + iBOT + KoLeo, a scalar in fp32."""
        c, temperature, output = self.config.dinov2, self.config.objective.temperature, student.extras
        crops = output.crops
        class_targets, patch_targets = self._targets(crops)
        class_scores, patch_scores = scores(self.head, self.patch_head, output.features, output.patches)
        total = dino.class_token_loss(class_scores, class_targets, temperature)
        self._metrics = {"dino": total.detach(), "teacher_entropy": dino.entropy(class_targets)}
        if c.ibot_weight:
            num_crops = crops.masked.shape[0] * crops.masked.shape[1]
            ibot = dino.patch_loss(patch_scores, patch_targets, crops.weights, num_crops, temperature)
            self._metrics["ibot"] = ibot.detach()
            total = total + c.ibot_weight * ibot
        if c.koleo_weight:
            koleo = torch.stack([dino.koleo(x) for x in output.features[:GLOBAL_VIEWS]]).sum()
            self._metrics["koleo"] = koleo.detach()
            total = total + c.koleo_weight * koleo
        return total

    @torch.no_grad()
    def _targets(self, crops: MaskedCrops) -> tuple[Tensor, Tensor]:
        """Compute the teacher's targets: of the global crops [2, B, K], of the masked patches [M, K]."""
        tokens = embed(self.teacher, crops.pixels.flatten(0, 1))
        features, patches = encode(self.teacher, self.teacher_encoder, [tokens], crops.indices)
        both = scores(self.teacher_head, self.teacher_patch_head, features, patches)
        class_scores, patch_scores = (x.float() for x in both)
        if self.config.dinov2.centring == "softmax":
            self._score_sums = [torch.cat([x.sum(0), x.new_full((1,), len(x))]) for x in (class_scores, patch_scores)]
            targets = (
                dino.softmax_targets(class_scores, self.class_center, self.temperature),
                dino.softmax_targets(patch_scores, self.patch_center, self.temperature),
            )
        else:
            rounds, reducer = self.config.objective.sinkhorn_iterations, distributed.reducer()
            targets = (
                sinkhorn(class_scores, self.temperature, rounds, all_reduce=reducer),
                sinkhorn(patch_scores, self.temperature, rounds, all_reduce=reducer),
            )
        return targets[0].view(GLOBAL_VIEWS, -1, targets[0].shape[-1]), targets[1]

    def metrics(self) -> dict[str, Any]:
        """Return the parts of the last loss and the state of the teacher."""
        return self._metrics | {"teacher_temperature": self.temperature, "momentum": self.momentum}

    @torch.no_grad()
    def after_update(self, applied: Tensor) -> None:
        """Move the teacher toward the student, and the centers toward the teacher's mean scores."""
        share = (1 - self.momentum) * applied
        for average, value in self._averaged:
            average.lerp_(value, share)
        if self.config.dinov2.ema == "products":
            for name, adapter in self.adapters.items():
                weight = self.teacher.get_parameter(f"{name}.weight")
                weight.lerp_((adapter.base.weight + adapter.delta()).to(weight), share)
        # no sums with Sinkhorn
        for center, sums in zip((self.class_center, self.patch_center), self._score_sums, strict=False):
            if distributed.size() > 1:
                distributed.reduce(sums)
            moved = center.lerp(sums[:-1] / sums[-1], 1 - CENTER_MOMENTUM)
            center.copy_(torch.where(applied & (sums[-1] > 0), moved, center))  # a batch may have no masked patch

    def collapsed(self, row: dict[str, Any]) -> str | None:
        """Return the reason if features or targets have collapsed, else None. row: metrics of the step."""
        self._entropy = row.get("teacher_entropy", self._entropy)  # a skipped step has none
        if row["center"] > MAX_CENTER:
            return "the features of all images point one way"
        if self._entropy > MAX_ENTROPY:
            return "the teacher's targets are the same for every prototype"
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return AdamW's groups: matrices, what has no weight decay, and the prototypes, frozen at first."""
        named = trainable.trained(self)
        last = {name: p for name, p in sorted(named.items()) if name.endswith("prototypes")}
        parts = trainable.by_decay({name: p for name, p in named.items() if name not in last})
        groups: list[dict[str, Any]] = [{"params": parts[d], "decays": d, "last": False} for d in (True, False)]
        return [*groups, {"params": list(last.values()), "decays": True, "last": True}]

    def gradient_parts(self) -> list[tuple[list[nn.Parameter], float]]:
        """Return the backbone and each head, clipped separately as in DINOv2."""
        heads = [list(head.parameters()) for head in (self.head, self.patch_head) if head is not None]
        backbone = [*trainable.trained(self.vit).values(), self.mask_token]
        return [(part, self.config.optimization.clip) for part in (backbone, *heads)]

    def state_tensors(self) -> dict[str, Tensor]:
        """Return a checkpoint's tensors by name: student, heads, teacher and centers."""
        averages = {id(average) for average, _ in self._averaged}
        if self.config.dinov2.ema == "products":
            averages |= {id(p) for p in own_weights(self.teacher, self.adapters)}
        return super().state_tensors() | {name: p for name, p in self.named_parameters() if id(p) in averages}

    def weights_to_save(self) -> AbstractContextManager[nn.Module]:
        """Return a context that yields the teacher, as the authors' code saves it, or the student."""
        return nullcontext(self.teacher if self.config.dinov2.save == "teacher" else self.vit)
