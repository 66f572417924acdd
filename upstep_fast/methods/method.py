"""The base class of adaptation methods: the interface between a method and the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.data.views.types import Views
from upstep_fast.data.views.view_config import ViewConfig
from upstep_fast.kernels.patchify import unpatchify_reference
from upstep_fast.methods import trainable
from upstep_fast.methods.embeddings import Embeddings
from upstep_fast.methods.schedules import learning_rate
from upstep_fast.methods.view_bank import TokenBank
from upstep_fast.model import lora
from upstep_fast.model.lora import LoraLinear

if TYPE_CHECKING:
    from upstep_fast.data.loading.loader import Batch
    from upstep_fast.engine.block import Memory


class Method(nn.Module, ABC):
    """The adapted model with all that training changes.

    Calls in the order of one step: `schedule`, `views`, `embed`, the gate; on an update step `loss`, backward, the
    optimizer, `after_update`; `update_running_stats`. The defaults are those of a method without running values,
    teacher or data-dependent initialization.

    config: of the run. view_configs: the kinds of views, the global ones first, and the number of each.
    """

    vit: Any
    adapters: dict[str, LoraLinear]  # by module name
    embedding_dim: int  # d of `Embeddings.z`
    num_microbatches: int  # of a batch's forward pass; more need less memory, with equal results (microbatch.py)
    bank: TokenBank | None = None  # None: `views` are images or patches, not tokens
    base_record: str | None = None  # `model.adapter_base.record` of the base model, for the adapter's files
    model_record: str | None = None  # `model.adapter_base.model_record`, for the adapter's files
    names_on_disk: ClassVar[dict[str, str]] = {}  # tensors of a checkpoint whose attribute has another name

    def __init__(self, config: AdaptConfig, view_configs: list[tuple[ViewConfig, int]]):
        super().__init__()
        self.config, self.view_configs, self.num_microbatches = config, view_configs, 1
        self.patch_size, self.view_dtype = 0, torch.float32  # of views laid out as patches; 0: images

    @abstractmethod
    def accelerate(self, dtype: torch.dtype, memory: Memory = "fast", fp8: bool = False) -> None:
        """Run the backbone on the engine in `dtype`, where the engine can. Called once, on the final device."""

    @property
    def needs_init(self) -> bool:
        """True if `initialize_from_data` must see views of the data before the first step."""
        return False

    def initialize_from_data(self, views: Iterable[Views]) -> None:
        """Compute what depends on the data and is fixed from then on. views: of some batches."""

    def schedule(self, optimizer: torch.optim.Optimizer, step: float) -> None:
        """Set the learning rates, and whatever else depends on the step; group 0 has the rate that is logged."""
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optimization, step)

    @abstractmethod
    def views(self, batch: Batch, device: torch.device) -> Views:
        """Return the views of a batch that `embed` takes, a function of (seed, epoch, index) alone."""

    @property
    def min_side(self) -> int:
        """Pixels that `views` needs of an image's sides; larger JPEGs may be decoded at a fraction of their size."""
        return max(config.min_side for config, _ in self.view_configs)

    def first_view(self, views: Views) -> Tensor:
        """Return the first view of each image as an image, [B, C, H, W] in fp32."""
        if not views.is_patches:
            return views.pixels[0]
        return unpatchify_reference(views.pixels[0], self.patch_size, views.height, views.width, torch.float32)

    def pictures(self, batch: Batch, device: torch.device) -> Tensor:
        """Return a view of each image, as an image, [B, C, H, W] in fp32."""
        return self.first_view(self.views(batch, device))

    @abstractmethod
    def embed(self, views: Views) -> Embeddings[Any]:
        """Run the forward pass that the gate and `loss` look at."""

    def num_stats(self, num_views: int) -> int:
        """Return the length of `Embeddings.local_stats` for `num_views` views."""
        return num_views * self.embedding_dim + 1

    def with_global_stats(self, embeddings: Embeddings[Any], stats: Tensor) -> Embeddings[Any]:
        """Return `embeddings` with the statistics of all ranks' images. stats: `local_stats` summed over the ranks."""
        return embeddings.with_global_stats(stats)

    @abstractmethod
    def loss(self, student: Embeddings[Any], teacher: Embeddings[Any] | None = None) -> Tensor:
        """Return the objective of an update step, a scalar in fp32. The mean over the ranks is the whole batch's."""

    def select_images(self, teacher: Embeddings[Any], step: int) -> tuple[Embeddings[Any], Tensor]:
        """Return the teacher's embeddings and the indices [b] of the images whose other views train: all of them."""
        return teacher, torch.arange(teacher.z.shape[1], device=teacher.z.device)

    def metrics(self) -> dict[str, Any]:
        """Return more metrics of the last `loss`: numbers, or scalars on the device, which are read later."""
        return {}

    def after_update(self, applied: Tensor) -> None:
        """Follow a step of the optimizer. applied: bool scalar on the device, False if no weight changed."""

    @property
    def follows_skipped_steps(self) -> bool:
        """True if `update_running_stats` of a skipped step changes a later loss, so that each step must be embedded."""
        return False

    def update_running_stats(self, embeddings: Embeddings[Any]) -> None:
        """Update running values at the end of every step, skipped and non-finite ones included."""

    def collapsed(self, row: dict[str, Any]) -> str | None:
        """Return the reason if the features have collapsed, else None. row: metrics of the step."""
        return None

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return AdamW's parameter groups."""

    @abstractmethod
    def gradient_parts(self) -> list[tuple[list[nn.Parameter], float]]:
        """Return the trained parameters in parts, each with the largest norm of its gradient; 0: not clipped."""

    def must_receive_grad(self) -> dict[str, nn.Parameter]:
        """Return the parameters that must have received a gradient by the end, by their name in error messages."""
        return trainable.must_receive_grad(self.vit, self.adapters)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return a checkpoint's tensors besides the optimizer's moments, by name; resuming writes to them in place."""
        tensors = trainable.trained(self) | dict(self.named_buffers(recurse=False))
        return {self.names_on_disk.get(name, name): tensor for name, tensor in tensors.items()}

    def weights_to_save(self) -> AbstractContextManager[nn.Module]:
        """Return a context within which the model that it yields has the weights that `result_files` writes."""
        return nullcontext(self.vit)

    def result_files(self) -> dict[str, bytes]:
        """Return the files of the adapter folder by name, as PEFT reads them."""
        with self.weights_to_save() as vit:
            adapters = self.adapters if vit is self.vit else lora.find(vit)
            names = trainable.trained(self.vit)
            name = self.config.model.name
            return trainable.result_files(vit, adapters, name, names, self.base_record, self.model_record)
