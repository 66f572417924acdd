"""Reads the folder of a model, on disk or in a hub: architecture, preprocessing and facts that its files state."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg

from upstep_fast.errors import ConfigError
from upstep_fast.input_files import read_json
from upstep_fast.model.formats import facts, hf_config, preprocessing

Fetch = Callable[[str], Path | None]  # of a file name to its path; None: not there
MAX_NUMBER, MAX_DEPTH = 10**6, 512  # in model_args; a million classes or pixels, and blocks
_POSITIVE = {"depth", "embed_dim", "img_size", "in_chans", "mlp_ratio", "num_heads", "patch_size", "rope_temperature"}
_POSITIVE |= {"layer_norm_eps"}
CURE = "save the model with timm's save_for_hf, or add --arch NAME"


@dataclass(frozen=True)
class Source:
    """The architecture of a model and the place of its weights."""

    arch: str  # timm.create_model(arch, **model_args)
    model_args: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None  # a file or folder for checkpoint_files.fill; None: timm loads the weights itself
    eps: float | None = None  # of every LayerNorm, where a transformers configuration sets it
    pixels: dict[str, Any] | None = None  # preprocessing that the folder states; None: timm's of `arch`
    facts: dict[str, Any] = field(default_factory=dict)  # of the folder's model, which `arch` must not contradict
    weight_bytes: int | None = None  # of the folder's files, where its configuration describes the model


def described(where: str, fetch: Fetch) -> Source:
    """Return what a folder of timm or transformers describes; `checkpoint` is `where` for transformers.

    Raises ConfigError for a configuration that is missing, wrong, or not of a model that timm can build.
    """
    config = _read(fetch, "config.json")
    if config is None:
        if fetch("open_clip_config.json") is not None:
            raise ConfigError(f"model: {where} is a folder of open_clip; name timm's architecture with --arch NAME")
        raise ConfigError(f"model: no readable {where}/config.json; {CURE}")
    if isinstance(config.get("architecture"), str):
        arch, model_args, stated = _of_timm(config, where)
        return Source(arch, model_args, pixels=preprocessing.from_timm(stated))
    arch, model_args = hf_config.timm_args(config, where)
    eps = config.get("layer_norm_eps")
    _check_numbers(model_args | {"layer_norm_eps": eps}, where)
    return Source(arch, model_args, Path(where), eps, _pixels(config, fetch, where))


def beside_arch(arch: str, where: str, fetch: Fetch) -> Source:
    """Return `arch` with the preprocessing and the facts that the folder states; it need not state any.

    Raises ConfigError for files that are wrong.
    """
    config = _read(fetch, "config.json") or {}
    if isinstance(config.get("architecture"), str):
        own_arch, model_args, stated = _of_timm(config, where)
        own: dict[str, Any] = {}
        with contextlib.suppress(Exception):  # a model that timm cannot build, or no ViT: its tensors will not fit
            own = facts.of_vit(timm.create_model(own_arch, device="meta", **model_args))
        return Source(arch, facts=own, pixels=preprocessing.from_timm(stated))
    own = facts.of_transformers(config) if config else {}
    open_clip = _read(fetch, "open_clip_config.json")
    if open_clip is not None and not own:
        own = facts.of_open_clip(open_clip)
    eps = facts.tower(config).get("layer_norm_eps")
    _check_numbers({"layer_norm_eps": eps}, where)
    return Source(arch, eps=eps, pixels=_pixels(config, fetch, where), facts=own)


def _of_timm(config: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return architecture, model_args and pretrained_cfg of timm's config.json."""
    model_args = config.get("model_args") or {}
    if not isinstance(model_args, dict):
        raise ConfigError(f"model: {where}: model_args in config.json is no object; save the model again")
    _check_numbers(model_args, where)
    stated = config.get("pretrained_cfg")
    if stated is None and model_args:
        raise ConfigError(f"model: {where}: config.json has model_args but no pretrained_cfg, which timm needs; {CURE}")
    if stated is None:  # the form of timm before 0.9: its entries stand beside the architecture
        stated = {key: value for key, value in config.items() if key not in ("architecture", "num_features", "labels")}
    known = {entry.name for entry in dataclasses.fields(PretrainedCfg)}
    if not isinstance(stated, dict) or (unknown := sorted(stated.keys() - known)):
        text = (
            f"has {', '.join(map(repr, unknown[:3]))}, which timm does not know"
            if isinstance(stated, dict)
            else "is no object"
        )
        raise ConfigError(f"model: {where}: pretrained_cfg in config.json {text}; {CURE}")
    preprocessing.check(preprocessing.from_timm(stated), f"model: {where}/config.json")
    return config["architecture"].partition(".")[0], model_args, stated


def _pixels(config: Mapping[str, Any], fetch: Fetch, where: str) -> dict[str, Any] | None:
    """Return the preprocessing in the first file that states it."""
    model = {"model_type": config.get("model_type"), "image_size": facts.tower(config).get("image_size")}
    pixels, name = None, "preprocessor_config.json"
    stated = _read(fetch, name)
    if stated is None:
        name = "processor_config.json"  # of transformers 5, for models with several towers
        stated = (_read(fetch, name) or {}).get("image_processor")
    if isinstance(stated, dict):
        pixels = preprocessing.from_transformers(stated, model, f"model: {where}/{name}")
    elif (open_clip := _read(fetch, "open_clip_config.json")) is not None:
        name = "open_clip_config.json"
        pixels = preprocessing.from_open_clip(open_clip, f"model: {where}/{name}")
    if pixels is not None:
        preprocessing.check(pixels, f"model: {where}/{name}")
    return pixels


def _read(fetch: Fetch, name: str) -> dict[str, Any] | None:
    path = fetch(name)
    if path is None:
        return None
    content = read_json(path, "model")
    if not isinstance(content, dict):
        raise ConfigError(f"model: {path} holds no object")
    return content


def _check_numbers(value: Any, where: str, name: str = "model_args") -> None:
    """Refuse numbers that no model has: building it would take all memory or no end."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_numbers(item, where, str(key))
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_numbers(item, where, name)
    elif value is not None and not _is_possible(value, name):
        raise ConfigError(f"model: {where}: {name} in config.json is {value}, which no model has; save the model again")


def _is_possible(value: Any, name: str) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name in _POSITIVE and not (is_number and value > 0):
        return False
    return not is_number or abs(value) <= (MAX_DEPTH if name == "depth" else MAX_NUMBER)
