"""A model with its adapter in other people's formats, each read back by the tool it is for and compared.

    difference = max |f' - f| / max(1, max |f|)

f are the features of the model with the adapter apart, f' those of the exported files in the tool that reads them,
both in fp32. Above 1e-4 nothing is written.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models.eva import Eva
from torch import Tensor, nn

from . import backbone as backbones
from . import hf_config, key_names, lora, weights
from .backbone import Backbone, features
from .catalogue import HUB
from .config import ExportConfig
from .data.loader import load_images
from .data.sources import open_source
from .errors import CheckFailedError, ConfigError, RunFailedError
from .key_names import State

BOUND = 1e-4
IMAGES = 16  # that the comparison sees
MARK = "exported by upstep-fast"  # in the model card; only a folder with it is replaced


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from the model it came from."""

    folder: Path
    difference: float
    images: str  # what the comparison saw


@dataclass(frozen=True)
class _Job:
    config: ExportConfig
    base: Backbone  # with the adapter merged into it, but for PEFT
    adapters: Mapping[str, lora.LoraLinear]
    folder: Path


# writes the files; returns the tool that reads them, its features of normalised images, and how a user loads them
Writer = Callable[[_Job], tuple[str, Callable[[Tensor], Tensor], str]]


def export(model: str, out: str | Path, *, adapter: str | Path | None = None, **options: Any) -> Exported:
    """Writes `model` with the adapter in folder `adapter` to the new folder `out`; keywords are ExportConfig's."""
    return run(ExportConfig(model=model, out=str(out), adapter=None if adapter is None else str(adapter), **options))


@torch.no_grad()
def run(config: ExportConfig) -> Exported:
    """As `export`. Raises ConfigError for what cannot be exported and CheckFailedError for what came out different."""
    _check(config)
    base = backbones.load_from(config)
    images, seen = _images(config, base)
    adapters = {} if config.adapter is None else lora.attach(base.vit, config.adapter)
    expected = features(base.vit, images)
    if config.format != "peft":
        lora.merge(base.vit)
    with _replacing(Path(config.out)) as folder:
        tool, measure, usage = WRITERS[config.format](_Job(config, base, adapters, folder))
        difference = ((measure(images) - expected).abs().max() / expected.abs().max().clamp_min(1)).item()
        if not difference <= BOUND:
            raise CheckFailedError(
                f"format: features in {tool} differ by {difference:.1e} on {seen}, more than {BOUND:.0e}; nothing was "
                "written: this format does not hold this model, try another"
            )
        (folder / "README.md").write_text(_card(config, base, tool, usage, difference, seen))
    return Exported(Path(config.out), difference, seen)


def _timm(job: _Job) -> tuple[str, Callable[[Tensor], Tensor], str]:
    vit, base = job.base.vit, job.base
    size = (vit.patch_embed.proj.in_channels, *base.img_size)
    vit.pretrained_cfg = {**vit.pretrained_cfg, "mean": base.mean, "std": base.std, "input_size": size}
    timm.models.save_for_hf(vit, str(job.folder), model_args=base.model_args, safe_serialization=True)

    def measure(images: Tensor) -> Tensor:
        return features(timm.create_model(f"local-dir:{job.folder}", pretrained=True).eval(), images)

    return "timm", measure, 'model = timm.create_model("local-dir:FOLDER", pretrained=True)'


