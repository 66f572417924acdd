"""A pretrained ViT from timm, a hub, a local folder or a checkpoint file, as one typed object."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config
from timm.layers.patch_embed import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from upstep_fast import network
from upstep_fast.config.base import BackboneConfig
from upstep_fast.data.views.resize import normalize
from upstep_fast.errors import ConfigError, first_line
from upstep_fast.model import checks, names, registry
from upstep_fast.model.formats import checkpoint_files, preprocessing
from upstep_fast.model.formats.folders import Source
from upstep_fast.runtime.progress import track

log = logging.getLogger("upstep_fast")


@dataclass(frozen=True)
class Backbone:
    """A frozen ViT, its input size and its evaluation transform."""

    vit: VisionTransformer | Eva
    name: str  # that loads it: names.resolve of what the user gave
    width: int  # D, of the features
    img_size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, ...]  # per channel, on a 0..1 scale
    std: tuple[float, ...]
    interpolation: str  # of the evaluation transform
    crop_pct: float
    crop_mode: str = "center"  # center keeps the aspect ratio, squash does not
    arch: str = ""  # timm.create_model(arch, **model_args) builds this model
    model_args: dict[str, Any] = field(default_factory=dict)

    @property
    def eval_transform_args(self) -> dict[str, Any]:
        """Keyword arguments of `data.loader.load_images` for evaluation; apply `normalized` to its images."""
        return {
            "size": self.img_size,
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
            "channels": len(self.mean),
        }

    def normalized(self, images: Tensor, device: torch.device | None = None) -> Tensor:
        """Normalize images [B, C, H, W], uint8 or on a 0..1 scale, to the model's mean and standard deviation.

        device: of the result; None: that of the images.
        """
        return normalize(images, self.mean, self.std, device)

    @property
    def blocks(self) -> nn.Sequential | nn.ModuleList:
        """The transformer blocks."""
        return self.vit.blocks

    @property
    def forward_flops(self) -> float:
        """FLOPs of a forward pass of one image, roughly: 2 per weight and patch."""
        patches = math.prod(self.img_size) / math.prod(self.vit.patch_embed.patch_size)
        return 2 * sum(p.numel() for p in self.vit.parameters()) * patches

    def copy(self) -> Backbone:
        """Return a backbone with weights of its own, frozen and in eval mode, on the CPU in fp32.

        A copy made before an adapter is put on the model is the base model, without another read from disk.
        """
        vit = copy.deepcopy(self.vit).to("cpu", torch.float32)
        return dataclasses.replace(self, vit=vit.eval().requires_grad_(False))


def load(
    name: str,
    *,
    img_size: int | Sequence[int] | None = None,
    pretrained: bool = True,
    arch: str | None = None,
    in_chans: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    min_matched: float = 0.99,
) -> Backbone:
    """Load the model called `name`, frozen and in eval mode, on the CPU in fp32.

    name: a timm name, local-dir:PATH, hf-hub:NAME (of timm or transformers), demo (the included model), or a
    checkpoint file, whose timm architecture is `arch`; `names.resolve` reads other spellings. img_size: pixels, one
    number or height and width; None keeps the model's own, another value interpolates the position embeddings as timm
    does. in_chans: channels of the images; the patch embedding is adapted as timm does. mean, std: on a 0..1 scale, one
    for each channel or one for all. min_matched: smallest share of the model's tensors that a checkpoint must fill.
    Raises ConfigError for a name that is unknown, not a plain ViT, or whose weights cannot be loaded or do not fit.
    """
    name = names.resolve(name, arch)
    source = registry.find(name, arch, pretrained=pretrained)
    registry.check_arch(source.arch, name)
    size = img_size if img_size is not None else (source.pixels or {}).get("img_size")
    options: dict[str, Any] = {} if in_chans is None else {"in_chans": in_chans}
    if size is not None:
        options["img_size"] = (size, size) if isinstance(size, int) else tuple(size)
    _check_blueprint(source, name, options.get("img_size"))
    vit = _build(source, name, options, pretrained)
    if source.checkpoint is not None and pretrained:
        state = checkpoint_files.read(source.checkpoint)
        checks.patch(state, source, name)
        checkpoint_files.fill(vit, state, where=str(source.checkpoint), min_matched=min_matched)
    checks.arch(source, vit, name)
    checks.weights(vit, name)
    checks.input_size(tuple(vit.patch_embed.img_size), vit)
    return _describe(vit.eval().requires_grad_(False), source, name, mean, std)


def load_from(config: BackboneConfig, *, pretrained: bool = True) -> Backbone:
    """Load the model that a command's configuration names. Raises ConfigError as `load` does."""
    with track("loading the model"):
        return load(
            config.name,
            img_size=config.img_size,
            pretrained=pretrained,
            arch=config.arch,
            in_chans=config.in_chans,
            mean=config.mean,
            std=config.std,
            min_matched=config.min_matched,
        )


