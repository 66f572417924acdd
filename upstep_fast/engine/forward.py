"""Forward only: base features, evaluation, steps known to be skipped, teachers. Adapters merged, nothing kept.

The adapters are merged when they have changed, not at every call. On a GPU the whole model is one compiled graph,
replayed as a CUDA graph (torch.compile, max-autotune); on a CPU it runs as it is unless compilation is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .block import Merged, forward_only, merge_all, run_blocks
from .fold import FoldedBlock

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Ready:
    """A folded block with its adapters merged."""

    block: FoldedBlock
    merged: list[Merged]
    trained: list[Tensor]

    def update(self, new: _Ready) -> None:
        """Writes `new` into the same memory, which a CUDA graph reads."""
        for before, now in zip(self.merged, new.merged, strict=True):
            if before.weight is not now.weight:  # those without an adapter are the frozen weights themselves
                before.weight.copy_(now.weight)
                before.bias.copy_(now.bias)
        for tensor, value in zip(self.trained, new.trained, strict=True):
            tensor.copy_(value)


def make_forward_only(
    blocks: Sequence[FoldedBlock | nn.Module], embed: Map, head: Map, device: torch.device, compiled: bool | None = None
) -> Map:
    """images [B, C, H, W] -> features [B, D] in fp32, without gradients.

    embed: images -> tokens [B, N, D] in the compute type. head: tokens after the last block -> features. compiled:
    None: on a GPU. A change of an adapter is seen by its version counter, which optimizers and in-place operations
    move; what is written through `.data` is not seen.
    """
    compiled = device.type == "cuda" if compiled is None else compiled
    ready: dict[int, _Ready] = {}
    versions: list[int] = []
    sources = [p for block in blocks if isinstance(block, FoldedBlock) for p in block.sources()]

    def refresh() -> None:
        now = [p._version for p in sources]
        if ready and now == versions:
            return
        for index, block in enumerate(blocks):
            if isinstance(block, FoldedBlock):
                new = _merge(block)
                ready.setdefault(index, new).update(new)
        versions[:] = now

    def forward(images: Tensor) -> Tensor:
        def run(x: Tensor, delta: Tensor | None, index: int) -> tuple[Tensor, Tensor]:
            r = ready[index]
            return forward_only(x, delta, r.block, r.merged, r.trained, r.block.draw_paths(x))

        return head(run_blocks(embed(images), blocks, run))

    if not compiled:
        call: Map = forward
    elif device.type == "cuda":
        call = torch.compile(forward, mode="max-autotune")
    else:
        call = torch.compile(forward)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        refresh()
        # a CUDA graph writes every result to the same place
        return call(images).clone() if compiled else call(images)

    return features


def _merge(block: FoldedBlock) -> _Ready:
    trained = [tensor.detach() for tensor in block.trained()]
    return _Ready(block, merge_all(block, trained), trained)
