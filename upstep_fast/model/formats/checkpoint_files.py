"""Loads checkpoint files of many origins into a timm ViT: read without running code, rename, count what fits."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from timm.models import eva as timm_eva
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from upstep_fast.errors import ConfigError, first_line
from upstep_fast.model.formats import key_names
from upstep_fast.model.formats.key_names import State

log = logging.getLogger("upstep_fast")

PICKLES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLES)
SAFETENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"

# where training programs put the weights in what they save, the averaged teacher before the student
_NESTS = ("teacher", "model_ema", "state_dict_ema", "target_encoder", "state_dict", "model", "module", "student")
# tensors of pretraining and classification, which features do not need
_NOT_FEATURES = re.compile(
    r"(head|head_dist|fc|classifier|pooler|decoder\w*|mask_token|dino_head|ibot_head|lm_head|local_cls_norm|projectors)\b"
)


@dataclass(frozen=True)
class Match:
    """How well a checkpoint fits a model."""

    format: str
    matched: int  # tensors of the model that the checkpoint fills
    total: int  # tensors of the model, its classifier not counted
    misses: tuple[str, ...]  # what is absent, of another shape, or has no place in the model

    def __str__(self) -> str:
        return f"{self.matched} of {self.total} tensors matched ({self.format})"


def read(path: Path) -> State:
    """Read the tensors of a checkpoint file or a transformers folder, by name, onto the CPU.

    Of a folder: model.safetensors, else the shards of its index, else pytorch_model.bin.

    Pickles (.pth, .pt, .bin, .ckpt) are read with weights_only=True, which runs no code of theirs. Raises ConfigError
    for a file that is missing, damaged, of an unknown kind, or that holds more than tensors and plain values.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"model: {path} is no checkpoint; it must end in {', '.join(SUFFIXES)}")
    with _reading(path):
        return load_file(path) if path.suffix == ".safetensors" else _read_pickle(path)


def check_pickle(path: Path) -> None:
    """Refuse a pickle that `read` refuses, without reading its tensors: they are mapped.

    Pickles in torch's format before 1.6 cannot be mapped and are read. Raises ConfigError.
    """
    with _reading(path):
        _read_pickle(path, mmap=zipfile.is_zipfile(path))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the errors of the readers into ConfigErrors that name `path` and the cure."""
    try:
        yield
    except FileNotFoundError as error:
        raise ConfigError(f"model: no file at {path}") from error
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"model: {path} is a pickle with more than tensors in it, which could run code when read; in a place you "
            "can lose, open it with torch.load and save its state dict with safetensors.torch.save_file"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"model: {path} cannot be read ({first_line(error)[:200]}); fetch or save it again"
        ) from error


def _read_pickle(path: Path, mmap: bool = False) -> State:
    with torch.serialization.safe_globals([argparse.Namespace]):  # DINO and MAE keep their flags in the file
        return _unwrap(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap), path)


def shards(index: Path) -> list[str]:
    """Return the files that a transformers index (model.safetensors.index.json) names, all beside it.

    Raises ConfigError if the file is no index, or names a file elsewhere or of another kind.
    """
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        good = bool(names) and all(Path(name).name == name and name.endswith(".safetensors") for name in names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        good = False
    if not good:
        raise ConfigError(
            f"model: {index} is not an index of safetensors files beside it; fetch or save the model again"
        )
    return names


def fill(vit: nn.Module, state: Mapping[str, Tensor], *, where: str, min_matched: float = 0.99) -> Match:
    """Copy a checkpoint of any known format into `vit`, in place, resized to its grid and channels as timm does it.

    min_matched: smallest share of the model's tensors that must be filled. Raises ConfigError, before anything is
    changed, below it and when the checkpoint has blocks that the model lacks: how many matched and the first misses.
    """
    state = {key.replace("model.layer.", "layer."): value for key, value in state.items()}  # DINOv3 in transformers 5
    detected = key_names.detect(state)
    if detected is None and not any(".attn" in key or "attention" in key for key in state):
        raise ConfigError(f"model: {where} holds no Vision Transformer, only {_some(state)}")
    name, converted = _to_timm(vit, state, detected, where)
    match, matched, num_in_absent_blocks = _compare(vit, name, converted)
    if match.matched < min_matched * (match.total + num_in_absent_blocks):  # they count as unmatched
        more = f" and {len(match.misses) - 5} more" if len(match.misses) > 5 else ""
        raise ConfigError(
            f"model: {where} does not fit: {match}: {'; '.join(match.misses[:5])}{more}; "
            "check --arch, or lower --min-matched to load what fits"
        )
    _add_classifier(vit, converted, matched)
    vit.load_state_dict(matched, strict=False)
    log.info("%s: %s", where, match)
    for miss in match.misses[:5]:
        log.warning("%s: %s", where, miss)
    return match


def _compare(vit: nn.Module, name: str, converted: State) -> tuple[Match, State, int]:
    """Return the match, the tensors that fit, and the number of tensors in blocks that the model lacks."""
    expected = {key: value for key, value in vit.state_dict().items() if not _NOT_FEATURES.match(key)}
    matched = {key: value for key, value in converted.items() if key in expected and value.shape == expected[key].shape}
    unplaced = [key for key in converted if key not in expected and not _NOT_FEATURES.match(key)]
    misses = [
        f"{key} is {list(converted[key].shape)}, the model wants {list(value.shape)}"
        if key in converted
        else f"{key} is missing"
        for key, value in expected.items()
        if key not in matched
    ]
    misses += [f"{key} has no place in the model" for key in unplaced]
    match = Match(name, len(matched), len(expected), tuple(misses))
    return match, matched, sum(key.startswith("blocks.") for key in unplaced)


def _to_timm(
    vit: nn.Module, state: Mapping[str, Tensor], detected: tuple[key_names.Format, str] | None, where: str
) -> tuple[str, State]:
    name, plain = "unknown names", dict(state)
    if detected is not None:
        style, prefix = detected
        name = style.name
        plain = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if style is key_names.DINOV3 and not isinstance(vit, timm_eva.Eva):
            style = key_names.TIMM  # registers under a newer name are all that differs
        plain = style.to_timm(_unchunked(plain))
        if style is key_names.OPENCLIP:
            plain = {f"visual.{key}": value for key, value in plain.items()}
        elif style is key_names.HF_CLIP:
            _shape_clip(plain)
        elif style is key_names.DINOV3:
            _split_bias(plain, vit, where)
        elif "register_tokens" in plain:
            plain.setdefault("mask_token", torch.empty(0))  # by which timm's filter knows DINOv2
    return name, _adapt_channels(_filter(vit, plain), vit)


def _filter(vit: Any, state: State) -> State:
    """Apply timm's conversion: resize patch and position embeddings, translate the names of CLIP and DINOv2."""
    if isinstance(vit, timm_eva.Eva):
        state.pop("mask_token", None)  # with it timm takes the final norm for that of BEiT's pretraining
        return timm_eva.checkpoint_filter_fn(state, vit)
    # FlexiViT was trained on plain bilinear resizing; DeiT III calls its LayerScale gamma_1
    smooth: dict[str, Any] = (
        {"interpolation": "bilinear", "antialias": False} if "flexi" in vit.pretrained_cfg["architecture"] else {}
    )
    return timm_vit.checkpoint_filter_fn(state, vit, adapt_layer_scale=True, **smooth)


