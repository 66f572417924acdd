"""Adapters as files in PEFT's format: written, read, scaled and put on a model."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upstep_fast import input_files
from upstep_fast.config import adapter_folder as adapter_folders
from upstep_fast.config.adapter_folder import MODEL_RECORD
from upstep_fast.config.base import BackboneConfig
from upstep_fast.config.flat import paths
from upstep_fast.errors import ConfigError
from upstep_fast.model import adapter_base, peft_config, peft_fit, peft_tensors
from upstep_fast.model.backbone import load
from upstep_fast.model.lora import LoraLinear, call_qkv, merge
from upstep_fast.model.peft_config import CONFIG, NO_MODULE, AdapterConfig
from upstep_fast.model.peft_tensors import BARE, BARE_RECORD, BASE_RECORD, NO_BARE, PREFIX, WEIGHTS, AdapterTensors
from upstep_fast.runtime.atomic_file import write_together

FILES = (CONFIG, WEIGHTS, BARE)  # all that an adapter folder holds; BARE only if the adapter has such parameters


def save_adapter(folder: str | Path, adapters: Mapping[str, LoraLinear], base_model: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors. Raises OSError."""
    write_files(folder, adapter_files(adapters, base_model))


def write_files(folder: str | Path, files: Mapping[str, bytes]) -> None:
    """Write an adapter's files into `folder`: a reader finds the old ones, the new ones or none. Raises OSError."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_together(folder, files, last=CONFIG)


def strength_by_depth(first: float, last: float, depth: int) -> Callable[[str], float]:
    """Return a function that gives a module's strength by its name, in a line over the blocks of the model.

    first, last: strengths of the first and the last of `depth` blocks; modules outside the blocks have the last one.
    """

    def strength(name: str) -> float:
        block = re.match(r"blocks\.(\d+)\.", name)
        share = int(block[1]) / max(1, depth - 1) if block else 1.0
        return first + share * (last - first)

    return strength


def scaled(files: Mapping[str, bytes], strength: Callable[[str], float]) -> dict[str, bytes]:
    """Return the files of an adapter, by name, with each module's alpha multiplied by its `strength`.

    With a strength below 1 a module lies between the base model and the adapted one.
    """
    config = json.loads(files[CONFIG])
    if config["target_modules"] == NO_MODULE:
        return dict(files)
    saved = dict.fromkeys(config["target_modules"], config["lora_alpha"]) | config.get("alpha_pattern", {})
    alphas = {name: _integral(strength(name) * alpha) for name, alpha in saved.items()}
    config["lora_alpha"] = max(alphas.values())
    config["alpha_pattern"] = {name: alpha for name, alpha in alphas.items() if alpha != config["lora_alpha"]}
    return {**files, CONFIG: (json.dumps(config, indent=2) + "\n").encode()}


def adapter_files(
    adapters: Mapping[str, LoraLinear],
    base_model: str,
    *,
    fully_trained: Mapping[str, Tensor] | None = None,
    base_record: str | None = None,
    model_record: str | None = None,
) -> dict[str, bytes]:
    """Return the files of an adapter in PEFT's format, by name.

    base_model: goes into base_model_name_or_path. fully_trained: parameters trained without an adapter, by name.
    base_record: `adapter_base.record` of the base model; goes into the metadata of the tensors, as does the SHA-256 of
    bare parameters, without which the adapter would be incomplete. model_record: `adapter_base.model_record`.
    """
    pairs = {name: adapter.as_one() for name, adapter in adapters.items()}
    parameters = {name: p.detach().cpu().contiguous() for name, p in (fully_trained or {}).items()}
    bare = {name: p for name, p in parameters.items() if "." not in name}
    of_modules = {name: p for name, p in parameters.items() if "." in name}
    tensors = {
        f"{PREFIX}{name}.lora_{letter}.weight": matrix.detach().cpu().contiguous()
        for name, pair in pairs.items()
        for letter, matrix in zip("AB", pair, strict=True)
    }
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in of_modules.items()}
    ranks = {name: len(a) for name, (a, _) in pairs.items()}
    alphas = {name: ranks[name] * adapter.scale for name, adapter in adapters.items()}
    config = _peft_config(base_model, ranks, alphas, modules_to_save={_module_to_save(name) for name in of_modules})
    metadata = {"format": "pt", BARE_RECORD: peft_tensors.sha256(bare) if bare else NO_BARE}
    if base_record is not None:
        metadata[BASE_RECORD] = base_record
    if model_record is not None:
        metadata[MODEL_RECORD] = model_record
    files = {
        WEIGHTS: peft_tensors.to_bytes(tensors, metadata),
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }
    return files | ({BARE: peft_tensors.to_bytes(bare, {"format": "pt"})} if bare else {})


def _peft_config(
    base_model: str, ranks: Mapping[str, int], alphas: Mapping[str, float], modules_to_save: set[str]
) -> dict[str, Any]:
    """Return adapter_config.json; ranks, alphas: by module."""
    r, alpha = max(ranks.values(), default=1), max(alphas.values(), default=1)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": r,
        "lora_alpha": _integral(alpha),
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks) or NO_MODULE,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {name: _integral(value) for name, value in alphas.items() if value != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": sorted(modules_to_save) or None,
        "task_type": None,
        "inference_mode": True,
    }


def _module_to_save(parameter: str) -> str:
    # PEFT takes every module whose name ends so: "norm" alone would also be patch_embed.norm
    module = parameter.rpartition(".")[0]
    return module if "." in module else f"model.{module}"


def attach(
    vit: nn.Module, folder: str | Path, *, model: str | None = None, any_base: bool = False
) -> dict[str, LoraLinear]:
    """Put the adapter in `folder` on `vit`, in place, as one LoRA per Linear. Returns the adapters by module name.

    Fully trained parameters in the folder replace those of `vit`. Reads what `save_adapter` wrote and LoRA that PEFT
    wrote for a timm ViT. model: name under which `vit` was loaded, to compare with the adapter's base model. any_base:
    put it on another base model of the same shapes too. Raises ConfigError, before anything is changed, if the folder
    is not an adapter, has an option that is not read, is damaged, or belongs to another model: the first five names or
    shapes that differ.
    """
    folder = Path(folder)
    _check_size(vit, folder)
    config, tensors = _read(folder)
    peft_fit.check(vit, config, tensors, folder)
    if not any_base:
        adapter_base.check(vit, model, folder, recorded=tensors.base, base_model=config.base_model)
    adapters = {}
    for name, (a, b) in tensors.pairs.items():
        linear = vit.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        scale = config.scale(tensors.written[name])
        a, b = _from_base(linear.weight, a, b, scale, str(config.init).lower())
        peft_fit.check_update(linear.weight, a, b, scale, f"{folder}: {name}")
        adapters[name] = LoraLinear(linear, r=len(a), scale=scale)
        adapters[name].lora_a.data.copy_(a[None])
        adapters[name].lora_b.data.copy_(b[None])
    for name, adapter in adapters.items():
        vit.set_submodule(name, adapter)
    for name, value in (tensors.of_modules | tensors.bare).items():
        vit.get_parameter(name).data.copy_(value)
    call_qkv(vit)
    return adapters


def _check_size(vit: nn.Module, folder: Path) -> None:
    """Raise ConfigError for files that are too large for this model, before they are read into memory."""
    limit = 8 * sum(4 * p.numel() for p in vit.parameters()) + (1 << 20)
    for name in (WEIGHTS, BARE):
        if (folder / name).exists() and (size := (folder / name).stat().st_size) > limit:
            raise ConfigError(f"adapter: {folder / name} has {size} bytes, more than 8 times those of the model")


def _from_base(weight: Tensor, a: Tensor, b: Tensor, scale: float, init: str) -> tuple[Tensor, Tensor]:
    """Return A [r, K] and B [N, r] as an update of the unchanged `weight` [N, K].

    PEFT loads an adapter that started as PiSSA (Meng et al. 2024) or OLoRA (Bueyuekakyuez 2024) on W - P, P the part
    of W that A and B started as: the r largest singular values, or the first r columns and rows of W = Q R. So

        W - P + s B A  =  W + s (B A - P / s)  =  W + s [B, B0] [A; A0]      with s B0 A0 = -P, of rank 2 r
    """
    if init not in peft_config.CHANGED_BASE:
        return a, b
    r, weight = len(a), weight.detach().float()
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        b0, a0 = u[:, :r] * (s[:r] / -scale), vh[:r]
    else:
        q, upper = torch.linalg.qr(weight)
        b0, a0 = -q[:, :r], upper[:r]
    return torch.cat([a, a0]), torch.cat([b, b0], 1)


def load_adapted(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    img_size: int | Sequence[int] | None = None,
    arch: str | None = None,
    in_chans: int | None = None,
    num_classes: int | None = None,
    merged: bool = True,
    any_base: bool = False,
) -> nn.Module:
    """Load a timm model with an adapter, in eval mode, fp32, on the CPU.

    model: the folder of a run of adapt or of an adapter, which names its model; or the model's name, with the folder as
    `adapter`. img_size, arch, in_chans: as for `adapt`; None: as in training. num_classes: 0 takes the classifier off,
    so that model(images) gives features [B, D] of images as `upstep_fast.load(...).transform` makes; None keeps the
    base model's, which was not adapted; a number makes a new one of random weights. merged: add the adapter to the
    weights, so that the model is an ordinary timm model; False keeps LoraLinear modules. any_base: accept an adapter
    that was trained on another base model of the same shapes. Raises ConfigError if the model or the adapter cannot be
    loaded or do not fit each other.
    """
    given = {"model": model, "adapter": adapter} if adapter is not None else {"adapter": model}
    flags: dict[str, Any] = given | {"img_size": img_size, "arch": arch, "in_chans": in_chans, "any_base": any_base}
    flags = adapter_folders.complete(flags)
    name = str(flags["model"])
    vit = load(name, **{key: flags[key] for key in paths(BackboneConfig) if key in flags and key != "model"}).vit
    attach(vit, flags["adapter"], model=name, any_base=any_base)
    if num_classes is not None:
        if not isinstance(num_classes, int) or num_classes < 0:
            raise ConfigError(f"num_classes: got {num_classes}, must be an integer of at least 0, or None")
        vit.reset_classifier(num_classes)
    vit.requires_grad_(False)
    return merge(vit) if merged else vit


def read_files(folder: str | Path) -> dict[str, bytes]:
    """Return the files of an adapter by name, and nothing else that lies in `folder`. Raises ConfigError."""
    peft_tensors.require_files(Path(folder))
    present = [Path(folder) / name for name in FILES if (Path(folder) / name).exists()]
    files = {}
    for path in present:
        with input_files.open_regular(path, "adapter") as file:
            files[path.name] = file.read()
    return files


def fingerprint(folder: str | Path) -> str:
    """Return the SHA-256 over the files of an adapter; merged weights would differ with the machine that adds them."""
    files = read_files(folder)
    hashes = [hashlib.sha256(files[name]).digest() for name in (WEIGHTS, CONFIG, BARE) if name in files]
    return hashlib.sha256(b"".join(hashes)).hexdigest()


def read_tensors(folder: str | Path) -> AdapterTensors:
    """Return the tensors of the adapter in `folder`. Raises ConfigError if it is not an adapter or is damaged."""
    return _read(Path(folder))[1]


def _read(folder: Path) -> tuple[AdapterConfig, AdapterTensors]:
    peft_tensors.require_files(folder)
    config = peft_config.read(folder)
    return config, peft_tensors.read(folder, config)


def _integral(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
