"""Baselines of supervised fine-tuning: a linear layer on frozen features, LoRA, or full fine-tuning.

    logits = head(features(image))              linear: features fixed; lora: with LoRA; full: everything trains
    lr of layer i of L + 2 = lr decay^(L+1-i)   0: what comes before the blocks, i: block i - 1, L + 1: norm and head

Layer decay is that of BEiT and MAE. A clip's features are the mean of its frames'.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from upstep_fast.engine import vit as engine
from upstep_fast.model import lora
from upstep_fast.model.backbone import Backbone
from upstep_fast.model.pooling import features

HEAD_STD = 0.02


class Baseline(nn.Module):
    """A backbone (frozen, with LoRA, or fully trained) and a linear head: images to logits."""

    def __init__(
        self,
        backbone: Backbone,
        method: Literal["linear", "lora", "full"],
        classes: int,
        *,
        spec: lora.LoraSpec | None = None,
        drop_path: float = 0.0,
        frames: int = 1,
    ):
        super().__init__()
        self.vit: Any = backbone.vit
        self.method, self.frames = method, frames
        self.vit.requires_grad_(method == "full")
        if method == "full" and isinstance(getattr(self.vit, "head", None), nn.Linear):
            self.vit.head.requires_grad_(False)  # the model's own classifier, which is not run
        if method == "lora":
            lora.inject(self.vit, spec or lora.LoraSpec(targets=("q", "v")))
        if drop_path:
            set_drop_path(self.vit, drop_path)
        self.head = nn.Linear(backbone.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)
        self.features: Callable[[Tensor], Tensor] = partial(features, self.vit)

    def accelerate(self, dtype: torch.dtype, fp8: bool = False) -> None:
        """Run a backbone whose weights are frozen on the engine in `dtype`; to be called on the final device."""
        if self.method != "full":
            self.features, _ = engine.make_features(self.vit, dtype, "fast", fallback=self.features, fp8=fp8)

    def train(self, mode: bool = True) -> Baseline:
        """Set the mode of drop path and the head; the rest of the backbone stays in eval mode."""
        super().train(mode)
        self.vit.eval()
        for module in self.vit.modules():
            if isinstance(module, DropPath):
                module.train(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes] of normalized images [B, C, H, W] or clips [B, T, C, H, W]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.method != "linear"):
            pooled = self.features(images.flatten(0, 1) if self.frames > 1 else images)
        return self.logits_of(pooled.unflatten(0, (-1, self.frames)))

    @torch.no_grad()
    def frozen(self, images: Tensor) -> Tensor:
        """Return the frozen part of `linear`'s forward pass: features [B, T, D] fp32."""
        pooled = self.features(images.flatten(0, 1) if self.frames > 1 else images)
        return pooled.float().unflatten(0, (-1, self.frames))

    def logits_of(self, frozen: Tensor) -> Tensor:
        """Return `forward` of images from their `frozen` part."""
        with torch.autocast(frozen.device.type, enabled=False):
            return self.head(frozen.float().mean(1))


def set_drop_path(vit: Any, rate: float) -> None:
    """Set stochastic depth that rises linearly over the blocks to `rate`, in place, as timm does."""
    count = len(vit.blocks)
    for index, block in enumerate(vit.blocks):
        for name in ("drop_path1", "drop_path2"):
            if hasattr(block, name):
                setattr(block, name, DropPath(rate * index / max(1, count - 1)))


def parameter_groups(
    model: nn.Module, depth: int, *, weight_decay: float, layer_decay: float, taps: tuple[int, ...] = ()
) -> list[dict[str, Any]]:
    """Return AdamW's groups: `scale` is a layer's factor on the learning rate; weight decay on matrices alone.

    taps: the blocks that feed LoSA's adaptors 0, 1, ...
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decays = layer_of(name, depth, taps), parameter.dim() > 1
        group = groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                "scale": layer_decay ** (depth + 1 - layer),
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def layer_of(name: str, depth: int, taps: tuple[int, ...] = ()) -> int:
    """Return the layer of a parameter: 0 before the blocks, i in block i - 1 or its adaptor, depth + 1 behind them."""
    if match := re.match(r"vit\.blocks\.(\d+)\.", name):
        return int(match[1]) + 1
    if match := re.match(r"side\.adaptors\.(\d+)\.", name):
        return taps[int(match[1])] + 1
    early = ("vit.patch_embed.", "vit.pos_embed", "vit.cls_token", "vit.reg_token", "vit.norm_pre.", "side.positions")
    return 0 if name.startswith(early) else depth + 1
