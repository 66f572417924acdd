"""Folds the frozen norms, LayerScale and projections of a block into four matrices.

With x_hat = (x - mean) rstd, normalized without scale and shift,

    W (gamma x_hat + beta) + b        =  (W gamma) x_hat + (W beta + b)               norm into qkv and fc1
    ls (W y + b)                      =  (ls W) y + ls b                              LayerScale into proj and fc2
    s B A (gamma x_hat + beta)        =  (s B) ((A gamma) x_hat + A beta)             the adapter, kept separate
    ls s B A y                        =  (ls s B) A y

Matrices whose outputs are concatenated (q, k and v, or the two of a gated MLP, where timm keeps them separate) become
one, with their adapters as parts of it.

The adapter's factors are computed by autograd operations on its parameters (adapters.py), so training the folded form
trains the adapter of the original model. Folding is exact up to rounding; it is done in fp32 and cast once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from upstep_fast.engine.packing import Sizes, drop_path_scale
from upstep_fast.engine.projections import Fp8Weight, to_fp8
from upstep_fast.engine.qk_norm import HeadNorm
from upstep_fast.engine.rotary import Rotary
from upstep_fast.engine.timm_blocks import Vit, block_parts, block_unsupported_reason, norm_kind
from upstep_fast.model.lora import LoraLinear

# the exact classes whose computation is known; the distilled one differs in what it does before and after the blocks,
# for which its own methods are called
MODELS = (VisionTransformer, VisionTransformerDistilled, Eva)
ROPES = (RotaryEmbeddingCat, RotaryEmbeddingDinoV3)


@dataclass(frozen=True)
class FoldedLinear:
    """A frozen projection with its norm and LayerScale folded in, and its adapters, if any."""

    weight: Tensor | Fp8Weight  # [N, K], compute type or fp8
    bias: Tensor  # [N], compute type
    norm: tuple[Tensor, Tensor] | None  # gamma, beta [K] of the folded norm
    layer_scale: Tensor | None  # [N]
    adapters: tuple[LoraLinear, ...] = ()
    parts: tuple[int, ...] = ()  # for each of their T parts, the block of n rows it adds to


@dataclass(frozen=True)
class FoldedBlock:
    """A folded pre-norm block: x + proj(attention(qkv(norm x))), then x + fc2(gelu(fc1(norm x)))."""

    heads: int
    rms: bool  # the norms are RMSNorm
    eps: tuple[float, float]  # of the two norms
    inner_eps: tuple[float | None, float | None]  # of the norms before proj and before fc2; None: no norm
    head_norm: HeadNorm | None  # QK-norm
    rotary: Rotary | None  # rotation of q and k
    activation: str  # erf, tanh, quick or swiglu
    qkv: FoldedLinear
    proj: FoldedLinear
    fc1: FoldedLinear
    fc2: FoldedLinear
    norms: tuple[nn.LayerNorm | None, nn.LayerNorm | None] = (None, None)  # trained norms, which are not folded
    drop_paths: tuple[nn.Module, nn.Module] = (nn.Identity(), nn.Identity())  # of the two branches
    fused: bool = False  # norms and GELU by our kernels, else by torch (norm_gelu.py); adapters by wide products

    @property
    def fp8(self) -> bool:
        """True if the frozen weights are in fp8 (projections.py)."""
        return isinstance(self.fc1.weight, Fp8Weight)

    @property
    def linears(self) -> dict[str, FoldedLinear]:
        """The projections by name, in the order in which they run."""
        return {"qkv": self.qkv, "proj": self.proj, "fc1": self.fc1, "fc2": self.fc2}

    @property
    def saves_derivative(self) -> bool:
        """True if GELU's derivative may be saved, in fused form as one byte; an adapter or a norm on fc2 needs u."""
        return self.activation != "swiglu" and not self.fc2.adapters and self.inner_eps[1] is None

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the adapters' parameters, then (weight, bias) of each trained norm."""
        adapters = [adapter for linear in self.linears.values() for adapter in linear.adapters]
        factors = [p for adapter in adapters for p in (adapter.lora_a, adapter.lora_b)]
        return factors + [p for norm in self.norms if norm is not None for p in (norm.weight, norm.bias)]

    def drop_path_scales(self, x: Tensor, sizes: Sizes) -> tuple[Tensor | None, Tensor | None]:
        """Draw the factors of the two branches (`packing.drop_path_scale`)."""
        first, second = self.drop_paths
        return drop_path_scale(first, x, sizes), drop_path_scale(second, x, sizes)


def unsupported_reason(vit: nn.Module) -> str | None:
    """Return why the engine cannot run this model; None if it can run at least one of its blocks."""
    if not isinstance(vit, Vit) or type(vit) not in MODELS:
        return f"it is a {type(vit).__name__}"
    if "forward_features" in vars(vit) or type(vit.blocks) not in (nn.Sequential, nn.ModuleList):
        return "the order in which it runs its blocks was replaced"
    if not isinstance(vit.patch_embed, PatchEmbed):
        return f"its patches come from a {type(vit.patch_embed).__name__}"
    if isinstance(vit, Eva) and vit.rope_mixed:
        return "its rotary positions differ from block to block"
    if isinstance(vit, Eva) and vit.rope is not None and type(vit.rope) not in ROPES:
        return f"its rotary positions are a {type(vit.rope).__name__}"
    if isinstance(vit, Eva) and vit.patch_drop is not None:
        return "it drops patches while training"
    # adapters may have any type: they are merged in fp32; all else is rounded by the engine itself, or computed in fp32
    types = {p.dtype for name, p in vit.named_parameters() if ".lora_" not in name}
    if odd := sorted(str(t).removeprefix("torch.") for t in types - {torch.float32}):
        return f"its weights are in {', '.join(odd)}, not float32: call .float() on it; the engine rounds by itself"
    reasons = [block_unsupported_reason(block) for block in vit.blocks]
    if not reasons or None in reasons:
        return None
    return f"block 0 {reasons[0]}"


