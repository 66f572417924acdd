"""Forward without gradients: base features, evaluation, skipped steps, teachers. Nothing is saved.

On a GPU the whole model is one compiled graph, replayed as a CUDA graph (torch.compile, reduce-overhead: max-autotune
would take minutes before the first image); on a CPU it is compiled only on request. Where the features are the class
token, on a CPU the last block computes it alone behind attention, with gradients too. For features of images (not those
that training compares with its own, bit for bit), a CPU has its weights packed (packed_weights.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from upstep_fast.engine.block import run_block, run_blocks
from upstep_fast.engine.fold import FoldedBlock
from upstep_fast.engine.merge import MergedBlock
from upstep_fast.engine.packed_weights import can_pack, pack
from upstep_fast.engine.rotary import Ropes

TensorFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ForwardOnly:
    """Forward passes without gradients, from images and from tokens."""

    features: TensorFunction  # images [B, C, H, W] or their patches -> features [B, D] in fp32
    of_tokens: Callable[[Tensor, Ropes], Tensor]  # the same from the first block's input [B, N, D], never compiled


def make_forward_only(
    blocks: Sequence[FoldedBlock | nn.Module],
    merge_adapters: Callable[[], dict[int, MergedBlock]],
    embed: TensorFunction,
    ropes: Callable[[Tensor], Ropes],
    head: TensorFunction,
    device: torch.device,
    compiled: bool | None = None,
    packs: bool = False,
    first: Callable[[], int | None] = lambda: None,
) -> ForwardOnly:
    """Return functions from images [B, C, H, W] and from tokens to features [B, D] in fp32, without gradients.

    merge_adapters: gives the folded blocks with their adapters merged (merge.py). embed: images -> tokens [B, N, D] in
    the compute type. ropes: images -> rotary tables (rotary.py). head: tokens after the last block -> features.
    compiled: use torch.compile; None: on a GPU. packs: multiply by packed weights where this can be done; first: tokens
    at the front that `head` takes now, None: all. Both change the rounding, in fp32 by about 1e-6 of a feature.
    """
    compiled = device.type == "cuda" if compiled is None else compiled
    packs = packs and not compiled and can_pack(blocks, device)
    weights = functools.cache(lambda: pack(merge_adapters())) if packs else merge_adapters
    weights = _static(weights) if compiled else weights

    def forward(images: Tensor, merged: dict[int, MergedBlock], tables: Ropes, count: int | None) -> Tensor:
        return head(through(embed(images), blocks, merged, tables, count))

    mode = "reduce-overhead" if device.type == "cuda" else None
    call = torch.compile(forward, mode=mode) if compiled else forward

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        result = call(images, weights(), ropes(images), first())
        return result.clone() if compiled else result  # a CUDA graph writes every result to the same memory

    @torch.no_grad()
    def of_tokens(x: Tensor, tables: Ropes) -> Tensor:
        return head(through(x, blocks, weights(), tables, first()))

    return ForwardOnly(features, of_tokens)


def _static(merge_adapters: Callable[[], dict[int, MergedBlock]]) -> Callable[[], dict[int, MergedBlock]]:
    """Return `merge_adapters` with its weights marked as staying in place: a CUDA graph need not copy them then."""

    @functools.cache
    def mark() -> None:
        tensors = [t for block in merge_adapters().values() for p in block.projections for t in p.tensors()]
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)

    def weights() -> dict[int, MergedBlock]:
        mark()
        return merge_adapters()

    return weights


def through(
    x: Tensor,
    blocks: Sequence[FoldedBlock | nn.Module],
    merged: dict[int, MergedBlock],
    tables: Ropes = None,
    count: int | None = None,
) -> Tensor:
    """Run the blocks on tokens [B, N, D]. Returns the first `count` of each image, None: all."""

    def run(x: Tensor, delta: Tensor | None, index: int) -> tuple[Tensor, Tensor]:
        return run_block(x, delta, merged[index], ropes=tables, first=count if index + 1 == len(blocks) else None)

    return run_blocks(x, blocks, run, ropes=tables)
