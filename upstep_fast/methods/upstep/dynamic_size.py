"""Input sizes other than the model's own, for local crops."""

from __future__ import annotations

from typing import Any

from timm.layers.format import Format
from timm.models.vision_transformer import VisionTransformer

from upstep_fast.errors import ConfigError


def allow_any_size(vit: Any, name: str) -> None:
    """Let the model take images of any size, in place; features of its own size do not change.

    Positions are interpolated, bicubic, as timm does with dynamic_img_size. Raises ConfigError where it cannot.
    """
    if not isinstance(vit, VisionTransformer):
        raise ConfigError(f"local_views: {name} is a {type(vit).__name__}, whose positions have a fixed grid")
    vit.dynamic_img_size = True  # type: ignore[misc]
    embed = vit.patch_embed
    embed.strict_img_size, embed.flatten, embed.output_fmt = False, False, Format.NHWC
