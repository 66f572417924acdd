"""A fine-tuned classifier on disk: the trained tensors, and the settings from which the rest is rebuilt.

folder/config.json            the base model, the method's settings, class names, SHA-256 of the tensors
folder/trained.safetensors    the side network, LoRA or the backbone, and the head
folder/adapter/               the adapter that was merged first, if there was one
folder/learned.safetensors    size and hash of each image that the classifier has learned from (learned.py)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from upstep_fast.config.base import DataConfig, reading_of
from upstep_fast.config.finetune import FinetuneConfig
from upstep_fast.config.flat import flat, from_flat
from upstep_fast.config.reading import READING
from upstep_fast.config.value_types import check_types
from upstep_fast.errors import ConfigError, first_line
from upstep_fast.input_files import read_bytes, read_json
from upstep_fast.methods.supervised.baselines import Baseline
from upstep_fast.methods.supervised.losa import Losa, LosaSpec
from upstep_fast.methods.trainable import trained
from upstep_fast.model import backbone as backbones
from upstep_fast.model import lora, model_card, peft_format
from upstep_fast.model.backbone import Backbone
from upstep_fast.model.identity import differences, model_identity
from upstep_fast.runtime.atomic_file import write_atomic
from upstep_fast.train.finetune.classify import predict_paths

log = logging.getLogger("upstep_fast")

CONFIG, WEIGHTS, ADAPTER, LEARNED = "config.json", "trained.safetensors", "adapter", "learned.safetensors"
MODEL = "model"  # the folder's name in that of a run
MAX_WEIGHTS = 64 << 30  # bytes
MAX_LEARNED = 4 << 30
METADATA = "upstep_fast"  # name of our entry in the metadata of WEIGHTS
FORMAT = 1
# what `build` and the backbone are made from
_SETTINGS = (
    *("method", "frames", "losa_rank", "losa_token_rank", "losa_combine", "losa_order", "losa_every"),
    *("losa_learn_scale", "lora_r", "lora_alpha", "lora_targets", "any_base"),
)
_MODEL = ("model", "arch", "img_size", "in_chans", "mean", "std", "min_matched")
_PARTS = {"settings": _SETTINGS, "backbone": _MODEL, "reading": READING}  # of config.json


def build(backbone: Backbone, config: FinetuneConfig, classes: int) -> Losa | Baseline:
    """Return the untrained classifier of this configuration, on the CPU, initialized from its seed."""
    frames = config.frames or 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.runtime.seed)
        if config.method == "losa":
            return Losa(backbone, losa_spec(config), classes, frames)
        drop_path = config.regularization.drop_path
        spec = lora.LoraSpec.from_config(config.lora)
        return Baseline(backbone, config.method, classes, spec=spec, drop_path=drop_path, frames=frames)


def losa_spec(config: FinetuneConfig) -> LosaSpec:
    """Return the settings of the side network."""
    own = vars(config.losa)
    return LosaSpec(**own | {"token_rank": own["rank"] if own["token_rank"] is None else own["token_rank"]})


def load_backbone(config: FinetuneConfig) -> tuple[Backbone, dict[str, Any]]:
    """Return the base model with the adapter merged, if there is one, and its identity without. Raises ConfigError.

    The last bits of merged weights differ between processors, so they do not identify a model.
    """
    backbone = backbones.load_from(config.model)
    identity = model_identity(backbone)
    if config.adapter is not None:
        peft_format.attach(backbone.vit, config.adapter, model=config.model.name, any_base=config.any_base)
        lora.merge(backbone.vit)
        backbone.vit.requires_grad_(False)
    return backbone, identity


def save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: FinetuneConfig,
    classes: tuple[str, ...],
    identity: Mapping[str, Any],
    learned: Tensor | None = None,
) -> None:
    """Write the folder; config.json, last, names the hashes of the other files. Raises OSError.

    learned: from `learned.fingerprints`; None for clips.
    identity: of the base model without the adapter (`load_backbone`). It and the class names lie in the metadata of the
    tensors' file, so the hash covers them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # one entry: safetensors writes several in an order that changes from one process to the next
    belongs_to = {METADATA: json.dumps({"classes": list(classes), "model": identity})}
    data = safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, belongs_to)
    if config.adapter is not None:
        _copy_adapter(Path(config.adapter), folder / ADAPTER, config.model.name)
    write_atomic(folder / WEIGHTS, data)
    (folder / LEARNED).unlink(missing_ok=True)
    learned_hash = None
    if learned is not None:
        content = safetensors.torch.save({"learned": learned})
        write_atomic(folder / LEARNED, content)
        learned_hash = hashlib.sha256(content).hexdigest()
    flags = flat(config)
    values = {
        "format": FORMAT,
        "classes": list(classes),
        **{part: {name: flags[name] for name in names} for part, names in _PARTS.items()},
        "has_adapter": config.adapter is not None,
        "sha256": hashlib.sha256(data).hexdigest(),
        "learned_sha256": learned_hash,
    }
    write_atomic(folder / CONFIG, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def _copy_adapter(adapter: Path, folder: Path, base_model: str) -> None:
    """Copy an adapter's files and its card; one without a card gets one that names its base model."""
    folder.mkdir(exist_ok=True)
    for name, content in peft_format.read_files(adapter).items():
        write_atomic(folder / name, content)
    card = model_card.adapter_card(base_model)
    if (path := model_card.card_in(adapter)) is not None:
        with contextlib.suppress(ConfigError):
            card = read_bytes(path, "adapter")
    write_atomic(folder / model_card.NAME, card)


def load_finetuned(
    folder: str | Path, *, model: str | None = None, img_size: int | tuple[int, int] | None = None
) -> nn.Module:
    """Return the classifier saved in `folder` (OUT or OUT/model of finetune), in eval mode, fp32, on the CPU.

    It maps normalized images [B, C, H, W], or clips [B, T, C, H, W], to logits [B, classes]; `.classes` holds the class
    names in order. model: new location of the base model, if it was moved. img_size: another input size in pixels;
    weights of LoSA that mix tokens are interpolated. `.predict(paths)` reads images and returns (path, label,
    probability) of each. Raises ConfigError if the folder or the model cannot be used.
    """
    net, backbone = load(folder, model=model, img_size=img_size)
    net.predict = partial(predict_paths, net, backbone, reading=reading_of(DataConfig((), **read_reading(folder))))
    return net


def load(
    folder: str | Path, *, model: str | None = None, img_size: int | tuple[int, int] | None = None
) -> tuple[Any, Backbone]:
    """Return the classifier, as `load_finetuned` does, and its backbone, which has the evaluation transform."""
    folder = model_folder(folder)
    values, tensors, belongs_to = _read(folder)
    try:
        settings, base = dict(values["settings"]), dict(values["backbone"])
        settings["lora_targets"] = tuple(settings["lora_targets"])
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in base.items()} | settings
        adapter = str(folder / ADAPTER) if values["has_adapter"] else None
        if model is not None:
            fields["model"] = model
        check_types(fields, FinetuneConfig, str(folder / CONFIG))
        config = from_flat(FinetuneConfig, **fields, adapter=adapter, data=(), out="")
        classes = tuple(str(name) for name in values["classes"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder / CONFIG} is not that of a fine-tuned model: {error}") from error
    backbone, identity = load_backbone(config)
    _check_identity(folder, belongs_to, config, identity, classes)
    grid = backbone.vit.patch_embed.grid_size
    net = build(backbone, config, len(classes))
    _fill(trained(net), tensors, f"{folder} does not fit the model {config.model.name}")
    if img_size is not None:
        backbone.vit.set_input_size(img_size=(img_size, img_size) if isinstance(img_size, int) else img_size)
        if isinstance(net, Losa):
            net.side.resample(grid, backbone.vit.patch_embed.grid_size, backbone.vit.num_prefix_tokens)
        backbone = replace(backbone, img_size=tuple(backbone.vit.patch_embed.img_size))
    net.classes = classes  # type: ignore[assignment]
    return net.requires_grad_(False).eval(), backbone


def model_folder(folder: str | Path) -> Path:
    """Return OUT/model for the folder OUT of a run, else `folder` itself."""
    inner = Path(folder) / MODEL
    return inner if (inner / CONFIG).is_file() else Path(folder)


def read_reading(folder: str | Path) -> dict[str, Any]:
    """Return how the classifier's images were read, by flag of READING; earlier versions: full.

    A folder without a model gives {}: `load` refuses it. Raises ConfigError.
    """
    path = model_folder(folder) / CONFIG
    values = read_json(path, "run") if path.is_file() else None
    if not isinstance(values, dict):
        return {}
    reading = values.get("reading", {"intensity": "full"})
    if not isinstance(reading, dict):
        raise ConfigError(f"{path} is not that of a fine-tuned model: reading is {type(reading).__name__}")
    recorded = {name: value for name, value in reading.items() if name in READING and value is not None}
    check_types(recorded, FinetuneConfig, str(path))
    return recorded


def read_learned(folder: str | Path) -> Tensor | None:
    """Return size and hash of the images that the classifier has learned from, [N, 2] int64; None if it does not tell.

    Raises ConfigError if the file is not the one that config.json names.
    """
    folder = model_folder(folder)
    expected = read_json(folder / CONFIG, "run").get("learned_sha256")
    if expected is None:
        return None
    data = read_bytes(folder / LEARNED, "run", MAX_LEARNED)
    try:
        if hashlib.sha256(data).hexdigest() == expected:
            learned = safetensors.torch.load(data)["learned"]
            if learned.dtype == torch.int64 and learned.ndim == 2 and learned.shape[1] == 2:
                return learned
    except (KeyError, SafetensorError):
        pass
    raise ConfigError(f"run: {folder / LEARNED} is not what {CONFIG} was written for; fine-tune again or copy both")


def _fill(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], problem: str) -> None:
    """Copy the tensors into the parameters. Raises ConfigError, with `problem`, if a name or shape differs."""
    wrong = sorted(parameters.keys() ^ tensors.keys()) + [
        name for name in parameters.keys() & tensors.keys() if parameters[name].shape != tensors[name].shape
    ]
    if wrong:
        raise ConfigError(f"{problem}: {', '.join(wrong[:5])}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _check_identity(
    folder: Path,
    belongs_to: Mapping[str, Any],
    config: FinetuneConfig,
    identity: Mapping[str, Any],
    classes: tuple[str, ...],
) -> None:
    """Refuse another base model and other class names than those of the training; earlier versions wrote neither."""
    if "classes" in belongs_to and belongs_to["classes"] != list(classes):
        raise ConfigError(f"{folder}: the classes in {CONFIG} are not those of {WEIGHTS}; fine-tune again or copy both")
    if "model" in belongs_to and (different := differences(belongs_to["model"], identity)):
        raise ConfigError(
            f"{folder} was trained on another base model than {config.model.name}: {'; '.join(different[:5])}; "
            "give the base model of the training with model="
        )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Return config.json, the tensors, and the metadata of the tensors' file."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} holds no {name}; give the folder of a run of finetune (its --out)")
    try:
        values = read_json(folder / CONFIG, "model")
        data = read_bytes(folder / WEIGHTS, "model", MAX_WEIGHTS)
        if not isinstance(values, dict) or values.get("sha256") != hashlib.sha256(data).hexdigest():
            raise ConfigError(f"{folder}: {WEIGHTS} is not what {CONFIG} was written for; fine-tune again or copy both")
        if values.get("format") != FORMAT:
            raise ConfigError(f"{folder}: format {values.get('format')}, this version reads {FORMAT}")
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        belongs_to = json.loads(header.get("__metadata__", {}).get(METADATA, "{}"))
        return values, safetensors.torch.load(data), belongs_to
    except (OSError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{folder} cannot be read: {first_line(error)}") from error