def _adapt_channels(state: State, vit: nn.Module) -> State:
    key = "patch_embed.proj.weight"
    channels = vit.get_parameter(key).shape[1]
    if key in state and state[key].ndim == 4 and state[key].shape[1] == 3 != channels:
        state[key] = adapt_input_conv(channels, state[key])
    return state


def _add_classifier(vit: nn.Module, converted: State, matched: State) -> None:
    """Keep the checkpoint's classifier if it fits the model; otherwise remove the model's, which is random."""
    head = getattr(vit, "head", None)
    if not isinstance(head, nn.Linear):
        return
    parts = {f"head.{key}": value for key, value in head.state_dict().items()}
    if all(key in converted and converted[key].shape == value.shape for key, value in parts.items()):
        matched.update({key: converted[key] for key in parts})
    else:
        vit.reset_classifier(0)  # type: ignore[operator]


def _unchunked(state: State) -> State:
    """Rename blocks.C.N (chunks of DINOv2 for FSDP) to blocks.N; N counts over all chunks."""
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in state.items()}


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


def _read_folder(folder: Path) -> State:
    if (folder / SAFETENSORS).is_file() or not any((folder / name).is_file() for name in (INDEX, PICKLE)):
        return read(folder / SAFETENSORS)
    if not (folder / INDEX).is_file():
        return read(folder / PICKLE)
    state: State = {}
    for name in shards(folder / INDEX):
        state |= read(folder / name)
    return state


def _unwrap(content: Any, path: Path) -> State:
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        nest = next((key for key in _NESTS if isinstance(content.get(key), dict)), None)
        if nest is None:
            break
        content = content[nest]
    tensors = (
        {key: value for key, value in content.items() if isinstance(value, Tensor)} if isinstance(content, dict) else {}
    )
    if not tensors:
        raise ConfigError(f"model: {path} holds no state dict; save the model's state_dict() with safetensors")
    return tensors


def _some(state: Mapping[str, Tensor]) -> str:
    names = sorted(state)
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
