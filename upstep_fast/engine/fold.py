"""Folds what is frozen into as few weights as possible.

A block's norms, LayerScale and projections are frozen, so with x_hat = (x - mean) rstd the bare normalisation,

    W (gamma x_hat + beta) + b        =  (W gamma) x_hat + (W beta + b)               norm into qkv and fc1
    ls (W y + b)                      =  (ls W) y + ls b                              LayerScale into proj and fc2
    s B A (gamma x_hat + beta)        =  s B ((A gamma) x_hat + A beta)               the adapter alike, kept apart
    ls s B A y                        =  s (ls B) A y

The adapter's side is made of autograd operations on its own parameters, so what is learnt through the folded form is
the adapter of the original model. Folding is exact up to rounding; it is done in fp32 and cast once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..lora import LoraLinear

ACTIVATIONS = {"GELU": "erf", "GELUTanh": "tanh", "QuickGELU": "quick"}


@dataclass(frozen=True)
class FoldedLinear:
    """A frozen projection with its norm and LayerScale folded in, and the adapter on it, if any."""

    weight: Tensor  # [N, K], compute type
    bias: Tensor  # [N], compute type
    norm: tuple[Tensor, Tensor] | None  # gamma, beta [K] that were folded in
    layer_scale: Tensor | None  # [N]
    adapter: LoraLinear | None

    def adapter_factors(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """(A [T, r, K], A beta [T, r], B [T, n, r]) in fp32, folded; differentiable in the adapter's parameters."""
        if self.adapter is None:
            return None
        a: Tensor = self.adapter.lora_a
        b: Tensor = self.adapter.lora_b
        shift = torch.zeros(a.shape[:2], device=a.device)
        if self.norm is not None:
            gamma, beta = self.norm
            a, shift = a * gamma, a @ beta
        if self.layer_scale is not None:
            b = b * self.layer_scale.view(self.adapter.num_parts, -1)[list(self.adapter.parts), :, None]
        return a, shift, b


@dataclass(frozen=True)
class FoldedBlock:
    """One pre-norm block, ready to run: x + proj(attention(qkv(norm x))), then x + fc2(gelu(fc1(norm x)))."""

    heads: int
    eps: tuple[float, float]  # of the two norms
    activation: str  # erf, tanh or quick
    qkv: FoldedLinear
    proj: FoldedLinear
    fc1: FoldedLinear
    fc2: FoldedLinear

    @property
    def linears(self) -> tuple[FoldedLinear, ...]:
        """In the order in which they run."""
        return self.qkv, self.proj, self.fc1, self.fc2


def why_not(vit: nn.Module) -> str | None:
    """Why the engine cannot run this model, or None if it can."""
    if not isinstance(vit, VisionTransformer):
        return f"it is a {type(vit).__name__}"
    for index, block in enumerate(vit.blocks):
        reason = _why_not_block(block)
        if reason:
            return f"block {index} {reason}"
    return None


@torch.no_grad()
def fold(vit: VisionTransformer, dtype: torch.dtype) -> list[FoldedBlock]:
    """The folded blocks of `vit` in `dtype`; adapters are referred to, not copied. Raises ValueError if it cannot."""
    reason = why_not(vit)
    if reason:
        raise ValueError(f"engine: cannot fold this model: {reason}")
    return [_fold_block(block, dtype) for block in vit.blocks]


def _fold_block(block: Any, dtype: torch.dtype) -> FoldedBlock:
    return FoldedBlock(
        heads=block.attn.num_heads,
        eps=(block.norm1.eps, block.norm2.eps),
        activation=ACTIVATIONS[type(block.mlp.act).__name__],
        qkv=_fold_linear(block.attn.qkv, dtype, norm=block.norm1),
        proj=_fold_linear(block.attn.proj, dtype, layer_scale=block.ls1),
        fc1=_fold_linear(block.mlp.fc1, dtype, norm=block.norm2),
        fc2=_fold_linear(block.mlp.fc2, dtype, layer_scale=block.ls2),
    )


def _fold_linear(
    module: nn.Module, dtype: torch.dtype, *, norm: nn.Module | None = None, layer_scale: nn.Module | None = None
) -> FoldedLinear:
    adapter = module if isinstance(module, LoraLinear) else None
    base = module.base if isinstance(module, LoraLinear) else module
    assert isinstance(base, nn.Linear)
    weight: Tensor = base.weight.float()
    bias: Tensor = base.bias.float() if base.bias is not None else weight.new_zeros(len(weight))
    scale = layer_scale.gamma.float() if isinstance(layer_scale, LayerScale) else None
    affine = (norm.weight.float(), norm.bias.float()) if isinstance(norm, nn.LayerNorm) else None
    if affine is not None:
        weight, bias = weight * affine[0], bias + weight @ affine[1]
    if scale is not None:
        weight, bias = weight * scale[:, None], bias * scale
    return FoldedLinear(weight.to(dtype), bias.to(dtype), affine, scale, adapter)


def _why_not_block(block: Any) -> str | None:
    if type(block) is not Block:
        return f"is a {type(block).__name__}, not a pre-norm Block"
    attention, mlp = block.attn, block.mlp
    if not isinstance(getattr(attention, "qkv", None), nn.Linear | LoraLinear):
        return "has no fused qkv"
    if not isinstance(attention.q_norm, nn.Identity) or not isinstance(getattr(attention, "norm", None), nn.Identity):
        return "normalises q, k or the attention's output"
    if getattr(attention, "gate", None) is not None:
        return "has gated attention"
    if type(mlp) is not Mlp or not isinstance(mlp.norm, nn.Identity):
        return f"has a {type(mlp).__name__}, not a plain MLP"
    if type(mlp.act).__name__ not in ACTIVATIONS:
        return f"has the activation {type(mlp.act).__name__}"
    for norm in (block.norm1, block.norm2):
        if not isinstance(norm, nn.LayerNorm) or norm.bias is None:
            return f"has the norm {type(norm).__name__}"
        if norm.weight.requires_grad:
            return "trains its norms"
    for linear in (attention.qkv, attention.proj, mlp.fc1, mlp.fc2):
        base: Any = linear.base if isinstance(linear, LoraLinear) else linear
        if base.weight.requires_grad:
            return "trains its weights"
    path: Any
    for path in (block.drop_path1, block.drop_path2, attention.attn_drop, attention.proj_drop, mlp.drop1, mlp.drop2):
        if block.training and (getattr(path, "drop_prob", None) or getattr(path, "p", None)):
            return "drops paths or values while training"
    return None
