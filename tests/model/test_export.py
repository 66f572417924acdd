"""Exports, each loaded by the tool it is for: PEFT, timm, transformers, onnxruntime."""

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import upstep_fast
from upstep_fast.cli.commands import main
from upstep_fast.errors import CheckFailedError, ConfigError
from upstep_fast.model import backbone, lora, names, peft_format, registry
from upstep_fast.model.export import export as exporting
from upstep_fast.model.export import writers as export_formats
from upstep_fast.model.export.export import export
from upstep_fast.model.pooling import features
from upstep_fast.runtime import commit

BASE_TINY = f"local-dir:{Path(upstep_fast.__file__).parent / 'assets' / 'base_tiny'}"
SMALL = dict(img_size=56, patch_size=14, embed_dim=48, depth=2, num_heads=3, num_classes=5)
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime (pip install 'upstep_fast[onnx]')",
)

# what transformers can express, and its class for each
EXPRESSIBLE = {
    "ViT": ("vit_tiny_patch16_224", SMALL, "ViTModel"),
    "ViT, QuickGELU": ("vit_tiny_patch16_224", SMALL | {"act_layer": "quick_gelu"}, "ViTModel"),
    "ViT, not square, 5 channels": ("vit_tiny_patch16_224", SMALL | {"img_size": (28, 70), "in_chans": 5}, "ViTModel"),
    "ViT, mean": ("vit_tiny_patch16_224", SMALL | {"global_pool": "avg", "fc_norm": False}, "ViTModel"),
    "Dinov2": ("vit_small_patch14_dinov2", SMALL, "Dinov2Model"),
    "Dinov2, SwiGLU": ("vit_giant_patch14_dinov2", SMALL | {"mlp_ratio": 4}, "Dinov2Model"),
    "Dinov2, registers": ("vit_small_patch14_reg4_dinov2", SMALL, "Dinov2WithRegistersModel"),
    "DINOv3": ("vit_small_patch16_dinov3", SMALL, "DINOv3ViTModel"),
    "DINOv3, biases": ("vit_small_patch16_dinov3_qkvb", SMALL, "DINOv3ViTModel"),
    "DINOv3, SwiGLU": ("vit_small_plus_patch16_dinov3_qkvb", SMALL, "DINOv3ViTModel"),
}


def make(folder, arch="vit_tiny_patch16_224", args=SMALL, targets=("q", "k", "v", "proj")):
    """A local-dir with random weights and an adapter for it: (model, adapter)."""
    torch.manual_seed(0)
    vit = timm.create_model(arch, **args)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    timm.models.save_for_hf(vit, folder / "base", model_args=args, safe_serialization=True)
    name = f"local-dir:{folder / 'base'}"
    return name, make_adapter(folder / "adapter", name, targets)


def make_adapter(folder, name, targets=("q", "k", "v")):
    vit = backbone.load(name).vit
    adapters = lora.inject(vit, lora.LoraSpec(r=2, alpha=3, targets=targets))
    torch.manual_seed(1)
    for adapter in adapters.values():
        nn.init.normal_(adapter.lora_b, std=0.5)
    peft_format.save_adapter(folder, adapters, name)
    return folder


def images(vit, count=3):
    shape = (vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(7))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


def expected_of(name, adapter):
    """Images and the features that the adapter gives, kept apart from the weights."""
    vit = upstep_fast.load_adapted(name, adapter, merged=False)
    x = images(vit)
    with torch.no_grad():
        base = features(backbone.load(name).vit, x)
        y = features(vit, x)
    assert (y - base).abs().max() > 1e-2
    return x, y


