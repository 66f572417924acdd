"""Adapters as files in PEFT's format: written, read, scaled and put on a model."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from upstep_fast.errors import ConfigError, first_line
from upstep_fast.model.backbone import load
from upstep_fast.model.lora import LoraLinear, call_qkv, merge
from upstep_fast.runtime.atomic_file import write_together

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
BARE = "bare_parameters.safetensors"  # parameters of the model itself (cls_token, pos_embed), which PEFT cannot save
NO_MODULE = "dummy-target-modules"  # PEFT's name for an adapter with modules_to_save alone
_PREFIX = "base_model.model."


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
    saved = dict.fromkeys(config["target_modules"], config["lora_alpha"]) | config.get("alpha_pattern", {})
    alphas = {name: _integral(strength(name) * alpha) for name, alpha in saved.items()}
    config["lora_alpha"] = max(alphas.values())
    config["alpha_pattern"] = {name: alpha for name, alpha in alphas.items() if alpha != config["lora_alpha"]}
    return {**files, CONFIG: (json.dumps(config, indent=2) + "\n").encode()}


def adapter_files(
    adapters: Mapping[str, LoraLinear], base_model: str, *, fully_trained: Mapping[str, Tensor] | None = None
) -> dict[str, bytes]:
    """Return the files of an adapter in PEFT's format, by name.

    base_model: goes into base_model_name_or_path. fully_trained: parameters trained without an adapter, by name.
    """
    pairs = {name: adapter.as_one() for name, adapter in adapters.items()}
    parameters = {name: p.detach().cpu().contiguous() for name, p in (fully_trained or {}).items()}
    bare = {name: p for name, p in parameters.items() if "." not in name}
    of_modules = {name: p for name, p in parameters.items() if "." in name}
    tensors = {
        f"{_PREFIX}{name}.lora_{letter}.weight": matrix.detach().cpu().contiguous()
        for name, pair in pairs.items()
        for letter, matrix in zip("AB", pair, strict=True)
    }
    tensors |= {f"{_PREFIX}{name}": tensor for name, tensor in of_modules.items()}
    ranks = {name: len(a) for name, (a, _) in pairs.items()}
    alphas = {name: ranks[name] * adapter.scale for name, adapter in adapters.items()}
    config = _peft_config(base_model, ranks, alphas, modules_to_save={_module_to_save(name) for name in of_modules})
    files = {
        WEIGHTS: to_bytes(tensors, metadata={"format": "pt"}),
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }
    return files | ({BARE: to_bytes(bare, metadata={"format": "pt"})} if bare else {})


def _peft_config(
    base_model: str, ranks: Mapping[str, int], alphas: Mapping[str, float], modules_to_save: set[str]
) -> dict[str, Any]:
    """Return adapter_config.json; ranks, alphas: by module."""
    r = max(ranks.values(), default=1)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": r,
        "lora_alpha": _integral(max(alphas.values(), default=1)),
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks) or NO_MODULE,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {name: _integral(alphas[name]) for name, rank in ranks.items() if rank != r},
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


def attach(vit: nn.Module, folder: str | Path) -> dict[str, LoraLinear]:
    """Put the adapter in `folder` on `vit`, in place, as one LoRA per Linear. Returns the adapters by module name.

    Fully trained parameters in the folder replace those of `vit`. Reads what `save_adapter` wrote and any LoRA that
    PEFT wrote for a timm ViT. Raises ConfigError, before anything is changed, if the folder is not an adapter or
    belongs to another model: the first five names or shapes that differ.
    """
    config, tensors, bare = _read(Path(folder))
    pairs, of_modules = _split(config, tensors, Path(folder))
    parameters = of_modules | bare
    mismatches = [*_lora_mismatches(vit, pairs), *_parameter_mismatches(vit, parameters)]
    if mismatches:
        more = f" and {len(mismatches) - 5} more" if len(mismatches) > 5 else ""
        base = config.get("base_model_name_or_path")
        raise ConfigError(
            f"adapter: {folder} (made for {base}) does not fit this model: {'; '.join(mismatches[:5])}{more}"
        )
    adapters = {}
    for name, (a, b) in pairs.items():
        base_linear = vit.get_submodule(name)
        assert isinstance(base_linear, nn.Linear)
        adapters[name] = LoraLinear(base_linear, r=len(a), scale=_scale(config, name, len(a)))
        adapters[name].lora_a.data.copy_(a[None])
        adapters[name].lora_b.data.copy_(b[None])
        vit.set_submodule(name, adapters[name])
    for name, value in parameters.items():
        vit.get_parameter(name).data.copy_(value)
    call_qkv(vit)
    return adapters


def load_adapted(
    model: str,
    adapter: str | Path,
    *,
    img_size: int | Sequence[int] | None = None,
    arch: str | None = None,
    in_chans: int | None = None,
    merged: bool = True,
) -> nn.Module:
    """Load the timm model `model` with the adapter in folder `adapter`, in eval mode, fp32, on the CPU.

    img_size, arch, in_chans: as for `adapt`. merged: add the adapter to the weights, so that the model is an ordinary
    timm model; False keeps LoraLinear modules. Raises ConfigError if the model or the adapter cannot be loaded or do
    not fit each other.
    """
    vit = load(model, img_size=img_size, arch=arch, in_chans=in_chans).vit
    attach(vit, adapter)
    vit.requires_grad_(False)
    return merge(vit) if merged else vit


def fingerprint(folder: str | Path) -> str:
    """Return the SHA-256 over the files of an adapter; merged weights would differ with the machine that adds them."""
    files = [Path(folder) / name for name in (WEIGHTS, CONFIG, BARE)]
    return hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files if f.is_file())).hexdigest()


def fully_trained(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the fully trained parameters in an adapter folder: (of modules, of the model itself), by name.

    Raises ConfigError if the folder is not an adapter.
    """
    config, tensors, bare = _read(Path(folder))
    return _split(config, tensors, Path(folder))[1], bare


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
        bare = load_file(folder / BARE) if (folder / BARE).is_file() else {}
    except FileNotFoundError as error:
        raise ConfigError(
            f"adapter: {folder} holds no {Path(error.filename or WEIGHTS).name}; give the folder OUT/adapter"
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"adapter: {folder} cannot be read: {first_line(error)}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ConfigError(f"adapter: {folder / CONFIG} is not a LoRA configuration of PEFT")
    if config.get("use_dora"):
        raise ConfigError(f"adapter: {folder} uses DoRA, which this version does not read; merge it with PEFT")
    return config, tensors, bare


def _split(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Split the tensors into LoRA pairs (A, B) by the Linear's name, and the parameters of modules_to_save by name."""
    pairs: dict[str, dict[str, Tensor]] = {}
    of_modules = {}
    modules_to_save = tuple(str(name) for name in config.get("modules_to_save") or ())
    for key, value in tensors.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match:
            pairs.setdefault(match[1], {})[match[2]] = value
        elif key.startswith(_PREFIX) and any(f".{name}." in key for name in modules_to_save):
            of_modules[key.removeprefix(_PREFIX)] = value
        else:
            raise ConfigError(f"adapter: {folder / WEIGHTS} holds {key}, which is no LoRA matrix of a Linear")
    for name, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ConfigError(f"adapter: {folder / WEIGHTS} lacks lora_{'B' if 'A' in pair else 'A'} of {name}")
    if not pairs and not of_modules:
        raise ConfigError(f"adapter: {folder / WEIGHTS} holds no LoRA matrices")
    return {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}, of_modules


def _lora_mismatches(vit: nn.Module, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[str]:
    linears = {name: module for name, module in vit.named_modules() if isinstance(module, nn.Linear)}
    for name, (a, b) in sorted(pairs.items()):
        if name not in linears:
            yield f"{name} is not in the model"
            continue
        expected_a, expected_b = (len(a), linears[name].in_features), (linears[name].out_features, len(a))
        for label, tensor, shape in (("lora_A", a, expected_a), ("lora_B", b, expected_b)):
            if tuple(tensor.shape) != shape:
                yield f"{name}.{label} is {list(tensor.shape)}, the model wants {list(shape)}"


def _parameter_mismatches(vit: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[str]:
    expected = dict(vit.named_parameters())
    for name, value in sorted(parameters.items()):
        if name not in expected:
            yield f"{name} is not in the model"
        elif expected[name].shape != value.shape:
            yield f"{name} is {list(value.shape)}, the model wants {list(expected[name].shape)}"


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """Return alpha / rank of a module, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023)."""
    alpha = _matching(config.get("alpha_pattern"), name, config.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matching(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    for key, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?{key}", name):
            return value
    return default


def _integral(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