def _hf(job: _Job) -> tuple[str, Callable[[Tensor], Tensor], str]:
    vit: Any = job.base.vit
    config = hf_config.describe(vit)
    _need("transformers", "hf", "pip install transformers")
    state = _without_head(vit)
    kind = config["model_type"]
    if kind == "vit":
        state = key_names.HF_VIT.from_timm(state)
    elif kind == "dinov3_vit":
        style = key_names.HF_DINOV3_GATED if config["use_gated_mlp"] else key_names.HF_DINOV3
        state = style.from_timm(state | {"mask_token": torch.zeros_like(vit.cls_token)})
    else:
        state = key_names.HF_DINOV2.from_timm(key_names.dinov2_names(state, packed=config["use_swiglu_ffn"]))
    _save(state, job.folder / "model.safetensors")
    _write_json(job.folder / "config.json", config)
    _write_json(job.folder / "preprocessor_config.json", hf_config.preprocessor(job.base))
    options = {"add_pooling_layer": False} if kind == "vit" else {}
    prefix = vit.num_prefix_tokens
    pool = "[:, 0]" if vit.global_pool == "token" else f"[:, {prefix}:].mean(1)"

    def measure(images: Tensor) -> Tensor:
        import transformers

        theirs = transformers.AutoModel.from_pretrained(job.folder, **options).eval()
        tokens = theirs(images).last_hidden_state
        return tokens[:, 0] if vit.global_pool == "token" else tokens[:, prefix:].mean(1)

    arguments = "".join(f", {key}={value}" for key, value in options.items())
    usage = f'model = transformers.AutoModel.from_pretrained("FOLDER"{arguments})\n'
    return "transformers", measure, f"{usage}features = model(images).last_hidden_state{pool}"


def _peft(job: _Job) -> tuple[str, Callable[[Tensor], Tensor], str]:
    _need("peft", "peft", "pip install 'upstep_fast[peft]'")
    hub = job.base.vit.pretrained_cfg.get("hf_hub_id")
    name = f"{HUB}{hub}" if hub and timm.is_model(job.config.model.partition(".")[0]) else job.config.model
    lora.save(job.folder, job.adapters, name)
    biased = isinstance(job.base.vit, Eva) and getattr(job.base.vit.blocks[0].attn, "q_bias", None) is not None

    def measure(images: Tensor) -> Tensor:
        import peft

        vit = backbones.load_from(job.config).vit
        lora.call_qkv(vit)
        served: Any = peft.PeftModel.from_pretrained(vit, str(job.folder)).eval()
        return features(served.base_model.model, images)

    usage = f'model = timm.create_model("{name}", pretrained=True)\n'
    if biased:  # else timm reads qkv.weight itself, past PEFT's adapter
        usage += "for block in model.blocks:\n    block.attn.qkv_bias_separate = True\n"
    return "PEFT", measure, usage + 'model = peft.PeftModel.from_pretrained(model, "FOLDER")'


def _dinov2(job: _Job) -> tuple[str, Callable[[Tensor], Tensor], str]:
    vit: Any = job.base.vit
    odd = isinstance(vit, Eva) or not vit.has_class_token or vit.pos_embed is None
    if odd or hf_config.describe(vit)["model_type"] == "vit":
        raise ConfigError("format: dinov2 holds ViTs with a class token and LayerScale; use --format timm or hf")
    path = job.folder / "model.pth"  # what DINOv2's own loader reads; tensors only, so weights_only=True reads it too
    packed = hf_config.describe(vit).get("use_swiglu_ffn", False)
    torch.save(key_names.dinov2_names(_without_head(vit), packed=packed), path)

    def measure(images: Tensor) -> Tensor:
        fresh = timm.create_model(job.base.arch, **job.base.model_args | {"num_classes": 0}).eval()
        weights.fill(fresh, weights.read(path), where=str(path), min_matched=1.0)
        return features(fresh, images)

    return "timm's reader of DINOv2 names", measure, 'state = torch.load("FOLDER/model.pth", weights_only=True)'


def _onnx(job: _Job) -> tuple[str, Callable[[Tensor], Tensor], str]:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _need(package, "onnx", "pip install 'upstep_fast[onnx]'")
    path = job.folder / "model.onnx"
    example = torch.zeros(2, job.base.vit.patch_embed.proj.in_channels, *job.base.img_size)
    with contextlib.redirect_stdout(None):  # the exporter reports its progress there
        torch.onnx.export(
            _Features(job.base.vit).eval(),
            (example,),
            str(path),
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            dynamo=True,
            external_data=False,
        )

    def measure(images: Tensor) -> Tensor:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        parts = [images[:1], images[1:]] if len(images) > 1 else [images]  # one image, then many
        return torch.cat([torch.from_numpy(session.run(None, {"images": part.numpy()})[0]) for part in parts])

    usage = 'session = onnxruntime.InferenceSession("FOLDER/model.onnx")\n'
    return "onnxruntime", measure, usage + 'features = session.run(None, {"images": images})[0]'