@pytest.mark.parametrize("kind", EXPRESSIBLE)
@torch.no_grad()
def test_transformers_loads_the_hf_export(tmp_path, kind):
    arch, args, class_name = EXPRESSIBLE[kind]
    name, adapter = make(tmp_path, arch, args)
    x, expected = expected_of(name, adapter)
    done = export(name, tmp_path / "out", adapter=adapter, format="hf")
    assert done.difference < 1e-5 and done.images == "4 of upstep-fast's own photographs (sign_digits_64.tar)"
    options = {"add_pooling_layer": False} if class_name == "ViTModel" else {}
    theirs, report = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True, **options)
    assert type(theirs).__name__ == class_name
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokens = theirs.eval()(x).last_hidden_state
    vit = backbone.load(name).vit  # timm's DINOv3 and one of the ViTs take the mean of the patches
    close(tokens[:, vit.num_prefix_tokens :].mean(1) if vit.global_pool == "avg" else tokens[:, 0], expected)
    # and our own reader gives the merged model back, bit for bit
    merged = upstep_fast.load_adapted(name, adapter).state_dict()
    back = backbone.load(f"local-dir:{tmp_path / 'out'}").vit.state_dict()
    assert all(torch.equal(value, merged[key]) for key, value in back.items())
    assert set(merged) - set(back) <= {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("arch", "args"),
    [
        ("vit_tiny_patch16_224", SMALL | {"in_chans": 5, "img_size": (28, 56)}),
        ("vit_base_patch16_siglip_224", SMALL),
        ("vit_small_patch14_reg4_dinov2", SMALL),
        ("eva02_base_patch14_224", SMALL),
        ("vit_small_plus_patch16_dinov3_qkvb", SMALL),
    ],
)
@torch.no_grad()
def test_timm_loads_the_timm_export(tmp_path, arch, args):
    name, adapter = make(tmp_path, arch, args, targets=("q", "v"))
    x, expected = expected_of(name, adapter)
    done = export(name, tmp_path / "out", adapter=adapter, format="timm", mean=(0.4,), std=(0.2,))
    figure = f"{done.difference:.1e}, measured in timm on 4 of upstep-fast's own photographs (sign_digits_64.tar), fp32"
    assert figure in (tmp_path / "out" / "README.md").read_text()
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    close(features(theirs, x), expected)
    data = timm.data.resolve_model_data_config(theirs)
    channels = args.get("in_chans", 3)
    assert tuple(data["mean"]) == (0.4,) * channels and tuple(data["input_size"]) == (
        channels,
        *theirs.patch_embed.img_size,
    )
    again = backbone.load(f"local-dir:{tmp_path / 'out'}")
    assert torch.equal(features(again.vit, x), features(theirs, x)) and again.mean == (0.4,) * channels
    merged = upstep_fast.load_adapted(name, adapter).state_dict()
    assert all(torch.equal(value, merged[key]) for key, value in again.vit.state_dict().items())
    # the classifier is still there
    assert theirs.state_dict().keys() == timm.create_model(name).state_dict().keys()


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3_qkvb", "eva02_base_patch14_224"])
@torch.no_grad()
def test_peft_serves_the_peft_export(tmp_path, arch):
    name, adapter = make(tmp_path, arch, targets=("q", "v"))
    x, expected = expected_of(name, adapter)
    export(name, tmp_path / "out", adapter=adapter, format="peft")
    theirs = timm.create_model(name, pretrained=True).eval()
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("qkv_bias_separate" in card) == (arch == "vit_small_patch16_dinov3_qkvb")
    if "qkv_bias_separate" in card:
        for block in theirs.blocks:
            block.attn.qkv_bias_separate = True
    served = peft.PeftModel.from_pretrained(theirs, tmp_path / "out").eval()
    close(features(served.base_model.model, x), expected)


