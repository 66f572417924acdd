"""What a block of timm is made of, whichever of its classes it is, and why the engine cannot run one.

`Block` (timm's VisionTransformer) and `EvaBlock` (its Eva: EVA-02, DINOv3, ViTs with rotary positions) are the same
pre-norm block; they name their parts differently, and keep what is here one matrix as one or several.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.norm import RmsNorm, RmsNormFp32
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from upstep_fast.model.lora import LoraLinear

Vit = VisionTransformer | Eva
ACTIVATIONS = {"GELU": "erf", "GELUTanh": "tanh", "QuickGELU": "quick"}


@dataclass(frozen=True)
class Parts:
    """The modules of a block. A projection is one matrix, or several whose outputs stand side by side."""

    norms: tuple[nn.Module, nn.Module]
    qkv: tuple[nn.Module, ...]
    qkv_bias: Tensor | None  # where it stands beside the matrix
    proj: nn.Module
    fc1: tuple[nn.Module, ...]  # of a gated MLP: the gate's rows first
    fc2: nn.Module
    head_norms: tuple[nn.Module, nn.Module]  # of q and of k; mostly Identity
    inner_norms: tuple[nn.Module, nn.Module]  # of the attention's output, of what goes into fc2; mostly Identity
    layer_scales: tuple[Tensor | None, Tensor | None]
    activation: str  # erf, tanh, quick or swiglu

    @property
    def projections(self) -> list[Any]:
        """All matrices."""
        return [*self.qkv, self.proj, *self.fc1, self.fc2]


def parts_of(block: Any) -> Parts:
    """The parts of a block for which `block_unsupported_reason` has no reason."""
    attention, mlp = block.attn, block.mlp
    return Parts(
        norms=(block.norm1, block.norm2),
        qkv=_qkv(attention),
        qkv_bias=_qkv_bias(attention),
        proj=attention.proj,
        fc1=(mlp.fc1_g, mlp.fc1_x) if isinstance(mlp, SwiGLU) else (mlp.fc1,),
        fc2=mlp.fc2,
        head_norms=(attention.q_norm, attention.k_norm),
        inner_norms=(attention.norm, mlp.norm),
        layer_scales=_layer_scales(block),
        activation=ACTIVATIONS.get(type(mlp.act).__name__, "swiglu"),
    )


def grid_of(vit: Any, images: Tensor) -> tuple[int, int]:
    """Patches down and across: of images [B, C, H, W], or the model's own for what comes as patches [B, N, C P P]."""
    embed = vit.patch_embed
    size: tuple[int, int] = embed.dynamic_feat_size(images.shape[-2:]) if images.dim() == 4 else embed.grid_size
    return size[0], size[1]


def norm_kind(norm: nn.Module) -> str | None:
    """Layer or rms, where it has all that the engine wants of it; else None."""
    if isinstance(norm, nn.LayerNorm) and norm.bias is not None:
        return "layer"
    is_rms = isinstance(norm, RmsNorm | RmsNormFp32 | nn.RMSNorm)
    return "rms" if is_rms and norm.weight is not None and norm.eps is not None else None


def block_unsupported_reason(block: Any) -> str | None:
    """Why the engine cannot run this block, as the rest of a sentence, or None if it can."""
    return next(_reasons(block), None)


def _reasons(block: Any) -> Iterator[str]:
    if type(block) not in (Block, EvaBlock):
        yield f"is a {type(block).__name__}, not a pre-norm Block"
        return
    attention, mlp = block.attn, block.mlp
    if not all(isinstance(module, nn.Linear | LoraLinear) for module in _qkv(attention)):
        yield "has no matrices of q, k and v"
        return
    if getattr(attention, "num_kv_groups", 1) > 1:
        yield "shares k and v among heads"
    if getattr(attention, "gate", None) is not None:
        yield "has gated attention"
    gated = type(mlp) is SwiGLU or (type(mlp) is GluMlp and not mlp.gate_last)
    if type(mlp) is not Mlp and not gated:
        yield f"has a {type(mlp).__name__}, not a plain or SwiGLU MLP"
        return
    if not isinstance(mlp.act, nn.SiLU) if gated else type(mlp.act).__name__ not in ACTIVATIONS:
        yield f"has the activation {type(mlp.act).__name__}"
    parts = parts_of(block)
    inner, at_heads = _real(parts.inner_norms), _real(parts.head_norms)
    for norm in (*parts.norms, *inner, *at_heads):
        if norm_kind(norm) is None:
            yield f"has the norm {type(norm).__name__}"
    if len({norm_kind(norm) for norm in (*parts.norms, *inner)}) > 1:
        yield "has LayerNorm and RMSNorm"
    if at_heads and (len(at_heads) == 1 or len({(norm_kind(norm), norm.eps) for norm in at_heads}) > 1):
        yield "normalises q and k in two ways"
    for norm in (*(parts.norms if norm_kind(parts.norms[0]) == "rms" else ()), *inner, *at_heads):
        if any(p.requires_grad for p in norm.parameters()):
            yield "trains a norm that the engine only folds"
    for linear in parts.projections:
        base: Any = linear.base if isinstance(linear, LoraLinear) else linear
        if any(p.requires_grad for p in base.parameters()):
            yield "trains its weights"
    if any(p is not None and p.requires_grad for p in (getattr(attention, f"{of}_bias", None) for of in "qv")):
        yield "trains the bias of q or v"
    for scale in parts.layer_scales:
        if scale is not None and scale.requires_grad:
            yield "trains its LayerScale"
    drop: Any
    for drop in (attention.attn_drop, attention.proj_drop, mlp.drop1, mlp.drop2):
        if block.training and drop.p:
            yield "drops values while training"


def _real(norms: tuple[nn.Module, ...]) -> list[Any]:
    return [norm for norm in norms if not isinstance(norm, nn.Identity)]


def _qkv(attention: Any) -> tuple[nn.Module, ...]:
    """One matrix, or one each for q, k and v."""
    one = getattr(attention, "qkv", None)
    apart: Any = (getattr(attention, f"{part}_proj", None) for part in "qkv")
    return (one,) if one is not None else tuple(apart)


def _qkv_bias(attention: Any) -> Tensor | None:
    """Timm's EvaAttention has parameters for q and v beside a fused qkv, and zeros for k."""
    if getattr(attention, "q_bias", None) is None:
        return None
    return torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])


def _layer_scales(block: Any) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(block, EvaBlock):
        return block.gamma_1, block.gamma_2
    first, second = (scale.gamma if isinstance(scale, LayerScale) else None for scale in (block.ls1, block.ls2))
    return first, second
