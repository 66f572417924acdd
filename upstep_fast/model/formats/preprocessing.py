"""Evaluation preprocessing that the folder of a model states, as timm's evaluation transform says it.

    resize to S (the short side; squash: both sides), center crop of s, scale to 0..1, (x - mean) / std
    crop_pct = s / S

preprocessor_config.json of transformers, preprocess_cfg in open_clip_config.json and pretrained_cfg in timm's
config.json are used in full: what timm's transform cannot do is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from timm.data import constants

from upstep_fast.errors import ConfigError
from upstep_fast.kernels.views import INTERPOLATIONS

MAX_PIXEL = 10.0  # of mean and std: on a scale of 0..255 they are larger
MIN_CROP = 0.05  # below it images are resized to sizes that fill the memory
CROP_MODES = ("center", "squash")
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # as pillow counts
_HALF = (constants.IMAGENET_INCEPTION_MEAN, constants.IMAGENET_INCEPTION_STD)
_IMAGENET = (constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD)
_CLIP = (constants.OPENAI_CLIP_MEAN, constants.OPENAI_CLIP_STD)
_CROP = 224  # crop_size of every image processor of transformers that crops
# the processors: (mean, std), resample, a size of one number is a square, that number, center crop; all are used where
# preprocessor_config.json is silent
_PROCESSORS: dict[str, tuple[tuple[Any, Any], int, bool, int, bool]] = {
    "ViT": (_HALF, 2, True, 224, False),
    "DeiT": (_HALF, 3, True, 256, True),
    "Bit": (_CLIP, 3, False, 224, True),
    "CLIP": (_CLIP, 3, False, 224, True),
    "Siglip": (_HALF, 3, True, 224, False),
    "DINOv3ViT": (_IMAGENET, 2, True, 224, False),
}
# by model_type, where it names none
_BY_MODEL = {"vit": "ViT", "vit_mae": "ViT", "deit": "DeiT", "dinov2": "Bit", "dinov2_with_registers": "Bit"}
_BY_MODEL |= {"dinov3_vit": "DINOv3ViT", "clip": "CLIP", "clip_vision_model": "CLIP"}
_BY_MODEL |= {"siglip": "Siglip", "siglip_vision_model": "Siglip"}
_STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_reduce_labels"}


def check(pixels: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for preprocessing that cannot be: std of 0, NaN, a crop above the whole, another interpolation.

    pixels: any of mean, std, interpolation, crop_pct, crop_mode, img_size.
    """
    for name in ("mean", "std"):
        values = pixels.get(name, ())
        if not isinstance(values, (list, tuple)) or not all(_is_number(v) and abs(v) <= MAX_PIXEL for v in values):
            raise ConfigError(
                f"{where}: {name} is {values}, must be finite numbers, one per channel, for pixels of 0..1"
            )
        if name == "std" and any(value <= 0 for value in values):
            raise ConfigError(f"{where}: std is {list(values)}, every value must be above 0")
    crop_pct = pixels.get("crop_pct", 1.0)
    if not _is_number(crop_pct) or not MIN_CROP <= crop_pct <= 1:
        raise ConfigError(f"{where}: crop_pct is {crop_pct}, must lie in {MIN_CROP} to 1")
    for name, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        if pixels.get(name, known[0]) not in known:
            raise ConfigError(f"{where}: {name} is {pixels[name]!r}, must be {' or '.join(known)}")


