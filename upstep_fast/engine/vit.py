"""The ViT on the engine: patch embedding, folded blocks, final norm and pooling."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from upstep_fast.engine.block import Memory, run_block, run_blocks
from upstep_fast.engine.cuda_graphs import graphed
from upstep_fast.engine.fold import FoldedBlock, fold, unsupported_blocks, unsupported_reason
from upstep_fast.engine.inference import make_forward_only
from upstep_fast.engine.merge import MergedBlock, make_merger
from upstep_fast.engine.packing import pack, sizes_of, unpack
from upstep_fast.engine.rotary import Ropes, make_ropes, without_rope
from upstep_fast.engine.self_check import compare
from upstep_fast.engine.stale_check import make_stale_check
from upstep_fast.engine.timm_blocks import Vit, altered_reason, grid_of
from upstep_fast.errors import ConfigError
from upstep_fast.kernels._transforms import is_transformed
from upstep_fast.kernels.patchify import patchify
from upstep_fast.model.pooling import pooled, pooled_only

log = logging.getLogger("upstep_fast")

Pool = Callable[[Vit, Tensor], Tensor]  # tokens after the final norm -> features


@dataclass(frozen=True)
class EngineViT:
    """A folded ViT; its adapters are those of the original model."""

    vit: Vit
    blocks: list[FoldedBlock | nn.Module]
    dtype: torch.dtype
    memory: Memory
    check_unchanged: Callable[[], None]  # raises RuntimeError if `vit` is not what was folded
    merge_adapters: Callable[[], dict[int, MergedBlock]]  # merges the adapters as they are now
    embed: Callable[[Tensor], Tensor]  # images or their patches -> tokens [B, N, D] in `dtype`
    ropes: Callable[[Tensor], Ropes]  # images or their patches -> rotary tables; None: the model has none
    forward_only: Callable[[Tensor], Tensor]
    forward_only_of_tokens: Callable[[Tensor, Ropes], Tensor]  # its part behind `embed`, for self_check.py
    head: Callable[[Tensor], Tensor]  # tokens after the last block -> features
    first: Callable[[], int | None]  # number of tokens at the front that `head` takes now; None: all

    def features(self, images: Tensor) -> Tensor:
        """Return the features [B, D] in fp32 of normalized images [B, C, H, W] or their patches [B, N, C P P].

        Pooled by `pool` of `build`. Differentiable in trained parameters; without gradients the forward-only path runs
        (inference.py). Raises RuntimeError if the model was changed after folding, NotImplementedError in torch.func
        or forward-mode AD.
        """
        _refuse_transforms(images)
        if not torch.is_grad_enabled():
            self.check_unchanged()
            return self.forward_only(images)
        return self.features_of_tokens(self.embed(images), self.ropes(images))

    def features_of_tokens(self, x: Tensor, ropes: Ropes = None) -> Tensor:
        """Return the features with gradients, from the first block's input [B, N, D]; ropes: of these tokens."""
        return self.head(self.rows_through_blocks([x], ropes=ropes, first=self.first()))

    def through_blocks(self, groups: Sequence[Tensor], ropes: Ropes = None) -> list[Tensor]:
        """Run all blocks on the tokens [B, N, D] of each group. Returns the tokens after the last block, in `dtype`.

        Groups may differ in B and N, as crops of several sizes do; they are packed into one pass (packing.py). ropes:
        the rotary table of each group. Raises ValueError where the model needs tables and `ropes` is None.
        """
        return unpack(self.rows_through_blocks(groups, ropes=ropes), sizes_of(groups))

    def rows_through_blocks(
        self,
        groups: Sequence[Tensor],
        indices: Tensor | None = None,
        ropes: Ropes = None,
        first: int | None = None,
    ) -> Tensor:
        """Run `through_blocks` and return rows [T, D] as `pack` lays them out, or only those at `indices`: [M, D].

        indices: [M] int64, among the tokens of all groups. first: of a single group, a folded last block returns only
        the first tokens of each image, [B, first, D].
        """
        _refuse_transforms(*groups)
        self.check_unchanged()
        merged, sizes = self.merge_adapters(), sizes_of(groups)

        def run(x: Tensor, delta: Tensor | None, index: int) -> tuple[Tensor, Tensor]:
            count = first if index + 1 == len(self.blocks) else None
            return run_block(x, delta, merged[index], self.memory, sizes, ropes, count)

        x = pack(groups).to(self.dtype)
        with torch.autocast(x.device.type, enabled=False):  # the engine sets its own dtypes
            return run_blocks(x, self.blocks, run, sizes, indices, ropes)


