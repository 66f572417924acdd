"""Checks of a built model and its preprocessing, each an error or a warning of one line."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from upstep_fast.errors import ConfigError
from upstep_fast.model.formats import facts, preprocessing
from upstep_fast.model.formats.folders import Source

log = logging.getLogger("upstep_fast")

MAX_WEIGHT = 65504.0  # the largest number of half precision, in which models run


def arch(source: Source, vit: nn.Module, name: str) -> None:
    """Refuse an --arch that contradicts what the model's folder states. Raises ConfigError."""
    if different := facts.contradictions(source.facts, vit):
        raise ConfigError(
            f"arch: {source.arch} contradicts what {name} states: {'; '.join(different)}; take the --arch that agrees, "
            "or leave it out"
        )


def weights(vit: nn.Module, name: str) -> None:
    """Refuse weights that are not finite, or larger than half precision holds. Raises ConfigError."""
    for key, value in vit.state_dict().items():
        if value.is_meta or not value.numel():
            continue
        low, high = (float(extreme) for extreme in torch.aminmax(value))  # NaN if one value is
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ConfigError(f"model: {name} has values in {key} that are not finite; fetch or save it again")
        if max(-low, high) > MAX_WEIGHT:
            raise ConfigError(
                f"model: {name} has values up to {max(-low, high):.2g} in {key}, which no model has; "
                "fetch or save it again"
            )


def input_size(size: tuple[int, ...], vit: Any) -> None:
    """Warn of, or refuse, an input that is not a multiple of the patch size. Raises ConfigError."""
    rest = [s % p for s, p in zip(size, vit.patch_embed.patch_size, strict=True)]
    if not any(rest):
        return
    text = f"img_size: {size[0]} x {size[1]} is not a multiple of the patch size {vit.patch_embed.patch_size[0]}"
    if vit.dynamic_img_size and not vit.patch_embed.dynamic_img_pad:
        raise ConfigError(f"{text}; take {size[0] - rest[0]} x {size[1] - rest[1]}")
    log.warning("%s: the last %d rows and %d columns of pixels are not seen", text, *rest)


def per_channel(values: Sequence[float], channels: int, where: str) -> tuple[float, ...]:
    """Return the model's own value per channel; its three are averaged where the images have other channels."""
    values = tuple(float(v) for v in values)
    if len(values) == channels:
        return values
    if len(values) not in (1, 3):
        raise ConfigError(
            f"{where} has {len(values)} values, the images have {channels} channels; give --mean and --std"
        )
    return (sum(values) / len(values),) * channels


def given(values: Sequence[float], channels: int, name: str) -> tuple[float, ...]:
    """Return the user's value per channel, one for all or one for each."""
    if len(values) not in (1, channels):
        raise ConfigError(f"{name}: got {len(values)} values, the images have {channels} channels")
    if not all(abs(v) <= preprocessing.MAX_PIXEL for v in values):  # NaN too
        raise ConfigError(f"{name}: got {' '.join(map(str, values))}, must be for pixels of 0..1; divide by 255")
    return tuple(float(v) for v in values) * (channels if len(values) == 1 else 1)


def is_stated(source: Source, data: Mapping[str, Any], name: str) -> None:
    """Warn where nothing states the preprocessing and timm's weights of this architecture do not agree on one."""
    tags = timm.list_pretrained(f"{source.arch}.*")
    configs = [config for tag in tags if (config := timm.get_pretrained_cfg(tag)) is not None]
    is_one = len({(config.mean, config.std) for config in configs}) == 1 and not source.model_args
    if source.pixels is not None or "." in source.arch or is_one:
        return
    mean, std = (" ".join(f"{value:g}" for value in data[part]) for part in ("mean", "std"))
    log.warning(
        "model: nothing at %s states its preprocessing; used is that of timm's %s: mean %s, std %s, crop %s; give "
        "--mean and --std if they are others",
        *(name, source.arch, mean, std, data["crop_pct"]),
    )


def patch(state: Mapping[str, Tensor], source: Source, name: str) -> None:
    """Refuse a patch embedding of another shape than the configuration beside it states. Raises ConfigError."""
    if not source.model_args:  # the user's --arch: timm resizes it
        return
    size = source.model_args["patch_size"]
    stated = [source.model_args["in_chans"], *(size if isinstance(size, (list, tuple)) else (size, size))]
    for key, value in state.items():
        if "patch_embeddings" in key and value.ndim == 4 and list(value.shape[1:]) != stated:
            raise ConfigError(
                f"model: {name}: {key} has channels and patch size {list(value.shape[1:])}, config.json states "
                f"{stated}; fetch or save it again"
            )
