"""ExPLoRA with DINOv2's objective (Oquab et al. 2023): a student follows a moving average of itself.

    student: 2 global crops, some patches masked, and n local crops; teacher: the global crops whole, no gradient
    L = DINO(class tokens) + w_i iBOT(masked patches) + w_k sum over the global crops of KoLeo(class tokens)
    teacher <- m teacher + (1 - m) student, after each update; m rises to 1

The teacher has adapters of its own, which are never merged: merged, it would ignore the average of their factors
(METHODS 2.2). The heads start from scratch, since DINOv2's are not published; so does the mask token, which timm's
models do not keep. Both are thrown away afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from upstep_fast.config.explora import Dinov2Config
from upstep_fast.data.loading.loader import Batch
from upstep_fast.engine.block import Memory
from upstep_fast.kernels.sinkhorn import sinkhorn
from upstep_fast.methods import crops, trainable
from upstep_fast.methods.crops import GLOBAL_VIEWS
from upstep_fast.methods.embeddings import Embeddings, embedded
from upstep_fast.methods.explora import crops as explora_crops
from upstep_fast.methods.explora import unfreeze as explora
from upstep_fast.methods.explora.crops import Crops
from upstep_fast.methods.explora.dino_head import Head, scores
from upstep_fast.methods.explora.teacher import averaged, copied, own_weights, teacher_of
from upstep_fast.methods.explora.tokens import Encoder, embed, seen
from upstep_fast.methods.losses import dino
from upstep_fast.methods.schedules import cosine, linear_warmup, warmup_cosine
from upstep_fast.model import lora
from upstep_fast.model.backbone import Backbone
from upstep_fast.runtime import distributed

log = logging.getLogger("upstep_fast")

CENTRE_MOMENTUM = 0.9  # of softmax centring, as in DINO
FLAT, ONE_DIRECTION = 0.999, 0.999  # teacher entropy and centre magnitude that mean collapse


@dataclass(frozen=True, kw_only=True)
class Student(Embeddings):
    """The student's view of a batch; z: unit features of the global crops."""

    crops: Crops
    of_crops: Tensor  # [2 + n, B, D] features of all crops
    patches: Tensor  # [M, D] masked patches, in the order of `crops.masked`


