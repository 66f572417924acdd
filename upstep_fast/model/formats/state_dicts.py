"""Finds the state dict of a ViT in what a training program saved, and removes what wrappers put into its names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from upstep_fast.errors import ConfigError
from upstep_fast.model.formats import key_names
from upstep_fast.model.formats.key_names import State

# where training programs put the weights in what they save, the averaged teacher before the student; other names follow
_NESTS = (
    *("teacher", "model_ema", "state_dict_ema", "ema", "ema_state_dict", "target_encoder", "state_dict"),
    *(
        "model_state_dict",
        "model_state",
        "model",
        "module",
        "net",
        "network",
        "backbone",
        "encoder",
        "weights",
        "params",
    ),
    "student",
)
_MAX_DEPTH = 6
# of activation checkpointing, torch.compile and FSDP; they stand before any part of a name
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module)\.")


def find(content: Any) -> State:
    """Return the tensors of the first dict in nested dicts that names those of a ViT, else of the largest dict.

    Empty if there are no tensors under names. Dicts within a dict are searched in the order of `_NESTS`.
    """
    found: list[State] = []
    _collect(content, found, _MAX_DEPTH)
    vits = (state for state in found if is_vit(state))
    return next(vits, max(found, key=len, default={}))


def _collect(content: Any, found: list[State], depth: int) -> None:
    if not isinstance(content, Mapping) or depth == 0:
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        found.append(tensors)
    known = [name for name in _NESTS if name in content]
    for name in known + [name for name in content if name not in known]:
        _collect(content[name], found, depth - 1)


def is_vit(state: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of a ViT in some format, or hold an attention."""
    return key_names.detect(state) is not None or any(".attn" in key or "attention" in key for key in state)


def without_wrappers(state: Mapping[str, Tensor], where: str) -> State:
    """Return the tensors under the names they have without wrappers. Raises ConfigError if two get the same name."""
    names = {key: _WRAPPERS.sub("", key) for key in state}
    if len(set(names.values())) < len(names):
        raise ConfigError(f"model: {where} holds some weights twice, with and without a wrapper in their names")
    return {names[key]: value for key, value in state.items()}
