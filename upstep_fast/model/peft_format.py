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

from upstep_fast.errors import ConfigError
from upstep_fast.model.backbone import load
from upstep_fast.model.lora import LoraLinear, call_qkv, merge
from upstep_fast.runtime.atomic_file import write_atomic

NO_MODULE = "dummy-target-modules"  # PEFT's word for an adapter with modules_to_save alone


WEIGHTS = "adapter_model.safetensors"


CONFIG = "adapter_config.json"


BARE = "bare_parameters.safetensors"


_PREFIX = "base_model.model."


def save_adapter(folder: str | Path, adapters: Mapping[str, LoraLinear], base_model: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, each replaced whole or not at all."""
    write_files(folder, adapter_files(adapters, base_model))


def write_files(folder: str | Path, files: Mapping[str, bytes]) -> None:
    """Write the files of an adapter, each replaced whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomic(folder / name, data)


def strength_by_depth(first: float, last: float, depth: int) -> Callable[[str], float]:
    """Strengths of the blocks of a model of that depth, in a line from `first` to `last`: of a module, by its name."""

    def strength(name: str) -> float:
        block = re.match(r"blocks\.(\d+)\.", name)
        share = int(block[1]) / max(1, depth - 1) if block else 1.0
        return first + share * (last - first)

    return strength


def scale_saved(folder: str | Path, strength: Callable[[str], float]) -> None:
    """Multiplies a saved adapter's scales, in its alphas: below 1 a module lies between base and adapted model."""
    path = Path(folder) / CONFIG
    config = json.loads(path.read_text())
    before = dict.fromkeys(config["target_modules"], config["lora_alpha"]) | config.get("alpha_pattern", {})
    alphas = {name: _whole(strength(name) * alpha) for name, alpha in before.items()}
    config["lora_alpha"] = max(alphas.values())
    config["alpha_pattern"] = {name: alpha for name, alpha in alphas.items() if alpha != config["lora_alpha"]}
    write_atomic(path, (json.dumps(config, indent=2) + "\n").encode())


def adapter_files(
    adapters: Mapping[str, LoraLinear], base_model: str, *, whole: Mapping[str, Tensor] | None = None
) -> dict[str, bytes]:
    """The files of an adapter in PEFT's format, by name; whole: parameters that were trained as they are, by name."""
    tensors, ranks, alphas = {}, {}, {}
    for name, adapter in adapters.items():
        a, b = adapter.as_one()
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.detach().cpu().contiguous()
        ranks[name] = a.shape[0]
        alphas[name] = a.shape[0] * adapter.scale
    bare = {name: p.detach().cpu().contiguous() for name, p in (whole or {}).items() if "." not in name}
    inside = {name: p.detach().cpu().contiguous() for name, p in (whole or {}).items() if "." in name}
    tensors |= {f"{_PREFIX}{name}": tensor for name, tensor in inside.items()}
    r = max(ranks.values(), default=1)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": r,
        "lora_alpha": _whole(max(alphas.values(), default=1)),
        "lora_dropout": 0.0,
        "target_modules": sorted(adapters) or NO_MODULE,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {name: _whole(alphas[name]) for name, rank in ranks.items() if rank != r},
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": sorted({_module_to_save(name) for name in inside}) or None,
        "task_type": None,
        "inference_mode": True,
    }
    files = {
        WEIGHTS: to_bytes(tensors, metadata={"format": "pt"}),
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }
    return files | ({BARE: to_bytes(bare, metadata={"format": "pt"})} if bare else {})


def _module_to_save(parameter: str) -> str:
    # PEFT takes every module whose name ends so: "norm" alone would also be patch_embed.norm
    module = parameter.rpartition(".")[0]
    return module if "." in module else f"model.{module}"


