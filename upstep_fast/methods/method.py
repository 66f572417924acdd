"""The protocol between a method and the training loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from upstep_fast.model.lora import LoraLinear

if TYPE_CHECKING:
    from upstep_fast.data.loading.loader import Batch
    from upstep_fast.engine.block import Memory


class Embeddings(Protocol):
    """What `embed` returns: enough for the gate and the metrics, and what `loss` wants of it."""

    @property
    def magnitudes(self) -> Tensor:
        """[1 + V] fp32, detached: the centre's magnitude, then that of each view's centre."""

    @property
    def local_stats(self) -> Tensor:
        """[n] fp32, detached: what the gate's statistics are made of, of this rank; to be summed over the ranks."""

    def with_global_stats(self, stats: Tensor) -> Any:
        """The same with the statistics of all ranks' images. Losses are means over the ranks."""

    def detach(self) -> Any:
        """The same without gradients, for a step that is skipped."""


class Method(Protocol):
    """An nn.Module that holds the adapted model and all that training changes. In the order of one step:

    `schedule`, `views`, `embed`, the gate; on an update step `loss`, backward, the optimizer, `after_update`;
    `update_running_stats`.
    """

    vit: Any
    adapters: dict[str, LoraLinear]
    num_microbatches: int  # of the model over a batch; more take less memory and give the same result (microbatch.py)

    def to(self, device: torch.device) -> Self:
        """Move everything to the device."""

    def accelerate(self, dtype: torch.dtype, memory: Memory = "fast", fp8: bool = False) -> None:
        """Run what it can on the engine from now on; called once, on the device."""

    @property
    def needs_init(self) -> bool:
        """Whether `initialize_from_data` must see views of the data before the first step."""

    def initialize_from_data(self, views: Iterable[Any]) -> None:
        """Set what is computed once."""

    def schedule(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the learning rates and whatever else depends on the step; group 0 has the rate that is reported."""

    def views(self, batch: Batch, device: torch.device) -> Any:
        """The views of a batch that `embed` wants, drawn from (seed, epoch, index) alone."""

    @property
    def min_side(self) -> int | None:
        """Pixels that `views` needs of an image's sides; larger JPEGs may be decoded at a fraction of their size."""

    def images(self, views: Any) -> Tensor:
        """Of these views one per image, [B, C, H, W], for a look at the features."""

    def embed(self, views: Any) -> Any:
        """The forward pass that the gate looks at: an `Embeddings`."""

    def num_stats(self, views: int) -> int:
        """The length of `Embeddings.local_stats` for so many views."""

    def loss(self, student: Any, teacher: Any = None) -> Tensor:
        """The objective of an open step, a scalar in fp32; of several ranks, the mean over them is the whole's."""

    def metrics(self) -> dict[str, Any]:
        """More numbers of the last `loss` for metrics.jsonl: Python's, or scalars on the device, which can wait."""

    def after_update(self, applied: Tensor) -> None:
        """Called after a step of the optimizer. applied: bool scalar on the device, False if no weight moved."""

    def update_running_stats(self, embedded: Any) -> None:
        """Called at the end of every step, skipped ones and those that are not finite too."""

    def collapsed(self, row: dict[str, Any]) -> str | None:
        """A word on why features tell images no longer apart, if so; row: the step's, with `center` and figures."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """AdamW's groups."""

    def gradient_parts(self) -> list[tuple[list[nn.Parameter], float]]:
        """What trains, in parts, each with the largest norm of its gradient; 0: not clipped."""

    def must_receive_grad(self) -> dict[str, nn.Parameter]:
        """What must have received a gradient by the end, by the name that an error message gives it."""

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the optimizer's moments; they are read and written in place."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As nn.Module."""

    def weights_to_save(self) -> AbstractContextManager[nn.Module]:
        """Within this context: the model with the weights that `result_files` writes."""

    def result_files(self) -> dict[str, bytes]:
        """The files of the adapter folder, by name."""
