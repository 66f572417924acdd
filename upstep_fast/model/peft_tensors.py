"""The tensor files of an adapter: read whole or refused, with the names that wrappers add to the keys removed.

torch.compile, DistributedDataParallel and activation checkpointing put a word into the names of a wrapped module's
parameters ("blocks.0._orig_mod.attn.qkv"). A state dict that was saved by hand has the adapter's name in its keys
("lora_A.default"), and perhaps no "base_model.model.". PEFT ignores such keys with a warning: the base model remains.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from upstep_fast import input_files
from upstep_fast.errors import ConfigError, first_line, printable
from upstep_fast.model.peft_config import CONFIG, AdapterConfig

WEIGHTS = "adapter_model.safetensors"
BARE = "bare_parameters.safetensors"  # parameters of the model itself (cls_token, pos_embed), which PEFT cannot save
PREFIX = "base_model.model."
BASE_RECORD = "upstep_fast.base"  # metadata of WEIGHTS, which PEFT ignores
BARE_RECORD = "upstep_fast.bare_parameters_sha256"
NO_BARE = "none"
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of an adapter folder in fp32, by the names that the model's modules and parameters have."""

    pairs: dict[str, tuple[Tensor, Tensor]]  # lora_A [r, K] and lora_B [N, r], by the Linear's name
    of_modules: dict[str, Tensor]  # fully trained parameters, which replace those of the model
    bare: dict[str, Tensor]  # the same of the model itself; their names have no dot
    written: dict[str, str]  # the Linear's name as PEFT saw it in training, by its name in `pairs`
    base: str | None  # of the base model (`adapter_base.record`), where the file has it


def read(folder: Path, config: AdapterConfig) -> AdapterTensors:
    """Return the tensors of the adapter in `folder`. config: of the same folder.

    Raises ConfigError if a file is missing, damaged or not the other's, or a tensor is no floating-point number, not
    finite, not of an adapter, or one of a pair.
    """
    tensors, metadata = _load(folder / WEIGHTS)
    pairs: dict[str, dict[str, Tensor]] = {}
    of_modules: dict[str, Tensor] = {}
    written: dict[str, str] = {}
    for key, value in tensors.items():
        name = _plain(key)
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if match:
            place, place_key = pairs.setdefault(match[1], {}), match[2]
            written[match[1]] = key.rpartition(PREFIX)[2].rpartition(".lora_")[0]
        elif config.is_saved(name):
            place, place_key = of_modules, name
        else:
            raise ConfigError(f"adapter: {folder / WEIGHTS} holds {_short(key)}, which is no LoRA matrix of a Linear")
        if place_key in place:
            raise ConfigError(f"adapter: {folder / WEIGHTS} holds {_short(name)} under two keys; one is {_short(key)}")
        place[place_key] = value
    return AdapterTensors(
        pairs=_paired(pairs, folder),
        of_modules=of_modules,
        bare=_read_bare(folder, metadata),
        written=written,
        base=metadata.get(BASE_RECORD),
    )


def _paired(pairs: Mapping[str, Mapping[str, Tensor]], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    for name, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            lacks = "B" if "A" in pair else "A"
            raise ConfigError(f"adapter: {folder / WEIGHTS} lacks lora_{lacks} of {_short(name)}")
    return {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}


def require_files(folder: Path) -> None:
    """Raise ConfigError if `folder` is no adapter folder: a file is missing."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            cure = "give the folder OUT/adapter"
            if name == WEIGHTS and (folder / "adapter_model.bin").exists():
                cure = "save adapter_model.bin again with PEFT's safe_serialization=True"
            raise ConfigError(f"adapter: {folder} holds no {name}; {cure}")


def _read_bare(folder: Path, metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the bare parameters; `metadata` of WEIGHTS says whether the adapter has some, and which file it is."""
    path, record = folder / BARE, metadata.get(BARE_RECORD)
    is_there = path.is_symlink() or path.exists()
    if record not in (None, NO_BARE) and not is_there:
        raise ConfigError(f"adapter: {folder} lacks {BARE}, which belongs to {WEIGHTS}; copy it too")
    if not is_there:
        return {}
    tensors, _ = _load(path)
    if record is not None and record != sha256(tensors):
        raise ConfigError(f"adapter: {path} does not belong to {WEIGHTS}; copy the whole folder again")
    for name in tensors:
        if "." in name:
            raise ConfigError(f"adapter: {path} holds {_short(name)}, which is not a parameter of the model itself")
    return tensors


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file; equal tensors and metadata give equal bytes (safetensors shuffles the metadata)."""
    data = safetensors.torch.save(dict(tensors))
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": dict(metadata)} | json.loads(data[8:start]), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[start:]


def sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, shapes and fp32 bytes of tensors on the CPU."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(value.detach().float().contiguous().numpy().data)
    return digest.hexdigest()


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file in fp32, and its metadata. Raises ConfigError."""
    try:
        with safe_open(input_files.require_regular(path, "adapter"), "pt") as file:
            metadata = file.metadata() or {}
            keys = file.keys()
            return {key: _checked(file.get_tensor(key), key, path) for key in keys}, metadata
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        raise ConfigError(f"adapter: {path} cannot be read: {first_line(error)}") from error


def _checked(value: Tensor, key: str, path: Path) -> Tensor:
    if value.dtype not in _FLOATS:
        kind = str(value.dtype).removeprefix("torch.")
        raise ConfigError(f"adapter: {path}: {_short(key)} is {kind}, must be float32, float16, bfloat16 or float64")
    value = value.float()
    if not value.isfinite().all():
        raise ConfigError(f"adapter: {path}: {_short(key)} has values that are not finite; train or save it again")
    return value


def _plain(key: str) -> str:
    """Return the name of a key in the model, without "base_model.model.", words of wrappers and adapter names."""
    name = ".".join(part for part in key.split(".") if part not in _WRAPPERS).removeprefix(PREFIX)
    name = name.replace(".modules_to_save.default.", ".")
    return re.sub(r"\.lora_([AB])\.default\.weight$", r".lora_\1.weight", name)


def _short(name: str) -> str:
    return printable(name, 120)