WRITERS: dict[str, Writer] = {"timm": _timm, "hf": _hf, "peft": _peft, "dinov2": _dinov2, "onnx": _onnx}


class _Features(nn.Module):
    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        return features(self.vit, images)


def _check(config: ExportConfig) -> None:
    out = Path(config.out)
    if config.format == "peft" and config.adapter is None:
        raise ConfigError("adapter: --format peft writes an adapter; give one with --adapter")
    if not out.parent.is_dir():
        raise ConfigError(f"out: no folder {out.parent}")
    if out.is_file():
        raise ConfigError(f"out: {out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()):
        if not config.overwrite:
            raise ConfigError(f"out: {out} is not empty; choose another folder or add --overwrite")
        card = out / "README.md"
        if not card.is_file() or MARK not in card.read_text(errors="replace"):
            raise ConfigError(f"out: {out} holds no export of upstep-fast, so --overwrite leaves it alone")


@contextlib.contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A folder to write to, beside `out`, which takes its place at the end or goes without a trace."""
    temporary = out.parent / f".tmp-{os.getpid()}-{out.name}"
    try:
        temporary.mkdir()
        yield temporary
        if out.is_dir():
            shutil.rmtree(out)
        temporary.rename(out)
    except OSError as error:
        raise RunFailedError(f"out: cannot write {error.filename or out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _images(config: ExportConfig, base: Backbone) -> tuple[Tensor, str]:
    """Normalised images for the comparison, and what they are."""
    channels = base.vit.patch_embed.proj.in_channels
    if not config.data:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(4, channels, *base.img_size, generator=generator), "4 random images"
    source = open_source(config.data)
    batches = load_images(
        source,
        range(min(IMAGES, len(source))),
        size=base.img_size,
        interpolation=base.interpolation,
        crop_pct=base.crop_pct,
        max_bad_fraction=1.0,
        channels=channels,
    )
    pixels = torch.cat([images for _, images in batches] or [torch.empty(0)])
    if not len(pixels):
        raise ConfigError(f"data: none of the first {IMAGES} images in {', '.join(config.data)} can be read")
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (base.mean, base.std))
    return (pixels - mean) / std, f"{len(pixels)} images of {', '.join(config.data)}"


def _without_head(vit: nn.Module) -> State:
    return {key: value for key, value in vit.state_dict().items() if not key.startswith("head")}


def _save(state: State, path: Path) -> None:
    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata={"format": "pt"})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _need(package: str, kind: str, cure: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"format: {kind} is checked in {package}, which is not installed; {cure}")


def _card(config: ExportConfig, base: Backbone, tool: str, usage: str, difference: float, seen: str) -> str:
    def numbers(values: tuple[float, ...]) -> str:
        return ", ".join(f"{value:g}" for value in values)

    license_name = base.vit.pretrained_cfg.get("license")
    channels = base.vit.patch_embed.proj.in_channels
    return f"""\
# {Path(config.out).name}

{base.arch} with width {base.width}, {MARK} in the format of {config.format}.

| | |
| --- | --- |
| base model | `{config.model}` |
| adapter | {f"`{config.adapter}`" if config.adapter else "none"} |
| input | {channels} x {base.img_size[0]} x {base.img_size[1]}, {base.interpolation}, crop {base.crop_pct:g} |
| mean | {numbers(base.mean)} |
| standard deviation | {numbers(base.std)} |
| largest difference of a feature | {difference:.1e}, measured in {tool} on {seen}, fp32, as a share of the largest |

```python
{usage.replace("FOLDER", config.out)}
```

The terms of the base model{f" ({license_name})" if license_name else ""} apply to these weights.
"""
