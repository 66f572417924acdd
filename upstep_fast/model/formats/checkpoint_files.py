"""Loads checkpoint files of many origins into a timm ViT: read without running code, rename, count what fits."""

from __future__ import annotations

import argparse
import contextlib
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from upstep_fast.errors import ConfigError, first_line
from upstep_fast.input_files import read_json, require_regular
from upstep_fast.model.formats import conversion, key_names, state_dicts
from upstep_fast.model.formats.key_names import State
from upstep_fast.runtime.machine import free_bytes

log = logging.getLogger("upstep_fast")

PICKLES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLES)
SAFETENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

# tensors of pretraining and classification, which features do not need
_NOT_FEATURES = re.compile(
    r"(head|head_dist|fc|classifier|pooler|decoder\w*|mask_token|dino_head|ibot_head|lm_head|local_cls_norm|projectors)\b"
)
# tensors that change the features of the model they belong to, so a model without a place for them is another model
_FEATURES = re.compile(
    r"(blocks|patch_embed|pos_embed|cls_token|dist_token|reg_token|register_tokens|storage_tokens|rope\.freqs|\w*norm\w*)\b"
)
_BIAS = re.compile(r"(.*[._])?bias")
# what numpy's numbers in a checkpoint are made of ("best_acc": np.float64(3.0)); none of it runs code
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS: list[Any] = [np.dtype, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd")]
_NUMBERS += [(_NUMPY_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]  # numpy 1 and 2


@dataclass(frozen=True)
class Match:
    """How well a checkpoint fits a model."""

    format: str
    matched: int  # tensors of the model that the checkpoint fills
    total: int  # tensors of the model, its classifier not counted
    misses: tuple[str, ...]  # what is absent, of another shape, or has no place in the model; weights that matter first
    share: float  # that is filled, of tensors or of parameters, whichever is less; blocks that the model lacks count
    is_essential: bool  # a miss is more than a bias of the model

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
        _check_file(path)
        return load_file(path) if path.suffix == ".safetensors" else _read_pickle(path)


def check_types(path: Path) -> None:
    """Refuse a safetensors file with tensors that are no floating-point numbers, without reading them.

    Raises ConfigError.
    """
    with _reading(path):
        _check_file(path)
        with safe_open(path, "pt") as file:
            types = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    for key, kind in types.items():
        if kind not in ("F64", "F32", "F16", "BF16") and not _NOT_FEATURES.match(key):
            raise ConfigError(f"model: {path} holds {key} as {kind}, not as floating point; save it unquantized")


def check_pickle(path: Path) -> None:
    """Refuse a pickle that `read` refuses, without reading its tensors: they are mapped.

    Pickles in torch's format before 1.6 cannot be mapped and are read. Raises ConfigError.
    """
    with _reading(path):
        _check_file(path)
        state = _read_pickle(path, mmap=zipfile.is_zipfile(path))
    _check_types({key: value for key, value in state.items() if not _NOT_FEATURES.match(key)}, str(path))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the errors of the readers into ConfigErrors that name `path` and the cure."""
    try:
        yield
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"model: no file at {path}") from error
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"model: {path} is a pickle with more than tensors in it, which could run code when read; in a place you "
            "can lose, open it with torch.load and save its state dict with safetensors.torch.save_file"
        ) from error
    except MemoryError as error:
        raise ConfigError(f"model: {path} is larger than the free memory; is this the right file?") from error
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        if "TorchScript" in str(error):
            raise ConfigError(
                f"model: {path} is a TorchScript archive; save its state_dict() with safetensors.torch.save_file"
            ) from error
        raise ConfigError(
            f"model: {path} cannot be read ({first_line(error)[:200]}); fetch or save it again"
        ) from error


def _check_file(path: Path) -> None:
    """Refuse what is no regular file, and a file that memory cannot hold. Raises ConfigError."""
    if not path.exists():
        raise FileNotFoundError(path)
    size, free = require_regular(path, "model").stat().st_size, free_bytes(torch.device("cpu"))
    if free is not None and size > free:
        raise MemoryError(size)


def _read_pickle(path: Path, mmap: bool = False) -> State:
    with torch.serialization.safe_globals([argparse.Namespace, *_NUMBERS]):  # DINO and MAE keep their flags in the file
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    if not (state := state_dicts.find(content)):
        raise ConfigError(f"model: {path} holds no state dict; save the model's state_dict() with safetensors")
    return state


def shards(index: Path) -> list[str]:
    """Return the files that a transformers index (model.safetensors.index.json) names, all beside it.

    Raises ConfigError if the file is no index, or names a file elsewhere or of another kind.
    """
    try:
        names = sorted(set(read_json(index, "model")["weight_map"].values()))
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

    min_matched: smallest share of the model's tensors, and of its parameters, that must be filled. Whatever it is, only
    biases may be missing, which become zero, and nothing that changes features may be left over but whole blocks.
    Raises ConfigError, before anything is changed, for a checkpoint that does not fit: how many tensors matched and the
    first misses.
    """
    state = state_dicts.without_wrappers(state, where)
    state = {key.replace("model.layer.", "layer."): value for key, value in state.items()}  # DINOv3 in transformers 5
    if not state_dicts.is_vit(state):
        raise ConfigError(f"model: {where} holds no Vision Transformer, only {_some(state)}")
    if lora := next((key for key in state if ".lora_A." in key), None):
        raise ConfigError(
            f"model: {where} holds a LoRA of PEFT beside the weights ({lora}); save it after merge_and_unload()"
        )
    name, converted = conversion.to_timm(vit, state, key_names.detect(state), where)
    match, matched = _compare(vit, name, converted)
    if match.is_essential or match.share < min_matched:
        more = f" and {len(match.misses) - 5} more" if len(match.misses) > 5 else ""
        cure = "" if match.is_essential else ", or lower --min-matched to load what fits"
        raise ConfigError(
            f"model: {where} does not fit: {match}: {'; '.join(match.misses[:5])}{more}; check --arch{cure}"
        )
    _check_types(matched, where)
    _add_classifier(vit, converted, matched)
    vit.load_state_dict(matched, strict=False)
    log.info("%s: %s", where, match)
    for miss in match.misses[:5]:
        log.warning("%s: %s", where, miss)
    return match


def _compare(vit: Any, name: str, converted: State) -> tuple[Match, State]:
    """Return the match and the tensors to load: those that fit, and zeros for missing biases."""
    expected = {key: value for key, value in vit.state_dict().items() if not _NOT_FEATURES.match(key)}
    matched = {key: value for key, value in converted.items() if key in expected and value.shape == expected[key].shape}
    unplaced = [
        key for key, v in converted.items() if v.numel() and key not in expected and not _NOT_FEATURES.match(key)
    ]
    absent_blocks = [key for key in unplaced if _block(key) >= len(vit.blocks)]
    missing = [key for key in expected if key not in matched]
    missing.sort(key=lambda key: bool(_BIAS.fullmatch(key)))
    left_over = [key for key in unplaced if _FEATURES.match(key) and key not in absent_blocks]
    misses = [
        f"{key} is {list(converted[key].shape)}, the model wants {list(expected[key].shape)}"
        if key in converted
        else f"{key} is missing"
        for key in missing
    ]
    misses += [f"{key} has no place in the model" for key in sorted(unplaced, key=lambda key: key not in left_over)]
    filled = sum(expected[key].numel() for key in matched)
    wanted = sum(value.numel() for value in expected.values()) + sum(converted[key].numel() for key in absent_blocks)
    match = Match(
        name,
        len(matched),
        len(expected),
        tuple(misses),
        share=min(filled / max(wanted, 1), len(matched) / max(len(expected) + len(absent_blocks), 1)),
        is_essential=bool(left_over) or any(key in converted or not _BIAS.fullmatch(key) for key in missing),
    )
    return match, matched | {key: torch.zeros_like(expected[key]) for key in missing}


def _block(key: str) -> int:
    number = re.match(r"blocks\.(\d+)\.", key)
    return int(number[1]) if number else -1


def _check_types(state: State, where: str) -> None:
    for key, value in state.items():
        if not value.is_floating_point():
            raise ConfigError(
                f"model: {where} holds {key} as {str(value.dtype)[6:]}, not as floating point; save it unquantized"
            )


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


def _read_folder(folder: Path) -> State:
    names = [name for name in (SAFETENSORS, INDEX, PICKLE, *OPEN_CLIP) if (folder / name).exists()]
    if not names or names[0] != INDEX:
        return read(folder / (names[0] if names else SAFETENSORS))
    state: State = {}
    for name in shards(folder / INDEX):
        state |= read(folder / name)
    return state


def _some(state: Mapping[str, Tensor]) -> str:
    names = sorted(state)
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
