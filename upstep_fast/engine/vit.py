"""The whole ViT on the engine: patch embedding, folded blocks, final norm and pooling."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .block import Memory, run_blocks
from .fold import FoldedBlock, fold, left_alone, why_not

log = logging.getLogger("upstep_fast")


@dataclass(frozen=True)
class EngineViT:
    """A frozen ViT in the engine's form, with the adapters of the original model."""

    vit: VisionTransformer
    blocks: list[FoldedBlock | nn.Module]
    dtype: torch.dtype
    memory: Memory
    frozen: tuple[tuple[nn.Parameter, int], ...]  # what was folded, and its version then

    def features(self, images: Tensor) -> Tensor:
        """images: [B, C, H, W], normalised, fp32 -> [B, D] fp32, differentiable in the adapters."""
        if any(parameter._version != version for parameter, version in self.frozen):
            raise RuntimeError("engine: a frozen weight was changed after folding; fold the model again")
        vit, kind = self.vit, images.device.type
        with torch.autocast(kind, dtype=self.dtype, enabled=self.dtype != torch.float32):
            x = vit.norm_pre(vit.patch_drop(vit._pos_embed(patch_embed(vit, images)))).to(self.dtype)
        with torch.autocast(kind, enabled=False):  # the engine chooses its own types
            x = run_blocks(x, self.blocks, self.memory)
            return vit.forward_head(vit.norm(x.float()), pre_logits=True)


def build(vit: VisionTransformer, dtype: torch.dtype, memory: Memory = "fast", fused: bool | None = None) -> EngineViT:
    """Folds `vit` for training or for features in `dtype`. Raises ValueError if the engine cannot run it.

    fused: as for `fold`.
    """
    blocks = fold(vit, dtype, fused)
    frozen = tuple((p, p._version) for p in vit.parameters() if not p.requires_grad)
    return EngineViT(vit, blocks, dtype, memory, frozen)


def choose(
    vit: nn.Module, dtype: torch.dtype, memory: Memory, otherwise: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """The engine's `features` if it can run `vit`, else `otherwise`, compiled on a GPU; with a line that says why."""
    reason = why_not(vit)
    if reason is None:
        assert isinstance(vit, VisionTransformer)
        for index, why in left_alone(vit).items():
            log.info("engine: block %d runs as it is, since it %s", index, why)
        return build(vit, dtype, memory).features
    is_cuda = next(vit.parameters()).device.type == "cuda"
    log.warning("engine: running the plain model%s instead, since %s", " under torch.compile" * is_cuda, reason)
    return torch.compile(otherwise) if is_cuda else otherwise


def patch_embed(vit: VisionTransformer, images: Tensor) -> Tensor:
    """The strided convolution of the patch embedding as one matrix product: [B, C, H, W] -> [B, N, D].

    Where a patch is as far from the next as it is large, which is what PatchEmbed always does, both are the same sum.
    """
    embed = vit.patch_embed
    if vit.dynamic_img_size or not embed.flatten or getattr(embed, "dynamic_img_pad", False):
        return embed(images)
    weight = embed.proj.weight
    patches = F.unfold(images, weight.shape[2:], stride=weight.shape[2:]).transpose(1, 2)
    return embed.norm(F.linear(patches, weight.flatten(1), embed.proj.bias))
