"""A folded ViT in two parts: its frozen blocks, which give a view the same tokens in each pass, and those behind them.

    tokens = blocks[:K](embed(view))        once for each view, nothing is kept for backward
    f      = head(blocks[K:](tokens))       in every step

The frozen blocks run on ROWS views at a time, the last ones filled up: a product may be rounded otherwise with another
number of rows, and the tokens of a view must not depend on the views that are computed beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from upstep_fast.engine.fold import FoldedBlock
from upstep_fast.engine.inference import make_forward_only, through
from upstep_fast.engine.merge import make_merger
from upstep_fast.engine.packed_weights import can_pack, pack
from upstep_fast.engine.vit import EngineViT

ROWS = 16  # views


@dataclass(frozen=True)
class SplitViT:
    """Both parts of an EngineViT."""

    frozen: int  # K, number of blocks in the first part
    tokens: Callable[[Tensor], Tensor]  # images or their patches -> tokens [B, N, D], without gradients
    rest: EngineViT  # takes these tokens where the whole takes images


def split(whole: EngineViT) -> SplitViT | None:
    """Return both parts of `whole`; None if no block is frozen, none trains, or the frozen ones vary."""
    trains = [any(p.requires_grad for p in block.parameters()) for block in whole.vit.blocks]
    frozen = trains.index(True) if True in trains else 0
    first, others = whole.blocks[:frozen], whole.blocks[frozen:]
    # rotary tables follow the image, which the second part does not see
    if not frozen or any(not isinstance(block, FoldedBlock) or block.rotary for block in whole.blocks):
        return None
    if any(module.training for block in whole.vit.blocks[:frozen] for module in block.modules()):
        return None
    device = next(whole.vit.parameters()).device
    merged = make_merger(first)()
    merged = pack(merged) if can_pack(first, device) else merged

    @torch.no_grad()
    def tokens(images: Tensor) -> Tensor:
        whole.check_unchanged()
        parts = []
        for part in images.split(ROWS):
            filled = part if len(part) == ROWS else part[torch.arange(ROWS, device=part.device) % len(part)]
            parts.append(through(whole.embed(filled), first, merged)[: len(part)])
        return torch.cat(parts)

    merger = make_merger(others)
    only = make_forward_only(others, merger, _same, lambda _: None, whole.head, device, first=whole.first)
    rest = replace(
        whole, blocks=others, merge_adapters=merger, embed=_same, ropes=lambda _: None,
        forward_only=only.features, forward_only_of_tokens=only.of_tokens,
    )  # fmt: skip
    return SplitViT(frozen, tokens, rest)


def _same(tokens: Tensor) -> Tensor:
    return tokens
