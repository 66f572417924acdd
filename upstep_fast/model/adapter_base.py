"""The base model of an adapter: its record in the adapter's files, and the check that a model is that base model.

The record covers the transformer blocks: the SHA-256 of their weights and the settings of their modules. Position
embeddings, patch embedding and classifier are left out: they change with --img-size, --in-chans and the number of
classes, which an adapter does not depend on. A model into which the adapter was merged has other blocks, so the adapter
is refused there too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn

from upstep_fast.config.base import BackboneConfig
from upstep_fast.errors import ConfigError, printable
from upstep_fast.model.backbone import Backbone, fingerprint
from upstep_fast.model.identity import differences, settings

ANY_BASE = "--any-base (any_base=True in Python) uses the adapter all the same"


def record(vit: nn.Module) -> str:
    """Return the record of a base model without adapters, as JSON text: sha256 of its blocks, and their settings."""
    return json.dumps(_describe(vit))


def model_record(backbone: Backbone, config: BackboneConfig, reading: Mapping[str, Any]) -> str:
    """Return the flags that build this model and its transform again, as JSON text: all of `config` but the name.

    reading: how the training's images were read, by flag; None is left out.
    """
    flags: dict[str, Any] = {
        "img_size": list(backbone.img_size),
        "in_chans": len(backbone.mean),
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "min_matched": config.min_matched,
    } | {name: value for name, value in reading.items() if value is not None}
    return json.dumps(flags if config.arch is None else flags | {"arch": config.arch})


def check(vit: nn.Module, model: str | None, folder: Path, *, recorded: str | None, base_model: str | None) -> None:
    """Raise ConfigError if the adapter in `folder` was trained on another model than `vit`.

    model: name under which `vit` was loaded, None if it is not known. recorded: of `record`, in the adapter's files;
    without it, timm names are compared. base_model: base_model_name_or_path.
    """
    now = "{}" if recorded is None else record(vit)  # which reads all weights
    check_record(now, model, folder, recorded=recorded, base_model=base_model)


def check_record(now: str, model: str | None, folder: Path, *, recorded: str | None, base_model: str | None) -> None:
    """Raise ConfigError as `check` does; now: `record` of the base model."""
    trained_on = f"adapter: {folder} was trained on another base model ({printable(str(base_model), 200)})"
    cure = f"give that model, without an adapter merged into it; {ANY_BASE}"
    if recorded is not None:
        different = differences(_parsed(recorded, folder), json.loads(now))
        if different:
            raise ConfigError(f"{trained_on}: {printable('; '.join(different[:3]), 300)}; {cure}")
        return
    names = timm_name(base_model), timm_name(model)
    if None not in names and names[0] != names[1]:
        raise ConfigError(f"{trained_on}, not on {printable(str(model), 200)}; {cure}")


def timm_name(name: str | None) -> str | None:
    """Return timm's full name, with its tag, of a model called by its timm or hub name; None for any other."""
    plain = (name or "").removeprefix("hf-hub:").removeprefix("hf_hub:").removeprefix("timm/")
    arch, _, tag = plain.partition(".")
    if not timm.is_model(arch):
        return None
    default = timm.models.get_pretrained_cfg(arch)
    return f"{arch}.{tag or (default.tag if default is not None else '')}"


def _describe(vit: nn.Module) -> dict[str, Any]:
    blocks = vit.get_submodule("blocks")
    return {"sha256": fingerprint(blocks), "settings": settings(blocks)}


def _parsed(recorded: str, folder: Path) -> dict[str, Any]:
    try:
        values = json.loads(recorded)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("sha256"), str):
        raise ConfigError(f"adapter: {folder} has a damaged record of its base model; copy it again, or {ANY_BASE}")
    return values
