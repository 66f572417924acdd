"""The parts of timm's transformer blocks under one set of names, and reasons why the engine cannot run a block.

`Block` (of VisionTransformer) and `EvaBlock` (of Eva: EVA-02, DINOv3, ViTs with rotary positions) are both pre-norm
blocks; they name their parts differently, and may keep q, k and v, or the two halves of SwiGLU, in separate matrices.

The engine does not call a block's modules, it computes what they are known to compute. So each must be exactly of a
class listed here: a subclass, or a class of a later timm, may compute something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import timm.layers.activations as timm_activations
import timm.layers.norm as timm_norms
import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from upstep_fast.model.lora import LoraLinear

Vit = VisionTransformer | Eva
BLOCKS = (Block, EvaBlock)
ATTENTION = (Attention, AttentionRope, EvaAttention)
LINEARS = (nn.Linear, LoraLinear)
LAYER_NORMS = (nn.LayerNorm, timm_norms.LayerNorm, timm_norms.LayerNormFp32)
RMS_NORMS = (nn.RMSNorm, timm_norms.RmsNorm, timm_norms.RmsNormFp32)
ACTIVATIONS = {
    nn.GELU: "erf",
    timm_activations.GELU: "erf",
    timm_activations.GELUTanh: "tanh",
    timm_activations.QuickGELU: "quick",
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class BlockParts:
    """The modules of a block. A projection is one matrix, or several whose outputs are concatenated."""

    norms: tuple[nn.Module, nn.Module]
    qkv: tuple[nn.Module, ...]
    qkv_bias: Tensor | None  # where it is not a part of the Linear
    proj: nn.Module
    fc1: tuple[nn.Module, ...]  # of a gated MLP: the gate's rows first
    fc2: nn.Module
    head_norms: tuple[nn.Module, nn.Module]  # of q and of k; mostly Identity
    inner_norms: tuple[nn.Module, nn.Module]  # of the inputs of proj and of fc2; mostly Identity
    layer_scales: tuple[Tensor | None, Tensor | None]
    activation: str  # erf, tanh, quick or swiglu

    @property
    def projections(self) -> list[Any]:
        """All Linears and LoraLinears."""
        return [*self.qkv, self.proj, *self.fc1, self.fc2]


def block_parts(block: Any) -> BlockParts:
    """Return the parts of a block; its `block_unsupported_reason` must be None."""
    attention, mlp = block.attn, block.mlp
    return BlockParts(
        norms=(block.norm1, block.norm2),
        qkv=_qkv(attention),
        qkv_bias=_qkv_bias(attention),
        proj=attention.proj,
        fc1=_fc1(mlp),
        fc2=mlp.fc2,
        head_norms=(attention.q_norm, attention.k_norm),
        inner_norms=(attention.norm, mlp.norm),
        layer_scales=_layer_scales(block),
        activation=_activation(mlp.act) or "swiglu",
    )


def grid_of(vit: Any, images: Tensor) -> tuple[int, int]:
    """Return the number of patches (down, across) of images [B, C, H, W]; of patches [B, N, C P P] the model's own."""
    embed = vit.patch_embed
    size: tuple[int, int] = embed.dynamic_feat_size(images.shape[-2:]) if images.dim() == 4 else embed.grid_size
    return size[0], size[1]


def norm_kind(norm: nn.Module) -> str | None:
    """Return "layer" or "rms" for a norm that the engine can fold, else None."""
    if getattr(norm, "weight", None) is None or len(norm.normalized_shape) != 1:  # type: ignore[arg-type]
        return None
    if type(norm) in LAYER_NORMS and norm.bias is not None:
        return "layer"
    return "rms" if type(norm) in RMS_NORMS and norm.eps is not None else None


def altered_reason(module: nn.Module) -> str | None:
    """Return how someone changed what a module of known class computes, as the rest of a sentence; None if no one did.

    The engine calls none of the modules inside, so it would pass over hooks and over a forward set on the instance.
    """
    for part in module.modules():
        if "forward" in vars(part):
            return f"has a {type(part).__name__} whose forward was replaced"
        if any(getattr(part, hooks) for hooks in HOOKS):
            return f"has hooks on a {type(part).__name__}"
    return None


def block_unsupported_reason(block: Any) -> str | None:
    """Return why the engine cannot run this block, as the rest of a sentence; None if it can."""
    return next(_unsupported_reasons(block), None)


def _unsupported_reasons(block: Any) -> Iterator[str]:
    """Yield the reasons; those after the first hold only if the earlier ones do not."""
    yield from _structure_reasons(block)
    parts = block_parts(block)
    yield from _norm_reasons(parts)
    yield from _training_reasons(block, parts)
    if reason := altered_reason(block):
        yield reason


