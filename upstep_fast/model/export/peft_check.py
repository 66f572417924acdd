"""Compares this package's reading of an adapter with PEFT's, where PEFT is installed."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upstep_fast.model import lora, peft_format
from upstep_fast.model.peft_tensors import PREFIX
from upstep_fast.model.pooling import features


@torch.no_grad()
def features_by_peft(vit: nn.Module, folder: str | Path, images: Tensor) -> Tensor | None:
    """Return the features [B, D] that PEFT computes with the adapter in `folder`; None where it cannot be asked.

    vit: the base model without adapters, which PEFT changes in place. images: normalized, [B, C, H, W]. PEFT makes the
    layers from adapter_config.json and gets the tensors under its own names. None: PEFT is not installed, or the names
    in training were those of a wrapped model, which this one does not have.
    """
    tensors = peft_format.read_tensors(folder)
    is_wrapped = any(written != name for name, written in tensors.written.items())
    if is_wrapped or importlib.util.find_spec("peft") is None:
        return None
    import peft

    lora.call_qkv(vit)
    for name, value in tensors.bare.items():
        vit.get_parameter(name).copy_(value)
    state = {f"{PREFIX}{name}": value for name, value in tensors.of_modules.items()}
    for name, pair in tensors.pairs.items():
        state |= {f"{PREFIX}{name}.lora_{letter}.weight": part for letter, part in zip("AB", pair, strict=True)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        served: Any = peft.get_peft_model(vit, peft.PeftConfig.from_pretrained(str(folder)))
        peft.set_peft_model_state_dict(served, state)
    return features(served.eval().base_model.model, images)
