"""The whole ViT on the engine: patch embedding, folded blocks, final norm and pooling."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from torch import Tensor, nn

from upstep_fast.engine.block import Memory, run_block, run_blocks
from upstep_fast.engine.cuda_graphs import graphed
from upstep_fast.engine.fold import FoldedBlock, fold, unsupported_blocks, unsupported_reason
from upstep_fast.engine.inference import make_forward_only
from upstep_fast.engine.merge import MergedBlock, make_merger
from upstep_fast.engine.packing import pack, sizes_of, unpack
from upstep_fast.engine.rotary import Ropes, make_ropes, without_rope
from upstep_fast.engine.stale_check import watch
from upstep_fast.engine.timm_blocks import Vit, grid_of
from upstep_fast.errors import ConfigError
from upstep_fast.kernels.patchify import patchify
from upstep_fast.model.pooling import pooled

log = logging.getLogger("upstep_fast")

Pool = Callable[[Vit, Tensor], Tensor]  # tokens after the final norm -> features


@dataclass(frozen=True)
class EngineViT:
    """A frozen ViT in the engine's form, with the adapters of the original model."""

    vit: Vit
    blocks: list[FoldedBlock | nn.Module]
    dtype: torch.dtype
    memory: Memory
    check_unchanged: Callable[[], None]  # raises RuntimeError if `vit` is not what was folded
    ready: Callable[[], dict[int, MergedBlock]]  # the folded blocks with the adapters merged as they are now
    embed: Callable[[Tensor], Tensor]  # images, or their patches -> tokens [B, N, D] in `dtype`
    ropes: Callable[[Tensor], Ropes]  # the same -> their rotary table; None: the model has none
    forward_only: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]  # tokens after the last block -> features

    def features(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W], normalised, or their patches -> [B, D] fp32, differentiable in what is trained.

        What `build` was given as `pool` makes them, by default as the model's own classifier sees them.

        Without gradients it takes the forward-only path (forward.py).
        """
        if not torch.is_grad_enabled():
            self.check_unchanged()
            return self.forward_only(images)
        return self.head(self.through_blocks([self.embed(images)], self.ropes(images))[0])

    def through_blocks(self, groups: Sequence[Tensor], ropes: Ropes = None) -> list[Tensor]:
        """Tokens [B, N, D] of each group as they enter the first block -> as they leave the last, in `dtype`.

        Groups may differ in B and N, as crops of several sizes do; all take one pass (packed.py). ropes: the rotary
        table of each. Raises ValueError where the model needs them and they are not given.
        """
        return unpack(self.rows_through_blocks(groups, ropes=ropes), sizes_of(groups))

    def rows_through_blocks(
        self, groups: Sequence[Tensor], wanted: Tensor | None = None, ropes: Ropes = None
    ) -> Tensor:
        """The same as `pack` lays them out; or only `wanted`, [M] places among the tokens of all groups: [M, D]."""
        self.check_unchanged()
        ready, sizes = self.ready(), sizes_of(groups)

        def run(x: Tensor, delta: Tensor | None, index: int) -> tuple[Tensor, Tensor]:
            return run_block(x, delta, ready[index], self.memory, sizes, ropes)

        x = pack(groups).to(self.dtype)
        with torch.autocast(x.device.type, enabled=False):  # the engine chooses its own types
            return run_blocks(x, self.blocks, run, sizes, wanted, ropes)


def build(
    vit: Vit,
    dtype: torch.dtype,
    memory: Memory = "fast",
    *,
    fused: bool | None = None,
    compiled: bool | None = None,
    fp8: bool = False,
    pool: Pool = pooled,
) -> EngineViT:
    """Folds `vit` for training or for features in `dtype`. Raises ValueError if the engine cannot run it.

    fused, fp8: as for `fold`; compiled: the forward-only path, as for `make_forward_only`; pool: makes the features.
    """
    blocks = fold(vit, dtype, fused, fp8)
    tokens, ropes = partial(embed, without_rope(vit), dtype=dtype), make_ropes(vit)
    device = next(vit.parameters()).device
    ready, last = make_merger(blocks), partial(head, vit, pool=pool)
    forward_only = make_forward_only(blocks, ready, tokens, ropes, last, device, compiled)
    return EngineViT(vit, blocks, dtype, memory, watch(vit), ready, tokens, ropes, forward_only, last)


def embed(vit: Vit, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Patches, prefix tokens and positions: images [B, C, H, W], or their patches -> tokens [B, N, D] in `dtype`."""
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
        patches = patch_embed(vit, images)
        x = vit._pos_embed(patches)[0] if isinstance(vit, Eva) else vit.patch_drop(vit._pos_embed(patches))
        return vit.norm_pre(x).to(dtype)