def _structure_reasons(block: Any) -> Iterator[str]:
    if type(block) not in BLOCKS:
        yield f"is a {type(block).__name__}, not a pre-norm Block"
    yield from _attention_reasons(block.attn)
    yield from _mlp_reasons(block.mlp)
    if type(block) is Block:
        for scale in (block.ls1, block.ls2):
            if type(scale) not in (LayerScale, nn.Identity):
                yield f"has a {type(scale).__name__} for LayerScale"
    for drop_path in (block.drop_path1, block.drop_path2):
        # a DropPath of any kind is asked for its factors (packing.drop_path_scale)
        if not isinstance(drop_path, DropPath | nn.Identity):
            yield f"has a {type(drop_path).__name__} for stochastic depth"


def _attention_reasons(attention: Any) -> Iterator[str]:
    if type(attention) not in ATTENTION:
        yield f"has a {type(attention).__name__} for attention"
    if not all(type(module) in LINEARS for module in (*_qkv(attention), attention.proj)):
        yield "has no matrices of q, k and v"
    if getattr(attention, "num_kv_groups", 1) > 1:
        yield "shares k and v among heads"
    if getattr(attention, "gate", None) is not None:
        yield "has gated attention"
    if attention.scale != attention.head_dim**-0.5:
        yield f"scales its attention by {attention.scale}"


def _mlp_reasons(mlp: Any) -> Iterator[str]:
    is_gated = type(mlp) is SwiGLU or (type(mlp) is GluMlp and not mlp.gate_last)
    if type(mlp) is not Mlp and not is_gated:
        yield f"has a {type(mlp).__name__}, not a plain or SwiGLU MLP"
    if (type(mlp.act) is not nn.SiLU) if is_gated else (_activation(mlp.act) is None):
        yield f"has the activation {type(mlp.act).__name__}"
    if not all(type(module) in LINEARS for module in (*_fc1(mlp), mlp.fc2)):
        yield "has an MLP of other layers than Linear"


def _activation(act: nn.Module) -> str | None:
    kind = ACTIVATIONS.get(type(act))
    # torch's GELU has both forms under one name
    return "tanh" if kind and getattr(act, "approximate", "none") == "tanh" else kind


def _norm_reasons(parts: BlockParts) -> Iterator[str]:
    inner, qk = _without_identity(parts.inner_norms), _without_identity(parts.head_norms)
    for norm in (*parts.norms, *inner, *qk):
        if norm_kind(norm) is None:
            yield f"has the norm {type(norm).__name__}"
    if len({norm_kind(norm) for norm in (*parts.norms, *inner)}) > 1:
        yield "has LayerNorm and RMSNorm"
    if qk and (len(qk) == 1 or len({(norm_kind(norm), norm.eps) for norm in qk}) > 1):
        yield "normalizes q and k in two ways"
    for norm in (*(parts.norms if norm_kind(parts.norms[0]) == "rms" else ()), *inner, *qk):
        if any(p.requires_grad for p in norm.parameters()):
            yield "trains a norm that the engine only folds"


def _training_reasons(block: Any, parts: BlockParts) -> Iterator[str]:
    for linear in parts.projections:
        base: Any = linear.base if isinstance(linear, LoraLinear) else linear
        if any(p.requires_grad for p in base.parameters()):
            yield "trains its weights"
    if any(p is not None and p.requires_grad for p in (getattr(block.attn, f"{of}_bias", None) for of in "qv")):
        yield "trains the bias of q or v"
    if any(scale is not None and scale.requires_grad for scale in parts.layer_scales):
        yield "trains its LayerScale"
    dropouts: list[Any] = [block.attn.attn_drop, block.attn.proj_drop, block.mlp.drop1, block.mlp.drop2]
    for dropout in dropouts:
        if type(dropout) not in (nn.Dropout, nn.Identity):
            yield f"has a {type(dropout).__name__} for dropout"
        if getattr(dropout, "p", 0):
            yield "drops values while training"


def _without_identity(norms: tuple[nn.Module, ...]) -> list[Any]:
    return [norm for norm in norms if type(norm) is not nn.Identity]


def _fc1(mlp: Any) -> tuple[nn.Module, ...]:
    return (mlp.fc1_g, mlp.fc1_x) if type(mlp) is SwiGLU else (mlp.fc1,)


def _qkv(attention: Any) -> tuple[nn.Module, ...]:
    """Return the fused matrix, or the three of q, k and v."""
    fused = getattr(attention, "qkv", None)
    separate: Any = (getattr(attention, f"{part}_proj", None) for part in "qkv")
    return (fused,) if fused is not None else tuple(separate)


def _qkv_bias(attention: Any) -> Tensor | None:
    """Return the bias that timm's EvaAttention keeps outside a fused qkv: parameters for q and v, zeros for k."""
    if getattr(attention, "q_bias", None) is None:
        return None
    return torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])


def _layer_scales(block: Any) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(block, EvaBlock):
        return block.gamma_1, block.gamma_2
    first, second = (scale.gamma if type(scale) is LayerScale else None for scale in (block.ls1, block.ls2))
    return first, second