def _refuse_transforms(*tensors: Tensor) -> None:
    if is_transformed("engine", *tensors):
        raise NotImplementedError(
            "engine: has first derivatives by backward() alone; run the plain model (--implementation reference)"
        )


def build(
    vit: Vit,
    dtype: torch.dtype,
    memory: Memory = "fast",
    *,
    fused: bool | None = None,
    compiled: bool | None = None,
    fp8: bool = False,
    pool: Pool = pooled,
    frozen: bool = False,
) -> EngineViT:
    """Fold `vit` for training or for features in `dtype`. Raises ValueError if the engine cannot run it.

    fused, fp8: as for `fold`. compiled: as for `make_forward_only`. pool: tokens after the final norm -> features.
    frozen: for features alone, faster on a CPU and rounded otherwise than with gradients (inference.py).
    """
    blocks = fold(vit, dtype, fused, fp8)
    tokens, ropes = partial(embed, without_rope(vit), dtype=dtype), make_ropes(vit)
    device = next(vit.parameters()).device
    folded = [index for index, block in enumerate(blocks) if isinstance(block, FoldedBlock)]
    merger, last = make_merger(blocks), partial(head, vit, pool=pool)
    first: Callable[[], int | None] = partial(_first, vit, pool) if device.type == "cpu" else lambda: None
    only = make_forward_only(blocks, merger, tokens, ropes, last, device, compiled, frozen, first)
    check, forwards = make_stale_check(vit, folded), (only.features, only.of_tokens)
    return EngineViT(vit, blocks, dtype, memory, check, merger, tokens, ropes, *forwards, last, first)


def _first(vit: Vit, pool: Pool) -> int | None:
    """Return the number of tokens that `pool` reads, where that is the class token alone; elsewhere None.

    Asked at each pass: hooks on the final norm, another forward_head and global_pool are the user's to set at any time.
    """
    is_known = type(vit) in (VisionTransformer, Eva) and pool in (pooled, pooled_only)
    is_changed = "forward_head" in vars(vit) or altered_reason(vit.norm) is not None
    return 1 if is_known and not is_changed and vit.global_pool == "token" else None


def try_build(vit: nn.Module, dtype: torch.dtype, memory: Memory = "fast", **options: Any) -> EngineViT | str:
    """Fold `vit` and compare it with the plain model. Returns the engine, or the reason why the plain model must run.

    options: keywords of `build`. Logs the blocks that stay as they are.
    """
    reason = unsupported_reason(vit)
    if reason is not None:
        return reason
    assert isinstance(vit, Vit)
    for index, block_reason in unsupported_blocks(vit).items():
        log.info("engine: block %d is not folded, since it %s", index, block_reason)
    built = build(vit, dtype, memory, **options)
    comparison = compare(built)
    return built if comparison is None else comparison.mismatch or built