@pytest.mark.parametrize(
    ("arch", "more"),
    [
        ("vit_small_patch14_dinov2", {}),
        ("vit_giant_patch14_dinov2", {"mlp_ratio": 4}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("vit_tiny_patch16_224", {}),
    ],
)
@torch.no_grad()
def test_timm_reads_the_dinov2_export_as_metas(tmp_path, arch, more):
    name, adapter = make(tmp_path, arch, SMALL | more)
    x, expected = expected_of(name, adapter)
    export(name, tmp_path / "out", adapter=adapter, format="dinov2")
    state = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    # Meta's own names and shapes: the class token has a position, the mask token is there
    assert state["pos_embed"].shape == (1, 17, 48) and state["mask_token"].shape == (1, 48)
    assert ("register_tokens" in state) == ("reg4" in arch) and ("blocks.0.mlp.w12.weight" in state) == (
        "giant" in arch
    )
    args = SMALL | more | {"num_classes": 0}
    overlay = dict(file=str(tmp_path / "out" / "model.pth"), custom_load=False, num_classes=0, input_size=(3, 56, 56))
    theirs = timm.create_model(arch, pretrained=True, pretrained_cfg_overlay=overlay, **args).eval()
    close(features(theirs, x), expected)
    merged = upstep_fast.load_adapted(name, adapter).state_dict()
    assert all(torch.equal(value, merged[key]) for key, value in theirs.state_dict().items())


@needs_onnx
@pytest.mark.parametrize(
    ("arch", "more"),
    [
        ("vit_tiny_patch16_224", {"img_size": (28, 56), "in_chans": 2, "depth": 1}),
        pytest.param("vit_base_patch16_siglip_224", {}, marks=pytest.mark.long),
        pytest.param("vit_small_patch16_dinov3_qkvb", {}, marks=pytest.mark.long),
        pytest.param("eva02_base_patch14_224", {}, marks=pytest.mark.long),
        pytest.param("vit_giant_patch14_dinov2", {"mlp_ratio": 4}, marks=pytest.mark.long),
    ],
)
@torch.no_grad()
def test_onnxruntime_runs_the_onnx_export_at_any_batch(tmp_path, arch, more):
    import onnxruntime

    name, adapter = make(tmp_path, arch, SMALL | more, targets=("q", "v"))
    x, expected = expected_of(name, adapter)
    export(name, tmp_path / "out", adapter=adapter, format="onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "model.onnx"]
    for batch in (1, 2, 3):
        found = session.run(None, {"images": x[:batch].numpy()})[0]
        close(torch.from_numpy(found), expected[:batch])


@pytest.mark.parametrize(
    ("arch", "more"),
    [
        ("vit_tiny_patch16_224", {"img_size": (28, 56), "in_chans": 2, "depth": 1, "dynamic_img_size": True}),
        ("vit_base_patch16_siglip_224", {}),
        ("vit_small_patch16_dinov3_qkvb", {}),
        pytest.param("eva02_base_patch14_224", {}, marks=pytest.mark.long),
        pytest.param("vit_giant_patch14_dinov2", {"mlp_ratio": 4}, marks=pytest.mark.long),
    ],
)
@torch.no_grad()
def test_torch_runs_the_torch_export_without_timm_at_any_batch(tmp_path, arch, more):
    name, adapter = make(tmp_path, arch, SMALL | more, targets=("q", "v"))
    x, expected = expected_of(name, adapter)
    done = export(name, tmp_path / "out", adapter=adapter, format="torch")
    assert done.difference < 1e-5 and sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "model.pt2"]
    save_file({"x": x}, tmp_path / "x.safetensors")
    usage = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = f"""
import sys
sys.modules["timm"] = sys.modules["upstep_fast"] = None  # importing them fails
import torch
from safetensors.torch import load_file, save_file
x, found = load_file("x.safetensors")["x"], {{}}
for batch in (1, 2, 3):
    images = x[:batch]
    with torch.no_grad():
        exec({usage!r})
    found[str(batch)] = features.contiguous()
save_file(found, "found.safetensors")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    for batch, found in load_file(tmp_path / "found.safetensors").items():
        close(found, expected[: int(batch)])


@pytest.mark.parametrize(
    "kind", ["timm", "hf", "peft", "dinov2", "torch", pytest.param("onnx", marks=[needs_onnx, pytest.mark.long])]
)
def test_real_weights_on_real_images_from_the_command_line(capsys, tmp_path, kind):
    adapter = make_adapter(tmp_path / "adapter", BASE_TINY)
    data = Path(upstep_fast.__file__).parent / "assets" / "sign_digits_64.tar"
    args = ["--model", BASE_TINY, "--adapter", adapter, "--format", kind, "--out", tmp_path / "out", "--data", data]
    with pytest.raises(SystemExit) as stop:
        main(["export", *map(str, args)])
    assert stop.value.code == 0 and "16 images of" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "apache-2.0" in card and "sign_digits_64.tar" in card and "0.485, 0.456, 0.406" in card
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp")]


def test_preprocessing_of_the_hf_export_is_timms(tmp_path):
    export(BASE_TINY, tmp_path / "out", format="hf")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    theirs = torch.as_tensor(np.asarray(processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]))
    model = backbone.load(BASE_TINY)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.mean, model.std))
    ours = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
    torch.testing.assert_close(theirs[0], ours, rtol=0, atol=1e-5)


# what is refused


@pytest.mark.parametrize(
    ("format", "arch", "args", "message"),
    [
        ("hf", "vit_base_patch16_siglip_224", SMALL, "no class token"),
        ("hf", "vit_tiny_patch16_224", SMALL | {"qk_norm": True}, "norms other than"),
        ("hf", "vit_tiny_patch16_224", SMALL | {"global_pool": "avg"}, "pooling, avg"),
        ("hf", "eva02_base_patch14_224", SMALL, "DINOv3 only"),
        ("dinov2", "vit_small_patch16_dinov3", SMALL, "rotary"),
        ("dinov2", "vit_tiny_patch16_224", SMALL | {"act_layer": "quick_gelu"}, "QuickGELU"),
    ],
)
def test_what_a_format_cannot_express_is_refused(tmp_path, format, arch, args, message):
    name, _ = make(tmp_path, arch, args, targets=("v",))
    with pytest.raises(ConfigError, match=f"format: {format} cannot express this model: .*{message}"):
        export(name, tmp_path / "out", format=format)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_difference_above_the_bound_writes_nothing(capsys, tmp_path, monkeypatch):
    name, adapter = make(tmp_path)
    export(name, tmp_path / "out", adapter=adapter)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    real = export_formats.WRITERS["timm"]

    def off(job):
        with torch.no_grad():
            job.base.vit.norm.bias += 1e-3
        return real(job)

    monkeypatch.setitem(exporting.WRITERS, "timm", off)
    with pytest.raises(CheckFailedError, match=r"differ by \d\.\de-04 on 4 of upstep-fast's own .*, more than 1e-04"):
        export(name, tmp_path / "out", adapter=adapter, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    with pytest.raises(SystemExit) as stop:
        main(["export", "--model", name, "--adapter", str(adapter), "--out", str(tmp_path / "new")])
    assert stop.value.code == 4 and capsys.readouterr().err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_not_a_number_is_a_difference(tmp_path, monkeypatch):
    name, _ = make(tmp_path)
    real = export_formats.WRITERS["timm"]

    def broken(job):
        written = real(job)
        return export_formats.Written(written.tool, lambda x: torch.full((len(x), 48), torch.nan), written.usage)

    monkeypatch.setitem(exporting.WRITERS, "timm", broken)
    with pytest.raises(CheckFailedError):
        export(name, tmp_path / "out")


def test_other_folders_are_not_replaced(tmp_path):
    name, adapter = make(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("keep")
    for overwrite, message in ((False, "not empty"), (True, "does not replace it")):
        with pytest.raises(ConfigError, match=message):
            export(name, tmp_path / "mine", overwrite=overwrite)
    assert (tmp_path / "mine" / "README.md").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    export(name, tmp_path / "empty", adapter=adapter)
    with pytest.raises(ConfigError, match="--overwrite"):
        export(name, tmp_path / "empty", format="hf")
    export(name, tmp_path / "empty", format="peft", adapter=adapter, overwrite=True)
    assert not (tmp_path / "empty" / "model.safetensors").exists()
    assert (tmp_path / "empty" / "adapter_model.safetensors").exists()


def test_other_wrong_arguments(tmp_path, monkeypatch):
    name, _ = make(tmp_path)
    cases = [
        (dict(format="peft"), "--adapter"),
        (dict(adapter=tmp_path / "none"), "none holds no adapter_config.json"),
        (dict(data=(str(tmp_path / "none"),)), "none"),
    ]
    for options, message in cases:
        with pytest.raises(Exception, match=message) as error:
            export(name, tmp_path / "out", **options)
        assert error.value.exit_code in (2, 3) and not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="no folder"):
        export(name, tmp_path / "no" / "out")
    found, hidden = importlib.util.find_spec, ("onnx", "onnxruntime", "onnxscript", "transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name in hidden else found(name, *of))
    for format, cure in (("onnx", r"pip install 'upstep_fast\[onnx\]'"), ("hf", "pip install transformers")):
        with pytest.raises(ConfigError, match=cure):
            export(name, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_peft_of_a_timm_model_names_the_hub(tmp_path, monkeypatch):
    """Users of PEFT reload the base model by this address."""
    model = "vit_tiny_patch16_224.augreg_in21k"
    vit = timm.create_model(model)  # its weights cannot be downloaded here
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: copy.deepcopy(vit))
    adapter = make_adapter(tmp_path / "adapter", model)
    export(model, tmp_path / "out", adapter=adapter, format="peft")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k"
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "demo"])
def test_a_model_without_weights_is_timms(name):
    vit = registry.without_weights(name)
    theirs = timm.create_model(names.resolve(name), num_classes=0)
    assert {k: v.shape for k, v in vit.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert vit.pretrained_cfg == theirs.pretrained_cfg and not any(p.requires_grad for p in vit.parameters())


def test_the_models_command_lists_the_included_model(capsys):
    with pytest.raises(SystemExit):
        main(["models", "demo"])
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split()[:4] == ["name", "parameters", "input", "patch"]
    assert rows[1].split()[:7] == ["demo", "4.1", "M", "64", "x", "64", "8"] and rows[1].endswith(" engine")


def test_the_models_command(capsys):
    for args, code in ((["dinov3"], 0), (["--pattern", "vit_*_dinov2"], 0), (["swin"], 2)):
        with pytest.raises(SystemExit) as stop:
            main(["models", *args])
        out, err = capsys.readouterr()
        assert stop.value.code == code
        assert ("vit_base_patch" in out and not err) if code == 0 else "near names" in err
        runs = {line.split()[0]: line.split() for line in out.splitlines()}
        if "dinov3" in args:
            rows = [words for name, words in runs.items() if "patch16_dinov3" in name]
            assert {(words[8], words[-1]) for words in rows} == {("rotary", "engine")}
        elif code == 0:
            # 86,580,480 parameters as timm counts them; img_size, patch and width of its configuration
            expected = "86.6 M 518 x 518 14 768 plain apache-2.0 lvd142m engine"
            assert runs["vit_base_patch14_dinov2"][1:] == expected.split()
            assert runs["vit_giant_patch14_dinov2"][-4:] == ["plain", "apache-2.0", "lvd142m", "engine"]  # SwiGLU


# what happens on the way


ALL_FORMATS = ["timm", "hf", "peft", "dinov2", "torch", pytest.param("onnx", marks=[needs_onnx, pytest.mark.long])]
DINOV2 = ("vit_small_patch14_dinov2", SMALL)  # every format holds it


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of processes")
@pytest.mark.parametrize("kind", ALL_FORMATS)
def test_a_full_disk_leaves_the_old_export(tmp_path, capsys, kind):
    """A limit on the size of files in place of a full disk: the system refuses the write within the weights."""
    import resource

    name, adapter = make(tmp_path, *DINOV2)
    out = tmp_path / "out"
    export(name, out, format="timm")
    before, limits = content(out), resource.getrlimit(resource.RLIMIT_FSIZE)
    args = ["--model", name, "--adapter", adapter, "--format", kind, "--out", out, "--overwrite"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_500, limits[1]))  # above the probe, below all weights
    try:
        with pytest.raises(SystemExit) as stop:
            main(["export", *map(str, args)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and err[-1].startswith(f"upstep-fast: out: cannot write {out}: "), err
    assert "File too large" in err[-1]
    assert content(out) == before and sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]


@pytest.mark.parametrize("kind", ALL_FORMATS)
def test_files_have_the_mode_that_the_umask_gives(tmp_path, kind):
    name, adapter = make(tmp_path, *DINOV2)
    before = os.umask(0o027)
    try:
        export(name, tmp_path / "out", adapter=adapter, format=kind)
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()} == dict.fromkeys(
        content(tmp_path / "out"), "0o640"
    )


def _terminated():
    """What SIGTERM does in a command, runtime/exit_signals.py."""
    raise KeyboardInterrupt


class Killed(BaseException):
    """In place of SIGKILL: nothing after it touches the disk."""


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_kill_at_any_point_of_overwrite_leaves_the_old_or_the_new(tmp_path, monkeypatch, exchanges):
    out, seen = tmp_path / "out", set()

    def fill(folder, text):
        folder.mkdir()
        for name in ("README.md", "a", "b"):
            (folder / name).write_text(f"{exporting.MARK} {text}")
        return content(folder)

    for point in range(60):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        old, new = fill(out, "old"), fill(tmp_path / "new", "new")
        calls = iter(range(10**6))
        with monkeypatch.context() as patch:
            if not exchanges:
                patch.setattr(commit, "_exchange", lambda *_: False)
            for name in ("fsync", "replace", "unlink", "rmdir"):
                real = getattr(os, name)

                def counted(*args, real=real, calls=calls, point=point, **kwargs):
                    if next(calls) >= point:
                        raise Killed
                    return real(*args, **kwargs)

                patch.setattr(os, name, counted)
            try:
                commit.replace_folder(tmp_path / "new", out)
                done = True
            except Killed:
                done = False
        if exchanges:
            assert content(out) in (old, new)
        commit.settle_folder(out)  # as the next export does
        assert content(out) in (old, new)
        seen.add(content(out) == new)
        if done:
            break
    assert seen == {True, False} and 8 <= point < 59
    assert content(out) == new and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_signal_removes_the_temporary_folder(tmp_path, monkeypatch):
    """SIGTERM raises KeyboardInterrupt, here before the card is written."""
    name, _ = make(tmp_path)
    monkeypatch.setattr(exporting, "_card", lambda *_: _terminated())
    with pytest.raises(SystemExit) as stop:
        main(["export", "--model", name, "--out", str(tmp_path / "out")])
    assert stop.value.code == 75 and sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_link_as_out_is_followed(tmp_path):
    name, _ = make(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")
    for _ in range(2):
        export(name, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink() and (tmp_path / "elsewhere" / "model.safetensors").is_file()


def test_a_model_that_is_not_finite_is_refused_by_name(tmp_path, monkeypatch):
    name, _ = make(tmp_path)
    real = exporting.features
    monkeypatch.setattr(exporting, "features", lambda *args: real(*args) * torch.nan)
    with pytest.raises(ConfigError, match=f"model: {name} gives features that are not finite"):
        export(name, tmp_path / "out")


def test_a_model_beyond_an_onnx_file_is_refused_first(tmp_path, monkeypatch):
    name, _ = make(tmp_path)
    monkeypatch.setattr(export_formats, "MAX_ONNX_BYTES", 1000)
    monkeypatch.setattr(export_formats, "_need", lambda *_: None)
    with pytest.raises(ConfigError, match="at most 2 GB"):
        export(name, tmp_path / "out", format="onnx")
