"""What a run's configuration sets of its views beside the preset."""

from __future__ import annotations

from typing import Any

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.finetune import FinetuneConfig

# field of the configuration -> keyword of data.views.view_config.view_config
_FIELDS = {
    **{name: name for name in ("crop_min", "crop_max", "crop_ratio", "interpolation", "flip", "vertical_flip")},
    **{name: name for name in ("rotate90", "brightness", "contrast", "saturation", "hue", "blur", "solarize")},
    "grey": "gray",
}


def view_overrides(config: AdaptConfig | FinetuneConfig) -> dict[str, Any]:
    """Return the settings of views by their keyword of `view_config`; None where the preset's value counts."""
    return {keyword: getattr(config, name, None) for name, keyword in _FIELDS.items()}  # finetune has not all of them
