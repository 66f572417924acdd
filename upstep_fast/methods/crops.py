"""Sizes and view configurations of global and local crops."""

from __future__ import annotations

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.data.views.view_config import ViewConfig, local_config, view_config
from upstep_fast.model.backbone import Backbone

GLOBAL_VIEWS = 2


def recipes(config: AdaptConfig, backbone: Backbone) -> list[tuple[ViewConfig, int]]:
    """How crops are made, and how many: the global ones, then the local ones if there are any."""
    whole = view_config(
        config.views.preset, size=backbone.img_size, mean=backbone.mean, std=backbone.std, **config.views.overrides()
    )
    if not config.views.local_views:
        return [(whole, GLOBAL_VIEWS)]
    local = local_config(whole, local_size(config, backbone), (0.05, whole.crop_scale[0]))
    return [(whole, GLOBAL_VIEWS), (local, config.views.local_views)]


def local_size(config: AdaptConfig, backbone: Backbone) -> tuple[int, int]:
    """Height and width of a local crop in pixels, in whole patches."""
    sides = []
    for side, step in zip(backbone.img_size, backbone.vit.patch_embed.patch_size, strict=True):
        asked = 7 * side / 16 if config.views.local_size is None else config.views.local_size
        sides.append(max(1, round(asked / step)) * step)
    return sides[0], sides[1]
