"""Writers of the export formats, each with a function that reads the files back in the tool they are for."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.layers.mlp import GluMlp
from torch import Tensor, nn

from upstep_fast.config.adapter_folder import reading_flags
from upstep_fast.config.tools import ExportConfig
from upstep_fast.errors import ConfigError
from upstep_fast.model import adapter_base, lora, peft_format, peft_tensors
from upstep_fast.model import backbone as backbones
from upstep_fast.model.backbone import Backbone
from upstep_fast.model.formats import checkpoint_files, hf_config, key_names
from upstep_fast.model.formats.key_names import State
from upstep_fast.model.names import HUB
from upstep_fast.model.pooling import FeatureExtractor, features

log = logging.getLogger("upstep_fast")

MAX_ONNX_BYTES = 2**31 - 2**25  # of one protobuf message, less room for the graph
ANY_BATCH = {"images": {0: torch.export.Dim("batch", min=1)}}


@dataclass(frozen=True)
class Job:
    """A model to write, and the folder to write to."""

    config: ExportConfig
    base: Backbone  # with the adapter merged, except for PEFT
    base_record: str  # `adapter_base.record` of the base model
    adapters: Mapping[str, lora.LoraLinear]
    folder: Path


@dataclass(frozen=True)
class Written:
    """Files of one format, and how its tool reads them."""

    tool: str
    measure: Callable[[Tensor], Tensor]  # the tool's features [B, D] of normalized images [B, C, H, W]
    usage: str  # in Python, with FOLDER for the folder


def _timm(job: Job) -> Written:
    base = job.base
    vit: Any = base.vit
    size = (vit.patch_embed.proj.in_channels, *base.img_size)
    pixels: dict[str, Any] = {"mean": base.mean, "std": base.std, "interpolation": base.interpolation}
    pixels |= {"crop_pct": base.crop_pct, "crop_mode": base.crop_mode, "input_size": size}
    vit.pretrained_cfg = {**vit.pretrained_cfg, **pixels}
    timm.models.save_for_hf(vit, str(job.folder), model_args=base.model_args, safe_serialization=True)

    def measure(images: Tensor) -> Tensor:
        return features(timm.create_model(f"local-dir:{job.folder}", pretrained=True).eval(), images)

    usage = 'model = timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)  # features, no classifier'
    return Written("timm", measure, usage)


def _hf(job: Job) -> Written:
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
    preprocessor = hf_config.preprocessor(job.base)
    if preprocessor is not None:
        _write_json(job.folder / "preprocessor_config.json", preprocessor)
    else:
        log.warning("format: transformers cannot prepare images for a %d x %d input as timm does", *job.base.img_size)
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
    return Written("transformers", measure, f"{usage}features = model(images).last_hidden_state{pool}")


def _peft(job: Job) -> Written:
    _need("peft", "peft", "pip install 'upstep_fast[peft]'")
    vit: Any = job.base.vit
    hub = vit.pretrained_cfg.get("hf_hub_id")
    name = f"{HUB}{hub}" if hub and timm.is_model(job.base.name.partition(".")[0]) else job.base.name
    assert job.config.adapter is not None
    tensors = peft_format.read_tensors(job.config.adapter)
    bare = tensors.bare
    adapter = peft_format.adapter_files(
        job.adapters,
        name,
        fully_trained=tensors.of_modules | bare,
        base_record=job.base_record,
        model_record=adapter_base.model_record(job.base, job.config.model, reading_flags(Path(job.config.adapter))),
    )
    peft_format.write_files(job.folder, adapter)
    biased = getattr(vit.blocks[0].attn, "q_bias", None) is not None

    def measure(images: Tensor) -> Tensor:
        import peft

        theirs = backbones.load_from(job.config.model).vit
        lora.call_qkv(theirs)
        for parameter, value in bare.items():
            theirs.get_parameter(parameter).copy_(value)
        served: Any = peft.PeftModel.from_pretrained(theirs, str(job.folder)).eval()
        return features(served.base_model.model, images)

    usage = f'model = timm.create_model("{name}", pretrained=True, num_classes=0)  # features, no classifier\n'
    if biased:  # else timm reads qkv.weight itself, past PEFT's adapter
        usage += "for block in model.blocks:\n    block.attn.qkv_bias_separate = True\n"
    if bare:  # PEFT has no place for parameters of the model itself
        usage += f'for name, value in safetensors.torch.load_file("FOLDER/{peft_tensors.BARE}").items():\n'
        usage += "    model.get_parameter(name).data.copy_(value)\n"
    return Written("PEFT", measure, usage + 'model = peft.PeftModel.from_pretrained(model, "FOLDER")')


def _dinov2(job: Job) -> Written:
    vit: Any = job.base.vit
    reason = hf_config.dinov2_unsupported_reason(vit)
    if reason:
        raise ConfigError(f"format: dinov2 cannot express this model: {reason}; use --format timm or onnx")
    path = job.folder / "model.pth"  # what DINOv2's own loader reads; tensors only, so weights_only=True reads it too
    packed = isinstance(vit.blocks[0].mlp, GluMlp)
    state = key_names.dinov2_names(_without_head(vit), packed=packed)
    _write_buffered(path, lambda file: torch.save(state, file))

    def measure(images: Tensor) -> Tensor:
        fresh = timm.create_model(job.base.arch, **job.base.model_args | {"num_classes": 0}).eval()
        checkpoint_files.fill(fresh, checkpoint_files.read(path), where=str(path), min_matched=1.0)
        return features(fresh, images)

    return Written(
        "timm's reader of DINOv2 names", measure, 'state = torch.load("FOLDER/model.pth", weights_only=True)'
    )


def _onnx(job: Job) -> Written:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _need(package, "onnx", "pip install 'upstep_fast[onnx]'")
    if sum(p.numel() * p.element_size() for p in job.base.vit.parameters()) > MAX_ONNX_BYTES:
        raise ConfigError("format: an onnx file holds at most 2 GB and this model has more; use --format torch or timm")
    path = job.folder / "model.onnx"
    example = torch.zeros(2, job.base.vit.patch_embed.proj.in_channels, *job.base.img_size)
    with contextlib.redirect_stdout(None):  # the exporter reports its progress there
        torch.onnx.export(
            FeatureExtractor(job.base.vit).eval(),
            (example,),
            str(path),
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=ANY_BATCH,
            dynamo=True,
            external_data=False,
        )

    def measure(images: Tensor) -> Tensor:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return _one_then_many(lambda part: torch.from_numpy(session.run(None, {"images": part.numpy()})[0]), images)

    usage = 'session = onnxruntime.InferenceSession("FOLDER/model.onnx")\n'
    return Written("onnxruntime", measure, usage + 'features = session.run(None, {"images": images})[0]')


def _torch(job: Job) -> Written:
    path = job.folder / "model.pt2"
    example = torch.zeros(2, job.base.vit.patch_embed.proj.in_channels, *job.base.img_size)
    program = torch.export.export(FeatureExtractor(job.base.vit).eval(), (example,), dynamic_shapes=ANY_BATCH)
    _write_buffered(path, lambda file: torch.export.save(program, file))

    def measure(images: Tensor) -> Tensor:
        return _one_then_many(torch.export.load(path).module(), images)

    usage = 'model = torch.export.load("FOLDER/model.pt2").module()  # needs torch alone\n'
    return Written("torch.export", measure, f"{usage}features = model(images)")


WRITERS: dict[str, Callable[[Job], Written]] = {
    "timm": _timm,
    "hf": _hf,
    "peft": _peft,
    "dinov2": _dinov2,
    "onnx": _onnx,
    "torch": _torch,
}


def _one_then_many(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return the features of images [B, C, H, W], run as a batch of 1 and a batch of B - 1."""
    return torch.cat([model(part) for part in (images[:1], images[1:]) if len(part)])


def _without_head(vit: nn.Module) -> State:
    return {key: value for key, value in vit.state_dict().items() if not key.startswith("head")}


def _save(state: State, path: Path) -> None:
    path.write_bytes(save({key: value.contiguous() for key, value in state.items()}, metadata={"format": "pt"}))


def _write_buffered(path: Path, write: Callable[[io.BytesIO], object]) -> None:
    """Write a file by way of memory: PyTorch's writer of zip files ends the process on a full disk."""
    buffer = io.BytesIO()
    write(buffer)
    path.write_bytes(buffer.getbuffer())


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _need(package: str, kind: str, cure: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"format: {kind} is checked in {package}, which is not installed; {cure}")
