"""Features of a ViT: its tokens after the final norm, pooled as its classifier pools them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Pool = Callable[[Any, Tensor], Tensor]  # (model, tokens after the final norm [B, N, D]) -> features


def features(vit: nn.Module, images: Tensor) -> Tensor:
    """Return the input of the model's classifier: the class token or the mean token, after the final norm.

    images: [B, C, H, W], normalized. Returns [B, D].
    """
    return pooled(vit, vit.forward_features(images))  # type: ignore[operator]


def pooled(vit: nn.Module, tokens: Tensor) -> Tensor:
    """Pool tokens after the final norm as the model's classifier does: [B, N, D] -> [B, D]."""
    return vit.forward_head(tokens, pre_logits=True)  # type: ignore[operator]


def pooled_only(vit: nn.Module, tokens: Tensor) -> Tensor:
    """Return the pooled features as a single part: [B, N, D] -> [B, 1, D]."""
    return pooled(vit, tokens)[:, None]


def pooled_and_patch_mean(vit: nn.Module, tokens: Tensor) -> Tensor:
    """Return the pooled features and the mean patch token: [B, N, D] -> [B, P, D], P = `num_parts`.

    P is 1 where the pooled features are the mean patch token already.
    """
    parts = [pooled(vit, tokens)]
    if num_parts(vit) == 2:
        parts.append(patch_tokens(vit, tokens).mean(1))
    return torch.stack(parts, 1)


def patch_tokens(vit: nn.Module, tokens: Tensor) -> Tensor:
    """Return the tokens of the patches, without class and register tokens: [B, N, D] -> [B, H W, D], row by row."""
    return tokens[:, vit.num_prefix_tokens :]


def num_parts(vit: nn.Module) -> int:
    """Return the number of parts of `pooled_and_patch_mean`: 1 for models with mean pooling, else 2."""
    return 1 if vit.global_pool == "avg" else 2


class FeatureExtractor(nn.Module):
    """A ViT as a module whose forward returns features, for exporters and CUDA graphs.

    extract: another function that gives the features of `vit`, such as the engine's; None: `features`.
    """

    def __init__(self, vit: nn.Module, extract: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.vit, self.extract = vit, extract

    def forward(self, images: Tensor) -> Tensor:
        """Return the features [B, D] of images [B, C, H, W]."""
        return features(self.vit, images) if self.extract is None else self.extract(images)
