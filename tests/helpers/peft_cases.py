"""Adapters for every option of peft.LoraConfig on a toy ViT: their features in PEFT, and which are refused."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import timm
import torch
from peft.tuners.lora import config as lora_config
from torch import Tensor, nn

import upstep_fast
from upstep_fast.errors import ConfigError
from upstep_fast.model.pooling import features

MODEL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5)
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Case:
    """Options of LoraConfig beside r=4, lora_alpha=6 and target_modules=["qkv"]."""

    name: str
    is_read: bool
    options: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[nn.Module, peft.LoraConfig], None] | None = None  # before PEFT wraps the model
    start: Callable[[peft.PeftModel], None] | None = None  # after
    # values of adapter_config.json for options with which PEFT makes no adapter here; it then refuses them too, or
    # they do not apply to a ViT
    edits: dict[str, Any] = field(default_factory=dict)


def read(name: str, **options: Any) -> Case:
    """Return a case that must be read as PEFT reads it."""
    return Case(name, True, options)


def refused(name: str, **options: Any) -> Case:
    """Return a case that must be refused by name."""
    return Case(name, False, options)


def edited(name: str, is_read: bool = False, **edits: Any) -> Case:
    """Return a case whose options are written into the configuration of a plain adapter."""
    return Case(name, is_read, edits=edits)


def _config(name: str, **values: Any) -> Any:
    """Return an object of PEFT's configuration class; None where this PEFT has no such class (its case is not run)."""
    kind = getattr(lora_config, name, None)
    return None if kind is None else kind(**values)


def _corda(vit: nn.Module, config: peft.LoraConfig) -> None:
    from peft.tuners.lora.corda import preprocess_corda

    preprocess_corda(vit, config, run_model=lambda: vit(IMAGES[:1]))


def _lora_ga(vit: nn.Module, config: peft.LoraConfig) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    preprocess_loraga(vit, config, lambda: vit(IMAGES).square().sum().backward())


def _eva(model: peft.PeftModel) -> None:
    loader = [IMAGES + step for step in range(3)]
    peft.initialize_lora_eva_weights(
        model,
        loader,
        forward_fn=lambda m, x: m.base_model.model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda inputs, *_: inputs[0].flatten(0, 1),
        show_progress_bar=False,
    )


