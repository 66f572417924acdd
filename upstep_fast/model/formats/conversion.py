"""Converts a checkpoint of any known format to the names and shapes of a timm ViT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.models import adapt_input_conv
from timm.models import eva as timm_eva
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from upstep_fast.errors import ConfigError, first_line
from upstep_fast.model.formats import key_names
from upstep_fast.model.formats.key_names import State

_REGISTERS = ("reg_token", "register_tokens", "storage_tokens")


def to_timm(
    vit: nn.Module, state: Mapping[str, Tensor], detected: tuple[key_names.Format, str] | None, where: str
) -> tuple[str, State]:
    """Return the format's name and the tensors under timm's names, resized to the grid and channels of `vit`.

    detected: of `key_names.detect`. Raises ConfigError if the checkpoint has other registers, or cannot be converted.
    """
    try:
        return _to_timm(vit, dict(state), detected, where)
    except ConfigError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError) as error:
        raise ConfigError(
            f"model: {where} does not fit: its tensors cannot be brought to the model's shapes "
            f"({first_line(error)[:200]}); check --arch: patch size, class token, registers and distillation must be "
            "those of the checkpoint"
        ) from error


def _to_timm(
    vit: nn.Module, plain: State, detected: tuple[key_names.Format, str] | None, where: str
) -> tuple[str, State]:
    if detected is None:
        return "unknown names", _adapt_channels(_filter(vit, plain), vit)
    style, prefix = detected
    name, antialias = style.name, True
    plain = {key.removeprefix(prefix): value for key, value in plain.items() if key.startswith(prefix)}
    if style is key_names.DINOV3 and not isinstance(vit, timm_eva.Eva):
        style = key_names.TIMM  # registers under a newer name are all that differs
    plain = _unsplit(style.to_timm(_unchunked(plain)), where)
    _check_registers(plain, vit, where)
    if style is key_names.OPENCLIP:
        plain = {f"visual.{key}": value for key, value in plain.items()}
    elif style is key_names.HF_CLIP:
        _shape_clip(plain)
    elif style is key_names.DINOV3:
        _split_bias(plain, vit, where)
    elif "register_tokens" in plain:
        plain.setdefault("mask_token", torch.empty(0))  # by which timm's filter knows DINOv2
    elif style in (key_names.HF_DINOV2, key_names.HF5_DINOV2):
        antialias = False  # as transformers resizes the positions of a model without registers
    return name, _adapt_channels(_filter(vit, plain, antialias), vit)


def _filter(vit: Any, state: State, antialias: bool = True) -> State:
    """Apply timm's conversion: resize patch and position embeddings, translate the names of CLIP and DINOv2."""
    if isinstance(vit, timm_eva.Eva):
        state.pop("mask_token", None)  # with it timm takes the final norm for that of BEiT's pretraining
        return timm_eva.checkpoint_filter_fn(state, vit)
    is_flexi = "flexi" in vit.pretrained_cfg["architecture"]  # trained on plain bilinear resizing
    return timm_vit.checkpoint_filter_fn(
        state,
        vit,
        adapt_layer_scale=True,  # DeiT III calls its LayerScale gamma_1
        interpolation="bilinear" if is_flexi else "bicubic",
        antialias=antialias and not is_flexi,
    )


def _adapt_channels(state: State, vit: nn.Module) -> State:
    key = "patch_embed.proj.weight"
    channels = vit.get_parameter(key).shape[1]
    if key in state and state[key].ndim == 4 and state[key].shape[1] == 3 != channels:
        state[key] = adapt_input_conv(channels, state[key])
    return state


def _check_registers(state: State, vit: nn.Module, where: str) -> None:
    own = getattr(vit, "reg_token", None)
    wanted = 0 if own is None else own.shape[1]
    tokens = next((state[key] for key in _REGISTERS if key in state), None)
    held = 0 if tokens is None or tokens.ndim < 2 else tokens.shape[-2]
    if held != wanted:
        raise ConfigError(
            f"model: {where} does not fit: it has {held} register tokens, the model has {wanted}; "
            "take the --arch with as many (regN in its name is N registers, DINOv3 has 4)"
        )


def _unchunked(state: State) -> State:
    """Rename blocks.C.N (chunks of DINOv2 for FSDP) to blocks.N; N counts over all chunks."""
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in state.items()}


def _unsplit(state: State, where: str) -> State:
    """Drop q_proj, k_proj and v_proj where the same rows lie in qkv: official ExPLoRA checkpoints hold both."""
    kept = dict(state)
    for key, fused in state.items():
        parts = [key.replace(".attn.qkv.", f".attn.{part}_proj.") for part in "qkv"]
        if ".attn.qkv." not in key or any(part not in state for part in parts):
            continue
        if not torch.equal(torch.cat([kept.pop(part) for part in parts]), fused):
            raise ConfigError(
                f"model: {where} holds {key} and other values in {parts[0]}, ...; keep one of them in the file"
            )
    return kept


def _split_bias(state: State, vit: nn.Module, where: str) -> None:
    """Split the qkv bias of Meta's DINOv3, masked for k, into q_bias and v_bias of timm's Eva, which may have none."""
    for key in [key for key in state if key.endswith("attn.qkv.bias")]:
        q, _, v = state.pop(key).chunk(3)
        stem = key.removesuffix("qkv.bias")
        if getattr(vit.get_submodule("blocks.0.attn"), "q_bias", None) is not None:
            state[f"{stem}q_bias"], state[f"{stem}v_bias"] = q, v
        elif q.any() or v.any():
            raise ConfigError(f"model: {where} has biases in {key}, the model has none; use the --arch ending in _qkvb")
    for key in [key for key in state if key.endswith(("bias_mask", "periods"))]:
        del state[key]  # the mask of k's bias and the rotary table, which timm computes


def _shape_clip(state: State) -> None:
    """Reshape CLIP's class token [D] and positions [N, D] of transformers, and split SigLIP's fused pooling q, k, v."""
    for key in ("cls_token", "pos_embed"):
        if key in state:
            state[key] = state[key].reshape(1, -1, state[key].shape[-1])
    for key in ("weight", "bias"):
        if (stacked := state.pop(f"attn_pool.qkv.{key}", None)) is not None:
            width = len(stacked) // 3
            state[f"attn_pool.q.{key}"], state[f"attn_pool.kv.{key}"] = stacked[:width], stacked[width:]