@torch.no_grad()
def fold(vit: Vit, dtype: torch.dtype, fused: bool | None = None, fp8: bool = False) -> list[FoldedBlock | nn.Module]:
    """Fold the blocks of `vit` in `dtype`; adapters and trained norms are referenced, not copied.

    A block that cannot be folded, or whose weights are trained, is returned as it is. fused: norms and GELU by our
    kernels; None: in 16 bit on a GPU. fp8: frozen weights in row-wise fp8 (projections.py), dtype bf16. Raises
    ValueError if no block can be folded.
    """
    reason = unsupported_reason(vit)
    if reason:
        raise ValueError(f"engine: cannot fold this model: {reason}")
    has_rope = getattr(vit, "rope", None) is not None
    unfolded = unsupported_blocks(vit)
    return [
        block if index in unfolded else _fold_block(block, dtype, fused, fp8, has_rope)
        for index, block in enumerate(vit.blocks)
    ]


def unsupported_blocks(vit: Vit) -> dict[int, str]:
    """Return the reasons of the blocks that cannot be folded, by index."""
    reasons = {index: block_unsupported_reason(block) for index, block in enumerate(vit.blocks)}
    return {index: reason for index, reason in reasons.items() if reason}


def _fold_block(block: Any, dtype: torch.dtype, fused: bool | None, fp8: bool, has_rope: bool) -> FoldedBlock:
    parts, attention = block_parts(block), block.attn
    norms: tuple[Any, Any] = parts.norms
    if fused is None:
        fused = norms[0].weight.device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    trained = [norm if norm.weight.requires_grad else None for norm in norms]
    fold_linear = partial(_fold_linear, dtype=dtype, fp8=fp8)
    return FoldedBlock(
        heads=attention.num_heads,
        rms=norm_kind(norms[0]) == "rms",
        eps=(norms[0].eps, norms[1].eps),
        inner_eps=(_eps(parts.inner_norms[0]), _eps(parts.inner_norms[1])),
        head_norm=_head_norm(parts.head_norms),
        rotary=Rotary(attention.num_prefix_tokens, attention.rotate_half) if has_rope else None,
        activation=parts.activation,
        qkv=fold_linear(parts.qkv, norm=None if trained[0] else norms[0], separate_bias=parts.qkv_bias),
        proj=fold_linear((parts.proj,), norm=parts.inner_norms[0], layer_scale=parts.layer_scales[0]),
        fc1=fold_linear(parts.fc1, norm=None if trained[1] else norms[1]),
        fc2=fold_linear((parts.fc2,), norm=parts.inner_norms[1], layer_scale=parts.layer_scales[1]),
        norms=(trained[0], trained[1]),
        drop_paths=(block.drop_path1, block.drop_path2),
        fused=fused,
    )


def _eps(norm: Any) -> float | None:
    return norm.eps if norm_kind(norm) else None


def _affine(norm: Any) -> tuple[Tensor, Tensor] | None:
    """Return (gamma, beta) in fp32, with beta zero for RMSNorm."""
    kind = norm_kind(norm)
    if kind is None:
        return None
    gamma = norm.weight.float()
    return gamma, norm.bias.float() if kind == "layer" else torch.zeros_like(gamma)


def _head_norm(norms: tuple[Any, Any]) -> HeadNorm | None:
    of_q, of_k = (_affine(norm) for norm in norms)
    if of_q is None or of_k is None:
        return None
    gamma, beta = (torch.stack(pair)[:, None] for pair in zip(of_q, of_k, strict=True))
    return HeadNorm(gamma, beta, norms[0].eps, norm_kind(norms[0]) == "rms")


def _fold_linear(
    modules: Sequence[nn.Module],
    *,
    dtype: torch.dtype,
    fp8: bool,
    norm: nn.Module | None = None,
    layer_scale: Tensor | None = None,
    separate_bias: Tensor | None = None,
) -> FoldedLinear:
    bases: list[Any] = [module.base if isinstance(module, LoraLinear) else module for module in modules]
    weight = _concatenated([base.weight.float() for base in bases])
    bias = (_concatenated([_bias(base) for base in bases]) if separate_bias is None else separate_bias).float()
    scale = None if layer_scale is None else layer_scale.float()
    affine = None if norm is None else _affine(norm)
    if affine is not None:
        weight, bias = weight * affine[0], bias + weight @ affine[1]
    if scale is not None:
        weight, bias = weight * scale[:, None], bias * scale
    folded = to_fp8(weight) if fp8 else weight.to(dtype)
    return FoldedLinear(folded, bias.to(dtype), affine, scale, *_adapters(modules))


def _adapters(modules: Sequence[nn.Module]) -> tuple[tuple[LoraLinear, ...], tuple[int, ...]]:
    """Return the adapters and their parts: those of a single matrix, or the index of each of several matrices."""
    adapters = {index: module for index, module in enumerate(modules) if isinstance(module, LoraLinear)}
    parts = tuple(adapters) if len(modules) > 1 else tuple(p for module in adapters.values() for p in module.parts)
    return tuple(adapters.values()), parts


def _bias(linear: nn.Linear) -> Tensor:
    return linear.bias if linear.bias is not None else linear.weight.new_zeros(len(linear.weight))


def _concatenated(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
