"""Identity of a base model: its weights, the settings of its modules and its preprocessing.

Two models with equal weights differ in their features if, say, the number of heads or the mean of the pixels differs.
The settings are read from the built model, not from its configuration: one model under two names is one model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from upstep_fast.model.backbone import Backbone, fingerprint

# set by this package, by the environment or by training, without effect on the features
_FREE = {"training", "fused_attn", "grad_checkpointing", "qkv_bias_separate", "inplace", "weight_init_mode", "fix_init"}


def model_identity(base: Backbone) -> dict[str, Any]:
    """Return the identity of a base model without adapters, as JSON values.

    sha256: of the weights (`backbone.fingerprint`); settings: of `settings`; preprocessing: input size, mean, standard
    deviation and evaluation transform.
    """
    return {
        "sha256": fingerprint(base.vit),
        "settings": settings(base.vit),
        "preprocessing": {
            "img_size": list(base.img_size),
            "mean": list(base.mean),
            "std": list(base.std),
            "interpolation": base.interpolation,
            "crop_pct": base.crop_pct,
            "crop_mode": base.crop_mode,
        },
    }


def settings(vit: nn.Module) -> dict[str, Any]:
    """Return class and scalar attributes of all modules by name, e.g. {"blocks.N.attn.num_heads": 3}, as JSON values.

    N stands for every block: one value if all blocks agree, else a list of a value per block.
    """
    found: dict[str, list[Any]] = {}
    for path, module in vit.named_modules():
        name = re.sub(r"\b\d+\b", "N", path)
        found.setdefault(f"{name}.class".lstrip("."), []).append(type(module).__name__)
        for key, value in vars(module).items():
            if not key.startswith("_") and key not in _FREE and _is_plain(value):
                found.setdefault(f"{name}.{key}".lstrip("."), []).append(_as_json(value))
    return {key: values[0] if all(v == values[0] for v in values) else values for key, values in sorted(found.items())}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in what two identities differ, e.g. "blocks.N.attn.num_heads was 3, is 6"; the weights first.

    What only one of them has is not compared: earlier versions recorded less, other versions of timm have other
    attributes. Values of a wrong type count as different.
    """
    texts = ["its weights are not the same"] if _differ(saved.get("sha256"), now.get("sha256")) else []
    for part in ("preprocessing", "settings"):
        then, current = saved.get(part), now.get(part)
        if not isinstance(then, Mapping) or not isinstance(current, Mapping):
            texts += [f"{part} was {then}"] if _differ(then, current) else []
            continue
        texts += [
            f"{key} was {then[key]}, is {current[key]}" for key in current if key in then and then[key] != current[key]
        ]
    return texts


def _differ(then: object, now: object) -> bool:
    return then is not None and now is not None and then != now


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _as_json(value: Any) -> Any:
    return [_as_json(item) for item in value] if isinstance(value, (tuple, list)) else value
