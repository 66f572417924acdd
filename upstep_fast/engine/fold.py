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
from .packed import Sizes, draw_path
from .precision import Fp8Weight, to_fp8

ACTIVATIONS = {"GELU": "erf", "GELUTanh": "tanh", "QuickGELU": "quick"}


@dataclass(frozen=True)
class FoldedLinear:
    """A frozen projection with its norm and LayerScale folded in, and the adapter on it, if any."""

    weight: Tensor | Fp8Weight  # [N, K], compute type or fp8
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
    norms: tuple[nn.LayerNorm | None, nn.LayerNorm | None] = (None, None)  # those that are trained, hence not folded
    paths: tuple[nn.Module, nn.Module] = (nn.Identity(), nn.Identity())  # drop path of the two branches
    fused: bool = False  # norms and GELU by the kernels; else by the library (pieces.py)

    @property
    def fp8(self) -> bool:
        """Whether the frozen weights are in fp8 (precision.py)."""
        return isinstance(self.fc1.weight, Fp8Weight)

    @property
    def linears(self) -> dict[str, FoldedLinear]:
        """By name, in the order in which they run."""
        return {"qkv": self.qkv, "proj": self.proj, "fc1": self.fc1, "fc2": self.fc2}

    @property
    def keeps_byte(self) -> bool:
        """Whether GELU's derivative is kept as one byte; an adapter on fc2 needs GELU's value in backward."""
        return self.fused and self.fc2.adapter is None

    def trained(self) -> list[Tensor]:
        """(A, A beta, B) of each adapter, then (gamma, beta) of each trained norm; differentiable, fp32."""
        factors = [f for linear in self.linears.values() for f in (linear.adapter_factors() or ())]
        return factors + [p for norm in self.norms if norm is not None for p in (norm.weight, norm.bias)]

    def sources(self) -> list[nn.Parameter]:
        """The parameters behind `trained`."""
        adapters = [linear.adapter for linear in self.linears.values() if linear.adapter is not None]
        own = [p for adapter in adapters for p in (adapter.lora_a, adapter.lora_b)]
        return own + [p for norm in self.norms if norm is not None for p in (norm.weight, norm.bias)]

    def draw_paths(self, x: Tensor, sizes: Sizes) -> tuple[Tensor | None, Tensor | None]:
        """The factors of drop path, 0 or 1 / (1 - p), one a sequence (`packed.draw_path`); None: nothing drops."""
        first, second = (
            draw_path(path, x, sizes) if path.training and getattr(path, "drop_prob", None) else None
            for path in self.paths
        )
        return first, second


def why_not(vit: nn.Module) -> str | None:
    """Why the engine cannot run this model, or None if it can run at least some of its blocks."""
    if not isinstance(vit, VisionTransformer):
        return f"it is a {type(vit).__name__}"
    reasons = [_why_not_block(block) for block in vit.blocks]
    if not reasons or None in reasons:
        return None
    return f"block 0 {reasons[0]}"


@torch.no_grad()
def fold(
    vit: VisionTransformer, dtype: torch.dtype, fused: bool | None = None, fp8: bool = False
) -> list[FoldedBlock | nn.Module]:
    """The blocks of `vit`, folded in `dtype`; adapters and trained norms are referred to, not copied.

    A block that cannot be folded, or whose weights are trained, is given back as it is. fused: norms and GELU by the
    kernels; None: in 16 bit on a GPU. fp8: frozen weights in row-wise fp8 (precision.py), dtype bf16. Raises
    ValueError if no block can be folded.
    """
    reason = why_not(vit)
    if reason:
        raise ValueError(f"engine: cannot fold this model: {reason}")
    return [block if _why_not_block(block) else _fold_block(block, dtype, fused, fp8) for block in vit.blocks]


def left_alone(vit: VisionTransformer) -> dict[int, str]:
    """The blocks that run as they are beside folded ones, with the reason."""
    reasons = {index: _why_not_block(block) for index, block in enumerate(vit.blocks)}
    return {index: reason for index, reason in reasons.items() if reason}


def _fold_block(block: Any, dtype: torch.dtype, fused: bool | None, fp8: bool) -> FoldedBlock:
    if fused is None:
        fused = block.norm1.weight.device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    trained = [norm if norm.weight.requires_grad else None for norm in (block.norm1, block.norm2)]
    return FoldedBlock(
        heads=block.attn.num_heads,
        eps=(block.norm1.eps, block.norm2.eps),
        activation=ACTIVATIONS[type(block.mlp.act).__name__],
        qkv=_fold_linear(block.attn.qkv, dtype, fp8, norm=None if trained[0] else block.norm1),
        proj=_fold_linear(block.attn.proj, dtype, fp8, layer_scale=block.ls1),
        fc1=_fold_linear(block.mlp.fc1, dtype, fp8, norm=None if trained[1] else block.norm2),
        fc2=_fold_linear(block.mlp.fc2, dtype, fp8, layer_scale=block.ls2),
        norms=(trained[0], trained[1]),
        paths=(block.drop_path1, block.drop_path2),
        fused=fused,
    )


def _fold_linear(
    module: nn.Module,
    dtype: torch.dtype,
    fp8: bool,
    *,
    norm: nn.Module | None = None,
    layer_scale: nn.Module | None = None,
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
    return FoldedLinear(to_fp8(weight) if fp8 else weight.to(dtype), bias.to(dtype), affine, scale, adapter)


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
    for linear in (attention.qkv, attention.proj, mlp.fc1, mlp.fc2):
        base: Any = linear.base if isinstance(linear, LoraLinear) else linear
        if base.weight.requires_grad:
            return "trains its weights"
    for scale in (block.ls1, block.ls2):
        if any(p.requires_grad for p in scale.parameters()):
            return "trains its LayerScale"
    drop: Any
    for drop in (attention.attn_drop, attention.proj_drop, mlp.drop1, mlp.drop2):
        if block.training and drop.p:
            return "drops values while training"
    return None
