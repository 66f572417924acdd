"""A pretrained ViT from timm, a local folder or a hub, as one typed object."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .errors import ConfigError

LOCAL, HUB = "local-dir:", "hf-hub:"


@dataclass(frozen=True)
class Backbone:
    """A frozen ViT and what the rest needs to know of it."""

    vit: VisionTransformer
    name: str  # as the user gave it; goes into the adapter as base_model_name_or_path
    width: int  # D, of the features
    img_size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, ...]  # per channel, on a 0..1 scale
    std: tuple[float, ...]
    interpolation: str  # of the evaluation transform
    crop_pct: float

    @property
    def blocks(self) -> nn.Sequential:
        """The transformer blocks."""
        return self.vit.blocks


def features(vit: nn.Module, images: Tensor) -> Tensor:
    """What the model gives its classifier: the class token or the mean, after the final norm.

    images: [B, C, H, W], normalised. Returns [B, D].
    """
    return vit.forward_head(vit.forward_features(images), pre_logits=True)  # type: ignore[operator]


def load(name: str, *, img_size: int | None = None, pretrained: bool = True) -> Backbone:
    """The model called `name`, frozen and in eval mode, on the CPU in fp32.

    name: a timm name, local-dir:PATH or hf-hub:NAME. img_size: pixels; None keeps the model's own, another value
    interpolates the position embeddings as timm does. Raises ConfigError for a name that is unknown, not a plain
    ViT, or whose weights cannot be had.
    """
    _check_name(name, pretrained)
    options: dict[str, Any] = {"img_size": img_size} if img_size else {}
    try:
        with torch.random.fork_rng(devices=[]):  # timm draws weights before it loads them
            vit: Any = timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:
        raise ConfigError(
            f"model: {name} is not a plain Vision Transformer ({error}); {_supported_hint(name)}"
        ) from error
    except Exception as error:  # timm, the hub and safetensors each raise their own kinds
        raise ConfigError(f"model: cannot load {name}: {_first_line(error)}; {_cure(name)}") from error
    reason = why_unsupported(vit)
    if reason:
        raise ConfigError(f"model: {name} is not supported: {reason}; {_supported_hint(name)}")
    vit.eval().requires_grad_(False)
    data = resolve_data_config({}, model=vit)
    return Backbone(
        vit=vit,
        name=name,
        width=vit.num_features,
        img_size=tuple(vit.patch_embed.img_size),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=data["interpolation"],
        crop_pct=data["crop_pct"],
    )


def why_unsupported(model: nn.Module) -> str | None:
    """Why this model cannot be adapted here, or None if it can."""
    if not isinstance(model, VisionTransformer):
        return f"it is a {type(model).__name__}, not a plain VisionTransformer of timm"
    for index, block in enumerate(model.blocks):
        if not isinstance(getattr(getattr(block, "attn", None), "qkv", None), nn.Linear):
            return f"block {index} has no fused attn.qkv matrix"
    if not isinstance(model.patch_embed.img_size, tuple):
        return "its input has no fixed size"
    return None


def fingerprint(vit: nn.Module) -> str:
    """SHA-256 over the names, shapes and first bytes of the weights; tells one base model from another."""
    digest = hashlib.sha256()
    for key, value in sorted(vit.state_dict().items()):
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.detach().flatten()[:64].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _check_name(name: str, pretrained: bool) -> None:
    if name.startswith(LOCAL):
        folder = Path(name.removeprefix(LOCAL))
        if not folder.is_dir():
            raise ConfigError(f"model: no folder at {folder}; local-dir: wants config.json and model.safetensors in it")
        try:
            json.loads((folder / "config.json").read_text())
        except OSError as error:
            raise ConfigError(
                f"model: {folder} has no readable config.json; save the model with timm's save_for_hf"
            ) from error
        except ValueError as error:
            raise ConfigError(f"model: {folder}/config.json is not valid JSON: {error}") from error
    elif not name.startswith(HUB):
        architecture, _, tag = name.partition(".")
        if not timm.is_model(architecture):
            raise ConfigError(f"model: unknown model {name!r}; {_supported_hint(name)}")
        if tag and pretrained and name not in timm.list_pretrained(f"{architecture}.*"):
            tags = ", ".join(timm.list_pretrained(f"{architecture}.*")[:4]) or "none"
            raise ConfigError(f"model: {architecture} has no weights tagged {tag!r}; it has {tags}")


def _supported_hint(name: str) -> str:
    stem = name.removeprefix(LOCAL).removeprefix(HUB).split("/")[-1].split(".")[0].lower()
    known = timm.list_models(["vit_*", "deit_*", "deit3_*"])
    near = difflib.get_close_matches(stem, known, n=3, cutoff=0.4) or ["vit_base_patch16_224"]
    return f"near names: {', '.join(near)} (or local-dir:PATH)"


def _cure(name: str) -> str:
    if name.startswith(LOCAL):
        return "check that model.safetensors is whole and belongs to config.json"
    return "check the network or the cache (HF_HOME), or use local-dir:PATH with weights on disk"


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