BOTH = ["attn.qkv", "mlp.fc1"]
CASES = (
    read("plain"),
    read("r, lora_alpha", r=3, lora_alpha=11),
    read("lora_alpha 0", lora_alpha=0),
    read("lora_alpha negative, fractional", lora_alpha=-2.5),
    read("use_rslora", use_rslora=True),
    read("rank_pattern", target_modules=BOTH, rank_pattern={"mlp.fc1": 2}),
    read("rank_pattern, alternatives", target_modules=BOTH, rank_pattern={"attn.proj|mlp.fc1": 2}),
    read("rank_pattern, rsLoRA", target_modules=BOTH, rank_pattern={"fc1": 9}, use_rslora=True),
    read("alpha_pattern", target_modules=BOTH, alpha_pattern={"mlp.fc1": 32}),
    read("alpha_pattern, alternatives", target_modules=BOTH, alpha_pattern={"attn.qkv|mlp.fc1": 32}),
    read("alpha_pattern, alternatives exchanged", target_modules=BOTH, alpha_pattern={"mlp.fc1|attn.qkv": 32}),
    read("alpha_pattern, expression", alpha_pattern={r"blocks\.[1-9]\..*": 32}),
    read("alpha_pattern, anchored", alpha_pattern={r"^blocks\.0\.attn\.qkv$": 32}),
    read("alpha_pattern, the first of two", alpha_pattern={"blocks.0.attn.qkv": 32, "qkv": 2}),
    read("alpha_pattern, part of a word", target_modules=BOTH, alpha_pattern={"kv": 32, "c1": 40}),
    read("target_modules, suffixes", target_modules=["qkv", "proj"], exclude_modules=["patch_embed.proj"]),
    read("target_modules, expression", target_modules=r"blocks\.[01]\.(attn\.qkv|mlp\.fc2)"),
    read("target_modules all-linear", target_modules="all-linear"),
    read("exclude_modules, expression", target_modules=["qkv", "fc1"], exclude_modules=r".*\.0\..*"),
    read("layers_to_transform", layers_to_transform=[1], layers_pattern="blocks"),
    read("layers_to_transform, one", layers_to_transform=0, layers_pattern=["layers", "blocks"]),
    read("target_parameters", target_modules=[], target_parameters=["attn.qkv.weight"]),
    read("target_parameters, no modules", target_modules=None, target_parameters=["qkv.weight"]),
    read("target_parameters and modules", target_modules=["fc1"], target_parameters=["attn.qkv.weight"]),
    read(
        "target_parameters, alpha",
        target_modules=[],
        target_parameters=["qkv.weight"],
        alpha_pattern={"qkv.weight": 32},
    ),
    read("target_parameters, no alpha", target_modules=[], target_parameters=["qkv.weight"], alpha_pattern={"qkv": 32}),
    read(
        "target_parameters, rank", target_modules=[], target_parameters=["qkv.weight"], rank_pattern={"qkv.weight": 2}
    ),
    read("modules_to_save norm", modules_to_save=["norm"]),
    read("modules_to_save head", modules_to_save=["head"]),
    read("modules_to_save, a block", modules_to_save=["blocks.1"]),
    read("modules_to_save attention, LoRA elsewhere", target_modules=["qkv", "fc1"], modules_to_save=["attn"]),
    *(read(f"init_lora_weights {init}", init_lora_weights=init) for init in (True, False)),
    *(read(f"init_lora_weights {init}", init_lora_weights=init) for init in ("gaussian", "orthogonal", "mica")),
    read("init_lora_weights pissa", init_lora_weights="pissa"),
    read("init_lora_weights pissa, patterns", init_lora_weights="pissa", target_modules=BOTH, rank_pattern={"fc1": 7}),
    read("init_lora_weights pissa, rsLoRA", init_lora_weights="pissa", use_rslora=True),
    read("init_lora_weights olora", init_lora_weights="olora"),
    read("init_lora_weights OLORA, alpha", init_lora_weights="OLORA", target_modules=BOTH, alpha_pattern={"fc1": 1}),
    Case("init_lora_weights eva", True, {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()}, start=_eva),
    refused("init_lora_weights pissa_niter_4", init_lora_weights="pissa_niter_4"),
    Case(
        "init_lora_weights corda",
        False,
        {"init_lora_weights": "corda", "corda_config": _config("CordaConfig")},
        prepare=_corda,
    ),
    Case(
        "init_lora_weights lora_ga",
        False,
        {"init_lora_weights": "lora_ga", "lora_ga_config": _config("LoraGAConfig")},
        prepare=_lora_ga,
    ),
    edited("init_lora_weights loftq", init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1}),
    edited("init_lora_weights unknown", init_lora_weights="an_init_of_tomorrow"),
    edited("init_lora_weights null", True, init_lora_weights=None),
    refused("bias all", bias="all"),
    refused("bias lora_only", bias="lora_only"),
    refused("lora_bias", lora_bias=True),
    refused("use_dora", use_dora=True),
    refused("use_qalora", use_qalora=True, qalora_group_size=8),
    refused("velora_config", velora_config=_config("VeloraConfig", num_groups=8)),
    refused("alora_invocation_tokens", alora_invocation_tokens=[1]),
    refused("monteclora_config", monteclora_config=_config("MontecloraConfig")),
    refused("use_bdlora", use_bdlora=_config("BdLoraConfig", target_modules_bd_a=["qkv"], nblocks=2)),
    refused("kasa_config", kasa_config=_config("KasaConfig")),
    refused("a convolution", target_modules=["qkv", "patch_embed.proj"]),
    edited("layer_replication", layer_replication=[[0, 1], [0, 2]]),
    edited("layer_replication, none", True, layer_replication=[]),
    edited("arrow_config", arrow_config={"top_k": 3}),
    edited("trainable_token_indices", trainable_token_indices=[1]),
    edited("trainable_token_indices, none", True, trainable_token_indices={}),
    edited("megatron_config", megatron_config={"hidden_size": 48}),
    edited("an option that is not known", an_option_of_tomorrow={"x": 1}),
    edited("an option that is not known, off", True, an_option_of_tomorrow=None),
    read("lora_dropout", lora_dropout=0.5),
    read("fan_in_fan_out", fan_in_fan_out=True),
    read("ensure_weight_tying", ensure_weight_tying=True),
    read("task_type", task_type="FEATURE_EXTRACTION"),
    read("inference_mode", inference_mode=True),
    read("revision", revision="main"),
    read("qalora_group_size alone", qalora_group_size=8),
    read("megatron_core alone", megatron_core="another.core"),
    read("runtime_config", runtime_config=_config("LoraRuntimeConfig", ephemeral_gpu_offload=True)),
    edited("peft_version", True, peft_version="0.99"),
    edited("auto_mapping", True, auto_mapping={"base_model_class": "X"}),
    edited("peft_type", peft_type="ADALORA"),
    read("base_model_name_or_path", base_model_name_or_path="somebody/finetuned-model"),
)


def base(folder: Path) -> str:
    """Write the toy ViT to `folder`; return its name."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **MODEL)
    timm.models.save_for_hf(vit, folder, model_args=MODEL, safe_serialization=True)
    return f"local-dir:{folder}"


def fresh(name: str) -> Any:
    """Return the toy ViT in eval mode."""
    return copy.deepcopy(_loaded(name))


@functools.cache
def _loaded(name: str) -> Any:
    return timm.create_model(name, pretrained=True).eval()


def make(case: Case, name: str, folder: Path) -> None:
    """Write an adapter of the case to `folder`, with matrices that a training might have left."""
    torch.manual_seed(1)
    vit, options = fresh(name), {"r": 4, "lora_alpha": 6, "target_modules": ["qkv"]} | copy.deepcopy(case.options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**options)
        if case.prepare is not None:
            case.prepare(vit, config)
        model = peft.get_peft_model(vit, config)
        if case.start is not None:
            case.start(model)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key or parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | case.edits))


@torch.no_grad()
def by_peft(name: str, folder: Path) -> Tensor:
    """Return the features of the images by PEFT's own reading of the adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.PeftModel.from_pretrained(fresh(name), str(folder)).eval()
    return features(model.base_model.model, IMAGES)


@torch.no_grad()
def outcome(case: Case, name: str, folder: Path) -> tuple[float | None, float | None, str]:
    """Return (largest difference of a feature to PEFT, largest effect of the adapter in PEFT, refusal or "")."""
    make(case, name, folder)
    try:
        ours = features(upstep_fast.load_adapted(name, folder), IMAGES)
    except ConfigError as error:
        return None, None, str(error)
    theirs = by_peft(name, folder)
    return (ours - theirs).abs().max().item(), (theirs - features(fresh(name), IMAGES)).abs().max().item(), ""