def attach(vit: nn.Module, folder: str | Path) -> dict[str, LoraLinear]:
    """Put the adapter in `folder` on `vit`, in place, as one LoRA a Linear. Returns the adapters by module name.

    Parameters that were trained as they are replace those of `vit`. Reads what `save` wrote and any LoRA that PEFT
    wrote for a timm ViT. Raises ConfigError, before anything is changed, if the folder is not an adapter or belongs to
    another model: the first five names or shapes that differ.
    """
    config, tensors, bare = _read(Path(folder))
    pairs, whole = _sort(config, tensors, Path(folder))
    whole |= bare
    wrong = [*_misfits(vit, pairs), *_misfits_whole(vit, whole)]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        base = config.get("base_model_name_or_path")
        raise ConfigError(f"adapter: {folder} (made for {base}) does not fit this model: {'; '.join(wrong[:5])}{more}")
    adapters = {}
    for name, (a, b) in pairs.items():
        rank = a.shape[0]
        alpha = _matching(config.get("alpha_pattern"), name, config.get("lora_alpha", rank))
        base = vit.get_submodule(name)
        assert isinstance(base, nn.Linear)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        adapter = LoraLinear(base, r=rank, scale=scale)
        adapter.lora_a.data.copy_(a[None])
        adapter.lora_b.data.copy_(b[None])
        vit.set_submodule(name, adapter)
        adapters[name] = adapter
    for name, value in whole.items():
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
    """The timm model `model` with the adapter in folder `adapter`; a plain nn.Module in eval mode, fp32, on the CPU.

    img_size, arch, in_chans: as for `adapt`. merged: add the adapter to the weights, so that the model is an ordinary
    timm model; False keeps it apart. Raises ConfigError if the model or the adapter cannot be loaded or they do not
    belong together.
    """
    vit = load(model, img_size=img_size, arch=arch, in_chans=in_chans).vit
    attach(vit, adapter)
    vit.requires_grad_(False)
    return merge(vit) if merged else vit


def fingerprint(folder: str | Path) -> str:
    """SHA-256 over the files of an adapter; the merged weights would differ with the machine that adds them."""
    files = [Path(folder) / name for name in (WEIGHTS, CONFIG, BARE)]
    return hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files if f.is_file())).hexdigest()


def fully_trained(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters in an adapter folder that were trained as they are: those of modules, and bare ones, by name."""
    config, tensors, bare = _read(Path(folder))
    return _sort(config, tensors, Path(folder))[1], bare


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
        raise ConfigError(f"adapter: {folder} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ConfigError(f"adapter: {folder / CONFIG} is not a LoRA configuration of PEFT")
    if config.get("use_dora"):
        raise ConfigError(f"adapter: {folder} uses DoRA, which this version does not read; merge it with PEFT")
    return config, tensors, bare


def _sort(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """The LoRA pairs (A, B) by the Linear's name, and the parameters of modules_to_save by their own."""
    found: dict[str, dict[str, Tensor]] = {}
    whole = {}
    saved = tuple(str(name) for name in config.get("modules_to_save") or ())
    for key, value in tensors.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if not match and key.startswith(_PREFIX) and any(f".{name}." in key for name in saved):
            whole[key.removeprefix(_PREFIX)] = value
            continue
        if not match:
            raise ConfigError(f"adapter: {folder / WEIGHTS} holds {key}, which is no LoRA matrix of a Linear")
        found.setdefault(match[1], {})[match[2]] = value
    for name, pair in found.items():
        if set(pair) != {"A", "B"}:
            raise ConfigError(f"adapter: {folder / WEIGHTS} lacks lora_{'B' if 'A' in pair else 'A'} of {name}")
    if not found and not whole:
        raise ConfigError(f"adapter: {folder / WEIGHTS} holds no LoRA matrices")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}, whole


def _misfits(vit: nn.Module, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[str]:
    linears = {name: module for name, module in vit.named_modules() if isinstance(module, nn.Linear)}
    for name, (a, b) in sorted(pairs.items()):
        if name not in linears:
            yield f"{name} is not in the model"
            continue
        rank = a.shape[0]
        want = (rank, linears[name].in_features), (linears[name].out_features, rank)
        for label, tensor, shape in (("lora_A", a, want[0]), ("lora_B", b, want[1])):
            if tuple(tensor.shape) != shape:
                yield f"{name}.{label} is {list(tensor.shape)}, the model wants {list(shape)}"


def _misfits_whole(vit: nn.Module, whole: Mapping[str, Tensor]) -> Iterator[str]:
    parameters = dict(vit.named_parameters())
    for name, value in sorted(whole.items()):
        if name not in parameters:
            yield f"{name} is not in the model"
        elif parameters[name].shape != value.shape:
            yield f"{name} is {list(value.shape)}, the model wants {list(parameters[name].shape)}"


def _matching(pattern: Mapping[str, float] | None, name: str, default: float) -> float:
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?{key}", name):
            return value
    return default


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
