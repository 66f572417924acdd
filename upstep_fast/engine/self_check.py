"""Compares the engine with the plain model once, after folding, on a small random input.

    image -> tokens by the engine and by the model's own modules               all N tokens
    the first P + 8 tokens -> blocks, norm, pooling -> f                       by both
    d sum(w f) / d trained parameters of the folded blocks, with fixed w        by both

`timm_blocks` names what the engine may run; this finds what no list of names can: a fold that is wrong for these
weights, or a library that changed. Few tokens make it cost about as much as reading the weights a few times. It draws
from generators of its own and runs in eval mode, so it moves no random state. Nothing is computed where tensors hold no
data (the meta device, fake tensors).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from upstep_fast.engine.fold import FoldedBlock
from upstep_fast.engine.rotary import Ropes

if TYPE_CHECKING:
    from upstep_fast.engine.vit import EngineViT

NUM_PATCHES = 8
# of ||difference|| / ||plain model's||, for tokens and features and for gradients; the plain model runs in fp32. What
# rounding does to the deepest models stays below half of it; another attention or activation is above it.
LIMITS = {torch.float32: (5e-3, 3e-2), torch.float16: (0.1, 0.3), torch.bfloat16: (0.1, 0.3)}
FP8_LIMITS = (0.2, 0.5)


@dataclass(frozen=True)
class Comparison:
    """Relative differences of the engine from the plain model."""

    tokens: float  # of the first block's input
    features: float
    features_forward_only: float  # by the path without gradients
    gradient: float | None  # None: nothing is trained
    limits: tuple[float, float]  # of tokens and features, and of the gradient

    @property
    def mismatch(self) -> str | None:
        """Why the engine must not run this model, as the rest of a sentence; None where both agree."""
        of_features, of_gradient = self.limits
        for name in ("tokens", "features", "features_forward_only"):
            if not getattr(self, name) <= of_features:  # a NaN is a mismatch
                return _sentence(name.replace("_forward_only", " without gradients"), getattr(self, name), of_features)
        if self.gradient is not None and not self.gradient <= of_gradient:
            return _sentence("gradients", self.gradient, of_gradient)
        return None


def compare(engine: EngineViT) -> Comparison | None:
    """Compare the engine's features and gradients with those of its plain model; None where tensors hold no data.

    Leaves parameters, gradients, training modes and random generators as they are.
    """
    vit: Any = engine.vit
    parameters = list(vit.parameters())
    if any(p.is_meta for p in parameters) or torch._guards.detect_fake_mode(parameters) is not None:
        return None
    with _eval_mode(vit), torch.autocast(parameters[0].device.type, enabled=False):
        with torch.no_grad():
            image = _noise(vit, parameters[0])
            ours, theirs = engine.embed(image).float(), _embed(vit, image)
            kept = vit.num_prefix_tokens + NUM_PATCHES
            ropes = engine.ropes(image)
            ropes = None if ropes is None else [table[:NUM_PATCHES] for table in ropes]
            x = theirs[:, :kept]
            forward_only = engine.forward_only_of_tokens(x.to(engine.dtype), ropes)
        of_engine = [p for b in engine.blocks if isinstance(b, FoldedBlock) for p in b.trainable_parameters()]
        trained = [p for p in dict.fromkeys(of_engine) if p.requires_grad]
        with torch.enable_grad():
            f = engine.features_of_tokens(x, ropes)
            truth = engine.head(_blocks(vit, x, ropes))
            gradient = _relative(_gradient(f, trained), _gradient(truth, trained)) if trained else None
    return Comparison(
        _relative(ours, theirs),
        _relative(f, truth),
        _relative(forward_only, truth),
        gradient,
        FP8_LIMITS if _is_fp8(engine) else LIMITS[engine.dtype],
    )


def _embed(vit: Any, images: Tensor) -> Tensor:
    """Compute the first block's input [B, N, D] as timm's forward_features does."""
    x = vit._pos_embed(vit.patch_embed(images))
    x = x[0] if isinstance(vit, Eva) else vit.patch_drop(x)
    tokens: Tensor = vit.norm_pre(x)
    return tokens


def _blocks(vit: Any, x: Tensor, ropes: Ropes) -> Tensor:
    for block in vit.blocks:
        x = block(x) if ropes is None else block(x, rope=ropes[0])
    return x


def _gradient(f: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    weights = torch.linspace(-1, 1, f.numel(), device=f.device).view_as(f)
    gradients = torch.autograd.grad(f, parameters, weights.to(f.dtype), allow_unused=True)
    return torch.cat([torch.zeros(1) if g is None else g.flatten().float().cpu() for g in gradients])


def _noise(vit: Any, like: Tensor) -> Tensor:
    """Return an image of normal noise, [1, C, H, W] of the model's size."""
    shape = (1, vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(like.device, like.dtype)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    """Compute ||ours - theirs|| / ||theirs||; 0 where both are zero."""
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    difference = (ours - theirs).norm().item()
    return difference / max(theirs.norm().item(), torch.finfo(torch.float64).tiny) if difference else 0.0


def _sentence(name: str, difference: float, limit: float) -> str:
    return f"its {name} differ from the plain model's by {difference:.2g} of their norm (at most {limit:g} is rounding)"


def _is_fp8(engine: EngineViT) -> bool:
    return any(isinstance(block, FoldedBlock) and block.fp8 for block in engine.blocks)


@contextlib.contextmanager
def _eval_mode(vit: nn.Module) -> Iterator[None]:
    training = [module for module in vit.modules() if module.training]
    try:
        vit.eval()
        yield
    finally:
        for module in training:
            module.training = True
