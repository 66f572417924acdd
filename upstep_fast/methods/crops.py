"""View configurations of global and local crops."""

from __future__ import annotations

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.data.views.view_config import ViewConfig, local_config, view_config
from upstep_fast.model.backbone import Backbone

GLOBAL_VIEWS = 2


def num_global_views(config: AdaptConfig) -> int:
    """Return the number of global crops of an image. DIET takes one, and in layout asymmetric one for the gate."""
    return 1 if config.method == "diet" and config.objective.layout == "symmetric" else GLOBAL_VIEWS


def view_configs(
    config: AdaptConfig, backbone: Backbone, global_views: int | None = None
) -> list[tuple[ViewConfig, int]]:
    """Return the configuration and number of the global crops, and of the local crops if there are any.

    global_views: None for `num_global_views`.
    """
    global_views = num_global_views(config) if global_views is None else global_views
    global_config = view_config(
        config.views.preset, size=backbone.img_size, mean=backbone.mean, std=backbone.std, **config.views.overrides()
    )
    if not config.views.local_views:
        return [(global_config, global_views)]
    local = local_config(global_config, local_size(config, backbone), (0.05, global_config.crop_scale[0]))
    return [(global_config, global_views), (local, config.views.local_views)]


def local_size(config: AdaptConfig, backbone: Backbone) -> tuple[int, int]:
    """Return height and width of a local crop in pixels, rounded to whole patches."""
    sides = []
    for side, step in zip(backbone.img_size, backbone.vit.patch_embed.patch_size, strict=True):
        requested = 7 * side / 16 if config.views.local_size is None else config.views.local_size
        sides.append(max(1, round(requested / step)) * step)
    return sides[0], sides[1]