def head(vit: Vit, x: Tensor, pool: Pool = pooled) -> Tensor:
    """Final norm and pooling, in fp32: tokens [B, N, D] -> features [B, D], or as `pool` makes them."""
    with torch.autocast(x.device.type, enabled=False):
        return pool(vit, vit.norm(x.float()))


def choose(
    vit: nn.Module,
    dtype: torch.dtype,
    memory: Memory,
    otherwise: Callable[[Tensor], Tensor],
    fp8: bool = False,
    graphs: bool = False,
    pool: Pool = pooled,
) -> Callable[[Tensor], Tensor]:
    """The engine's `features` if it can run `vit`, else `otherwise`, compiled on a GPU; with a line that says why.

    graphs: replayed as CUDA graphs (graphs.py). pool: as for `build`; `otherwise` does the same.
    Raises ConfigError for a model the engine cannot run with them.
    """
    reason = unsupported_reason(vit)
    if reason is None:
        assert isinstance(vit, Vit)
        for index, why in unsupported_blocks(vit).items():
            log.info("engine: block %d runs as it is, since it %s", index, why)
        built = build(vit, dtype, memory, fp8=fp8, pool=pool)
        return graphed(vit, built.features, built.check_unchanged) if graphs else built.features
    if graphs:
        raise ConfigError(f"cuda_graphs: only the engine is captured, and it cannot run this model: {reason}")
    is_cuda = next(vit.parameters()).device.type == "cuda"
    log.warning("engine: running the plain model%s instead, since %s", " under torch.compile" * is_cuda, reason)
    return torch.compile(otherwise) if is_cuda else otherwise


def patch_embed(vit: Vit, images: Tensor) -> Tensor:
    """The strided convolution of the patch embedding as one matrix product: [B, C, H, W] -> [B, N, D].

    Models that take images of any size get [B, H / P, W / P, D].

    Where a patch is as far from the next as it is large, which is what PatchEmbed always does, both are the same sum.
    Images may come as what `patchify` makes of them, [B, N, C P P], already rounded to the product's type.
    """
    side = _side_of_square_patches(vit)
    if not side:
        return vit.patch_embed(images)
    embed = vit.patch_embed
    patches = images if images.dim() == 3 else patchify(images, side)
    x = embed.norm(F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias))
    return x.unflatten(1, grid_of(vit, images)) if vit.dynamic_img_size else x


def patch_side(vit: nn.Module) -> int:
    """P, the side of the patches that the engine's `features` takes in place of images; 0: it takes images only."""
    return _side_of_square_patches(vit) if isinstance(vit, Vit) and unsupported_reason(vit) is None else 0


def _side_of_square_patches(vit: Vit) -> int:
    embed = vit.patch_embed
    down, across = embed.proj.weight.shape[2:]
    ordered = (embed.flatten or vit.dynamic_img_size) and not getattr(embed, "dynamic_img_pad", False)
    # of a size that it does not divide the convolution leaves the last rows out
    return down if ordered and down == across and not any(side % down for side in embed.img_size) else 0
