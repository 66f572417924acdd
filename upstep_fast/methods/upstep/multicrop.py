"""Views of two sizes: two global ones, and small local ones that learn against the targets of the global ones.

SwAV's multi-crop (Caron et al. 2020, section 3.2): local views make no targets, and neither the centre nor the gate
looks at them, so that closed steps do not run them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.format import Format
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from upstep_fast.errors import ConfigError


@dataclass(frozen=True)
class Crops:
    """The views of a batch of B images; indexed as the global ones, views first and then images."""

    whole: Tensor  # [V, B, C, H, W]
    local: Tensor  # [n, B, C, h, w]

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, key: Any) -> Crops:
        """Some of the global views, with the local ones of the same images."""
        images = key[1] if isinstance(key, tuple) else slice(None)
        return Crops(self.whole[key], self.local[:, images])


# counted and moved tensor by tensor
torch.export.register_dataclass(Crops)


def take_any_size(vit: Any, name: str) -> None:
    """Lets the model take images of other sizes than its own, in place; those of its own give what they gave.

    Positions are interpolated, bicubic, as timm does with dynamic_img_size. Raises ConfigError where it cannot.
    """
    if not isinstance(vit, VisionTransformer):
        raise ConfigError(f"local_views: {name} is a {type(vit).__name__}, whose positions have a fixed grid")
    vit.dynamic_img_size = True  # type: ignore[misc]
    embed = vit.patch_embed
    embed.strict_img_size, embed.flatten, embed.output_fmt = False, False, Format.NHWC