def unsupported_reason(model: nn.Module) -> str | None:
    """Return why this model cannot be adapted, as the rest of a sentence; None if it can."""
    if not isinstance(model, (VisionTransformer, Eva)):
        return f"it is a {type(model).__name__}, not a plain VisionTransformer of timm"
    if not isinstance(model.patch_embed, PatchEmbed):
        return f"its patches come from a {type(model.patch_embed).__name__}, not from one matrix"
    for index, block in enumerate(model.blocks):
        attention = getattr(block, "attn", None)
        if not isinstance(getattr(attention, "qkv", None), nn.Linear) and not all(
            isinstance(getattr(attention, f"{part}_proj", None), nn.Linear) for part in "qkv"
        ):
            return f"block {index} has no attention with a qkv matrix, or one each for q, k and v"
    if not isinstance(model.patch_embed.img_size, tuple):
        return "its input has no fixed size"
    return None


def fingerprint(vit: nn.Module) -> str:
    """Return the SHA-256 over the names, types, shapes and bytes of all weights.

    The tensors are hashed on all cores at once (hashlib releases the GIL), then their hashes together.
    """
    state = sorted(vit.state_dict().items())
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(_sha256, (value for _, value in state))
        lines = [
            f"{key} {value.dtype} {list(value.shape)} {digest}"
            for (key, value), digest in zip(state, hashes, strict=True)
        ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _sha256(value: Tensor) -> str:
    raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def _check_blueprint(source: Source, name: str, size: tuple[int, int] | None) -> None:
    """Refuse, before memory is taken, other models, more parameters than the file has bytes, and too small an input."""
    blueprint = _create(source.arch, False, source.model_args | {"device": "meta"}, name)
    reason = unsupported_reason(blueprint)
    if reason:
        raise ConfigError(f"model: {name} is not supported: {reason}; {registry.nearest_names(source.arch)}")
    parameters = sum(parameter.numel() for parameter in blueprint.parameters())
    if source.weight_bytes is not None and parameters > 2 * source.weight_bytes:
        raise ConfigError(
            f"model: {name}: its configuration describes {parameters:.3g} parameters, its weights have "
            f"{source.weight_bytes} bytes; {registry.weights_cure(name)}"
        )
    patch = blueprint.patch_embed.patch_size
    if size is not None and (size[0] < patch[0] or size[1] < patch[1]):
        raise ConfigError(
            f"img_size: {size[0]} x {size[1]} is smaller than the patch size {patch[0]}; take a multiple of {patch[0]}"
        )


def _build(source: Source, name: str, options: dict[str, Any], pretrained: bool) -> Any:
    """Return the model of `source`, with timm's own weights if they are no checkpoint and `pretrained`."""
    if source.checkpoint is None:
        vit = _create(name, pretrained, options, name)
    else:
        vit = _create(source.arch, False, source.model_args | options, name)
        if source.eps is not None:
            _set_eps(vit, source.eps)
    return vit


def _describe(
    vit: Any,
    source: Source,
    name: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Backbone:
    own = preprocessing.from_timm(vit.pretrained_cfg) | (source.pixels or {})
    preprocessing.check(own, f"model: {name}")
    data = resolve_data_config({}, model=vit) | own
    if mean is None or std is None:
        checks.is_stated(source, data, name)
    size: tuple[int, int] = tuple(vit.patch_embed.img_size)
    channels = vit.patch_embed.proj.in_channels
    return Backbone(
        vit=vit,
        name=name,
        width=vit.num_features,
        img_size=size,
        mean=checks.per_channel(data["mean"], channels, f"model: {name}: mean")
        if mean is None
        else checks.given(mean, channels, "mean"),
        std=checks.per_channel(data["std"], channels, f"model: {name}: std")
        if std is None
        else checks.given(std, channels, "std"),
        interpolation=data["interpolation"],
        crop_pct=data["crop_pct"],
        crop_mode=data["crop_mode"],
        arch=source.arch,
        model_args=source.model_args | {"img_size": list(size), "in_chans": channels, "num_classes": vit.num_classes},
    )


def _create(arch: str, pretrained: bool, options: dict[str, Any], name: str) -> Any:
    from_hub = pretrained and not arch.startswith(names.LOCAL)
    try:
        # timm draws weights before it loads them
        with torch.random.fork_rng(devices=[]), network.limited() if from_hub else contextlib.nullcontext():
            return timm.create_model(arch, pretrained=pretrained, **options)
    except TypeError as error:
        text, cure = first_line(error)[:300], registry.nearest_names(name)
        raise ConfigError(
            f"model: {name}: timm cannot build {arch} from its model_args ({text}); save the model again; {cure}"
        ) from error
    except Exception as error:  # timm, the hub and safetensors each raise their own kinds
        # torch lists the tensors that do not fit on further lines
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"model: cannot load {name}: {text}; {registry.weights_cure(name)}") from error


def _set_eps(vit: nn.Module, eps: float) -> None:
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