def embed(vit: Vit, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Embed images [B, C, H, W] or their patches, with prefix tokens and positions: tokens [B, N, D] in `dtype`."""
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
        patches = patch_embed(vit, images)
        x = vit._pos_embed(patches)[0] if isinstance(vit, Eva) else vit.patch_drop(vit._pos_embed(patches))
        return vit.norm_pre(x).to(dtype)


def head(vit: Vit, x: Tensor, pool: Pool = pooled) -> Tensor:
    """Apply the final norm and pool, in fp32: tokens [B, N, D] -> features [B, D] (the shape is that of `pool`)."""
    with torch.autocast(x.device.type, enabled=False):
        return pool(vit, vit.norm(x.float()))


def make_features(
    vit: nn.Module,
    dtype: torch.dtype,
    memory: Memory,
    fallback: Callable[[Tensor], Tensor],
    fp8: bool = False,
    graphs: bool = False,
    pool: Pool = pooled,
    frozen: bool = False,
    take: Callable[[EngineViT], EngineViT] = lambda whole: whole,
) -> tuple[Callable[[Tensor], Tensor], int]:
    """Return a function that gives features, and the side P of the patches it takes instead of images (0: images only).

    It is the engine's if the engine can run `vit` and agrees with it (self_check.py), else `fallback`, compiled on a
    GPU; the reason is logged. graphs: replay as CUDA graphs (cuda_graphs.py). pool, frozen: as for `build`; `fallback`
    must pool so too. take: gives the part of the engine whose features are wanted (split.py). Raises ConfigError if
    `graphs` is set and the engine cannot run the model.
    """
    built = try_build(vit, dtype, memory, fp8=fp8, pool=pool, frozen=frozen)
    if isinstance(built, EngineViT):
        built = take(built)
        features = graphed(vit, built.features, built.check_unchanged) if graphs else built.features
        return features, patch_side(vit)
    if graphs:
        raise ConfigError(f"cuda_graphs: only the engine is captured, and it cannot run this model: {built}")
    is_cuda = next(vit.parameters()).device.type == "cuda"
    warn_plain(built, " under torch.compile" * is_cuda)
    return torch.compile(fallback) if is_cuda else fallback, 0


def warn_plain(reason: str, how: str = "") -> None:
    """Log that the plain model runs and why. reason: of `try_build`."""
    log.warning("engine: running the plain model%s instead, since %s", how, reason)


def patch_embed(vit: Vit, images: Tensor) -> Tensor:
    """Compute the patch embedding as one matrix product: [B, C, H, W] -> [B, N, D].

    Models that take images of any size get [B, H / P, W / P, D]. PatchEmbed's convolution has a stride equal to its
    kernel size, so the product is the same sum. images may also be patches of `patchify`, [B, N, C P P], already
    rounded to the dtype of the product.
    """
    side = _side_of_square_patches(vit)
    if not side:
        return vit.patch_embed(images)
    embed = vit.patch_embed
    patches, weight = images if images.dim() == 3 else patchify(images, side), embed.proj.weight.flatten(1)
    if patches.is_cuda:
        patches, weight = aligned(patches), aligned(weight)
    x = embed.norm(F.linear(patches, weight, embed.proj.bias))
    return x.unflatten(1, grid_of(vit, images)) if vit.dynamic_img_size else x


def aligned(rows: Tensor) -> Tensor:
    """Pad rows [..., K] with zeros to a multiple of 8: a GPU multiplies others, as 14 x 14 x 3 = 588, slowly."""
    lacking = -rows.shape[-1] % 8
    return F.pad(rows, (0, lacking)) if lacking else rows


def patch_side(vit: nn.Module) -> int:
    """Return the side P of the patches that the engine's `features` takes instead of images; 0: images only."""
    return _side_of_square_patches(vit) if isinstance(vit, Vit) and unsupported_reason(vit) is None else 0


def _side_of_square_patches(vit: Vit) -> int:
    embed = vit.patch_embed
    if type(embed) is not PatchEmbed or type(embed.proj) is not nn.Conv2d or altered_reason(embed) is not None:
        return 0
    conv, down, across = embed.proj, *embed.proj.weight.shape[2:]
    if (conv.stride, conv.padding, conv.dilation, conv.groups) != ((down, across), (0, 0), (1, 1), 1):
        return 0
    ordered = (embed.flatten or vit.dynamic_img_size) and not getattr(embed, "dynamic_img_pad", False)
    # if the patch does not divide the image, the convolution ignores the last rows
    return down if ordered and down == across and not any(side % down for side in embed.img_size) else 0