def from_timm(pretrained_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return what timm's pretrained_cfg states; None in it states nothing."""
    names = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {name: pretrained_cfg[name] for name in names if pretrained_cfg.get(name) is not None}


def from_open_clip(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what open_clip_config.json states, with its defaults. Raises ConfigError."""
    stated, vision = config.get("preprocess_cfg") or {}, (config.get("model_cfg") or {}).get("vision_cfg") or {}
    mode = stated.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash"):
        raise ConfigError(f"{where}: resize_mode is {mode!r}, must be shortest or squash")
    mean, std = _CLIP
    size = stated.get("size") or vision.get("image_size")
    return {
        "mean": _values(stated.get("mean"), mean),
        "std": _values(stated.get("std"), std),
        "interpolation": stated.get("interpolation") or "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash" if mode == "squash" else "center",
        **({} if size is None else {"img_size": _pair(size, where)}),
    }


def from_transformers(config: Mapping[str, Any], model: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what preprocessor_config.json states, with the defaults of its image processor.

    model: config.json, for model_type and image_size. where: the file, for errors. Raises ConfigError for what timm's
    evaluation transform cannot do.
    """
    name = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    for end in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        name = name.removesuffix(end)
    name = name or _BY_MODEL.get(str(model.get("model_type")), "")
    if name not in _PROCESSORS:
        name, wanted = "ViT", {"size", "resample", "image_mean", "image_std", "do_center_crop"}
        if absent := sorted(wanted - config.keys()):
            raise ConfigError(f"{where}: the defaults of its processor are not known, and it lacks {', '.join(absent)}")
    (mean, std), resample, is_square, side, crops = _PROCESSORS[name]
    _check_steps(config, where)
    normalizes = _or(config.get("do_normalize"), True)
    return {
        "mean": _values(config.get("image_mean"), mean) if normalizes else (0.0,),
        "std": _values(config.get("image_std"), std) if normalizes else (1.0,),
        "interpolation": _interpolation(_or(config.get("resample"), resample)),
        **_geometry(config, is_square, side, _or(config.get("do_center_crop"), crops), model, where),
    }


def _interpolation(resample: Any) -> Any:
    return _RESAMPLE[resample] if isinstance(resample, int) and resample in _RESAMPLE else resample


def _check_steps(config: Mapping[str, Any], where: str) -> None:
    cure = "mend the file, or prepare the images yourself and state plain preprocessing"
    if unknown := sorted(key for key in config if key.startswith("do_") and key not in _STEPS and config[key]):
        raise ConfigError(f"{where}: {', '.join(unknown)} cannot be done; {cure}")
    for step in ("do_resize", "do_rescale"):
        if not _or(config.get(step), True):
            raise ConfigError(f"{where}: {step} is false, images are always resized and scaled to 0..1; {cure}")
    factor = _or(config.get("rescale_factor"), 1 / 255)
    if not _is_number(factor) or abs(255 * factor - 1) > 1e-3 or config.get("rescale_offset"):
        raise ConfigError(f"{where}: rescale_factor {factor} or rescale_offset is not a scale of 0..1; {cure}")
    if config.get("crop_pct") is not None:
        raise ConfigError(f"{where}: crop_pct is not understood; state size and crop_size")


def _geometry(
    config: Mapping[str, Any], is_square: bool, side: int, crops: bool, model: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return crop_mode, crop_pct and img_size (height, width), which is left out where it is the model's own."""
    size: Mapping[str, Any] = {
        key: value for key, value in _sides(config.get("size"), is_square).items() if value is not None
    }
    crop = config.get("crop_size") if crops else None
    # transformers runs DINO's models at any size, the others at their image_size alone
    own = _CROP if str(model.get("model_type")).startswith("dino") else model.get("image_size")
    if not size and crop is None and own != _CROP:
        return {"crop_mode": "squash" if is_square else "center", "crop_pct": _CROP / side if crops else 1.0}
    size = size or _sides(side, is_square)
    if set(size) == {"shortest_edge"}:
        if not crops:
            raise ConfigError(f"{where}: size states shortest_edge without do_center_crop, so images have many sizes")
        short, mode = _pair(size["shortest_edge"], where), "center"
    elif set(size) == {"height", "width"}:
        short, mode = _pair((size["height"], size["width"]), where), "squash"
    else:
        raise ConfigError(f"{where}: size is {size}, must state shortest_edge, or height and width")
    crop = _or(crop, own) if crops else None
    inner = short if crop is None else _pair(crop, where)
    if inner[0] > short[0] or inner[1] > short[1]:
        raise ConfigError(f"{where}: crop_size {list(inner)} is larger than size {size}, which pads images with black")
    if inner[0] * short[1] != inner[1] * short[0]:
        raise ConfigError(f"{where}: crop_size {list(inner)} and size {size} have other proportions")
    return {"crop_mode": mode, "crop_pct": _crop_pct(inner[0], short[0]), "img_size": inner}


def _crop_pct(inner: int, outer: int) -> float:
    """Return the fraction by which timm's floor(inner / fraction) gives `outer` again."""
    fraction = inner / outer
    return fraction if math.floor(inner / fraction) == outer else inner / (outer + 0.5)


def _sides(size: Any, is_square: bool) -> Mapping[str, Any]:
    if size is None or isinstance(size, Mapping):
        return size or {}
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return {"height": size[0], "width": size[1]}
    return {"height": size, "width": size} if is_square else {"shortest_edge": size}


def _pair(size: Any, where: str) -> tuple[int, int]:
    if isinstance(size, Mapping):
        size = (size.get("height"), size.get("width"))
    pair = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in pair):
        raise ConfigError(f"{where}: the size {size} is not one or two numbers of pixels above 0")
    return pair


def _values(stated: Any, default: Any) -> Any:
    if stated is None:
        return default
    return tuple(stated) if isinstance(stated, list) else (stated,)


def _or(stated: Any, default: Any) -> Any:
    return default if stated is None else stated


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