class ExploraDinov2(nn.Module):
    """Student, teacher and heads; what training changes and a checkpoint holds."""

    class_centre: Tensor
    patch_centre: Tensor

    def __init__(self, backbone: Backbone, config: Dinov2Config):
        super().__init__()
        self.config, self.num_microbatches = config, 1
        self.recipes = crops.recipes(config, backbone)
        vit: Any = backbone.vit
        self.grid = tuple(vit.patch_embed.grid_size)
        size = (backbone.width, config.objective.head_hidden, config.objective.head_dim, config.objective.prototypes)
        # parts of torch.nn draw from the global generator: set it for this block only
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.runtime.seed)
            self.adapters = explora.prepare(backbone, config)
            self.head = Head(*size)
            self.patch_head = Head(*size) if config.dinov2.separate_heads else None
        self.vit = vit
        self.mask_token = nn.Parameter(torch.zeros(vit.embed_dim))
        self.teacher = teacher_of(vit, config.dinov2.ema)
        self.teacher_head = copied(self.head)
        self.teacher_patch_head = copied(self.patch_head) if self.patch_head else None
        pairs = ((self.teacher, vit), (self.teacher_head, self.head), (self.teacher_patch_head, self.patch_head))
        self._averaged = [pair for mine, theirs in pairs for pair in averaged(mine, theirs)]
        for average, _ in self._averaged:
            average.requires_grad_(False)
        self.register_buffer("class_centre", torch.zeros(config.objective.prototypes))
        self.register_buffer("patch_centre", torch.zeros(config.objective.prototypes))
        self.encoder, self.teacher_encoder = Encoder(vit), Encoder(self.teacher)
        self.temperature, self.momentum = config.dinov2.teacher_temperature_start, config.dinov2.momentum
        self._figures: dict[str, Tensor] = {}
        self._entropy = 0.0  # of the last targets
        self._sums: list[Tensor] = []  # of the teacher's scores and how many they are, for softmax centring

    def accelerate(self, dtype: torch.dtype, memory: Memory = "fast", fp8: bool = False) -> None:
        """Run the frozen blocks on the engine from now on."""
        if not explora.accelerate(self.encoder, dtype, memory, fp8):
            return
        # what the teacher averages changes too: the engine must refer to it as to what trains, not fold it away
        own = [p for p in self.teacher.parameters() if id(p) not in {id(q) for q in self.vit.parameters()}]
        for p in own:
            p.requires_grad_(True)
        self.teacher_encoder.accelerate(dtype, memory, fp8)
        for p in own:
            p.requires_grad_(False)
        log.info("engine: the blocks trained whole (%s) run as plain modules", self.config.explora.unfreeze)

    @property
    def needs_init(self) -> bool:
        """Nothing is computed before the first step."""
        return False

    def initialize_from_data(self, views: Iterable[Crops]) -> None:
        """Nothing."""

    def schedule(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Learning rate, weight decay, the teacher's temperature and momentum of this step."""
        c, run = self.config.dinov2, self.config.optimization
        lr = run.lr * warmup_cosine(step, run.num_steps, run.warmup)
        stands_still = step < (c.freeze_last_layer * run.num_steps if c.freeze_last_layer < 1 else c.freeze_last_layer)
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if group["last"] and stands_still else lr
            group["weight_decay"] = cosine(step, run.num_steps, run.weight_decay, c.weight_decay_end) * group["decays"]
        start, end = c.teacher_temperature_start, c.teacher_temperature
        self.temperature = linear_warmup(step, run.num_steps, c.teacher_warmup, start, end)
        self.momentum = cosine(step, run.num_steps, c.momentum, 1.0)

    def views(self, batch: Batch, device: torch.device) -> Crops:
        """The crops of a batch and the masks of the global ones."""
        return explora_crops.draw(batch, self.recipes, self.grid, self.config, device)

    @property
    def min_side(self) -> int:
        """Pixels that the views need of an image's sides."""
        return max(recipe.min_side for recipe, _ in self.recipes)

    def images(self, views: Crops) -> Tensor:
        """The first global crop of each image."""
        return views.whole[0]

    def embed(self, views: Crops) -> Student:
        """The student's forward pass over all crops."""
        whole = embed(
            self.vit, views.whole.flatten(0, 1), masked=views.masked.flatten(0, 1), mask_token=self.mask_token
        )
        local = [embed(self.vit, views.local.flatten(0, 1))] if len(views.local) else []
        features, patches = seen(self.vit, self.encoder, [whole, *local], views.places)
        of_all = features.unflatten(0, (-1, views.whole.shape[1]))
        of_gate = embedded(of_all[:GLOBAL_VIEWS])
        own = {field.name: getattr(of_gate, field.name) for field in fields(Embeddings)}
        return Student(**own, crops=views, of_crops=of_all, patches=patches)

    def num_stats(self, views: int) -> int:
        """How many numbers `Embeddings.local_stats` of so many views are."""
        return views * self.vit.num_features + 1

    def loss(self, student: Student, teacher: Student | None = None) -> Tensor:
        """DINO + iBOT + KoLeo, a scalar in fp32."""
        c, temperature, crops = self.config.dinov2, self.config.objective.temperature, student.crops
        num_images = crops.masked.shape[0] * crops.masked.shape[1]
        class_targets, patch_targets = self._targets(crops)
        of_class, of_patch = scores(self.head, self.patch_head, student.of_crops, student.patches)
        total = dino.class_token_loss(of_class, class_targets, temperature)
        self._figures = {"dino": total.detach(), "teacher_entropy": dino.entropy(class_targets)}
        if c.ibot_weight:
            ibot = dino.patch_loss(of_patch, patch_targets, crops.weights, num_images, temperature)
            self._figures["ibot"] = ibot.detach()
            total = total + c.ibot_weight * ibot
        if c.koleo_weight:
            koleo = torch.stack([dino.koleo(x) for x in student.of_crops[:GLOBAL_VIEWS]]).sum()
            self._figures["koleo"] = koleo.detach()
            total = total + c.koleo_weight * koleo
        return total

    @torch.no_grad()
    def _targets(self, crops: Crops) -> tuple[Tensor, Tensor]:
        """The teacher's targets: of the global crops [2, B, K], of the masked patches [M, K]."""
        teacher = self.teacher
        whole = embed(teacher, crops.whole.flatten(0, 1))
        features, patches = seen(teacher, self.teacher_encoder, [whole], crops.places)
        both = scores(self.teacher_head, self.teacher_patch_head, features, patches)
        of_class, of_patch = (x.float() for x in both)
        if self.config.dinov2.centring == "softmax":
            self._sums = [torch.cat([x.sum(0), x.new_full((1,), len(x))]) for x in (of_class, of_patch)]
            targets = (
                dino.softmax_targets(of_class, self.class_centre, self.temperature),
                dino.softmax_targets(of_patch, self.patch_centre, self.temperature),
            )
        else:
            rounds, reducer = self.config.objective.sinkhorn_iterations, distributed.reducer()
            targets = (
                sinkhorn(of_class, self.temperature, rounds, all_reduce=reducer),
                sinkhorn(of_patch, self.temperature, rounds, all_reduce=reducer),
            )
        return targets[0].view(GLOBAL_VIEWS, -1, targets[0].shape[-1]), targets[1]

    def metrics(self) -> dict[str, Any]:
        """The parts of the last loss and the state of the teacher."""
        return self._figures | {"teacher_temperature": self.temperature, "momentum": self.momentum}

    @torch.no_grad()
    def after_update(self, applied: Tensor) -> None:
        """Move the teacher toward the student, and its centres."""
        share = (1 - self.momentum) * applied
        for average, value in self._averaged:
            average.lerp_(value, share)
        if self.config.dinov2.ema == "products":
            for name, adapter in self.adapters.items():
                weight = self.teacher.get_parameter(f"{name}.weight")
                weight.lerp_((adapter.base.weight + adapter.delta()).to(weight), share)
        # no sums with Sinkhorn
        for centre, sums in zip((self.class_centre, self.patch_centre), self._sums, strict=False):
            if distributed.size() > 1:
                distributed.reduce(sums)
            moved = centre.lerp(sums[:-1] / sums[-1], 1 - CENTRE_MOMENTUM)
            centre.copy_(torch.where(applied & (sums[-1] > 0), moved, centre))  # a batch may have no masked patch

    def update_running_stats(self, embedded: Embeddings) -> None:
        """Nothing runs along."""

    def collapsed(self, row: dict[str, Any]) -> str | None:
        """A word on why the features tell images no longer apart, if they do not."""
        self._entropy = row.get("teacher_entropy", self._entropy)  # a skipped step has none
        if row["center"] > ONE_DIRECTION:
            return "the features of all images point one way"
        if self._entropy > FLAT:
            return "the teacher's targets are the same for every prototype"
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Matrices, then what has no weight decay, then the prototypes, which stand still at first."""
        named = trainable.trained(self)
        last = {name for name in named if name.endswith("prototypes")}
        of_decay = {True: [], False: []}  # type: dict[bool, list[nn.Parameter]]
        for name, p in named.items():
            if name not in last:
                of_decay[trainable.decays(name, p)].append(p)
        groups: list[dict[str, Any]] = [{"params": of_decay[d], "decays": d, "last": False} for d in (True, False)]
        return [*groups, {"params": [named[name] for name in sorted(last)], "decays": True, "last": True}]

    def gradient_parts(self) -> list[tuple[list[nn.Parameter], float]]:
        """The backbone and each head, clipped apart as in DINOv2."""
        heads = [head for head in (self.head, self.patch_head) if head is not None]
        backbone = [*trainable.trained(self.vit).values(), self.mask_token]
        clip = self.config.optimization.clip
        return [(part, clip) for part in (backbone, *(list(head.parameters()) for head in heads))]

    def must_receive_grad(self) -> dict[str, nn.Parameter]:
        """What must receive a gradient."""
        return trainable.must_receive_grad(self.vit, self.adapters)

    def state_tensors(self) -> dict[str, Tensor]:
        """The student, the heads, the teacher and the centres."""
        own = {id(average) for average, _ in self._averaged}
        if self.config.dinov2.ema == "products":
            own |= {id(p) for p in own_weights(self.teacher, self.adapters)}
        averages = {name: p for name, p in self.named_parameters() if id(p) in own}
        return trainable.trained(self) | averages | dict(self.named_buffers(recurse=False))

    def weights_to_save(self) -> AbstractContextManager[nn.Module]:
        """The teacher, as the authors' code saves it, or the student."""
        return nullcontext(self.teacher if self.config.dinov2.save == "teacher" else self.vit)

    def result_files(self) -> dict[str, bytes]:
        """That model's adapters and what else is trained, as PEFT reads them, and bare parameters."""
        with self.weights_to_save() as model:
            return trainable.result_files(model, lora.find(model), self.config.model.name, trainable.trained(self.vit))
