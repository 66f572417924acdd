"""The base model of an adapter: its fingerprint, and the check that a model is the one the adapter was trained on.

The fingerprint covers the weights of the transformer blocks. Position embeddings, patch embedding and classifier are
left out: they change with --img-size, --in-chans and the number of classes, which an adapter does not depend on. A
model into which the adapter was merged has other blocks, so the adapter is refused there too.
"""

from __future__ import annotations

from pathlib import Path

import timm
from torch import nn

from upstep_fast.errors import ConfigError, printable
from upstep_fast.model import backbone

ANY_BASE = "--any-base (any_base=True in Python) uses it all the same"


def fingerprint(vit: nn.Module) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of the weights of the blocks, without adapters."""
    return backbone.fingerprint(vit.get_submodule("blocks"))


def check(vit: nn.Module, model: str | None, folder: Path, *, recorded: str | None, base_model: str | None) -> None:
    """Raise ConfigError if the adapter in `folder` was trained on another model than `vit`.

    model: name under which `vit` was loaded, None if it is not known. recorded: fingerprint of the adapter's base
    model; without one, timm names are compared. base_model: base_model_name_or_path.
    """
    made_for = f"adapter: {folder} was trained on {printable(str(base_model), 200)}"
    if recorded is not None:
        if recorded != fingerprint(vit):
            raise ConfigError(
                f"{made_for}; the weights of this model's blocks are others (another model, or one with an adapter "
                f"merged); give that model, or {ANY_BASE}"
            )
        return
    trained_on, given = timm_name(base_model), timm_name(model)
    if trained_on is not None and given is not None and trained_on != given:
        raise ConfigError(f"{made_for}, not on {printable(str(model), 200)}; give that model, or {ANY_BASE}")


def timm_name(name: str | None) -> str | None:
    """Return timm's full name, with its tag, of a model called by its timm or hub name; None for any other."""
    plain = (name or "").removeprefix("hf-hub:").removeprefix("hf_hub:").removeprefix("timm/")
    if not timm.is_model(plain.partition(".")[0]):
        return None
    arch, _, tag = plain.partition(".")
    if not tag:
        default = timm.models.get_pretrained_cfg(arch)
        tag = (default.tag or "") if default is not None else ""
    return f"{arch}.{tag}"
