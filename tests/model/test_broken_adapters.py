"""Broken and hostile adapter folders: refused in one line before anything is used, or read if unambiguous."""

import json
import os
import time

import peft_cases
import pytest
import torch
from peft_cases import IMAGES, Case
from safetensors.torch import load_file, save_file

import upstep_fast
from upstep_fast.errors import ConfigError
from upstep_fast.model import lora, peft_format, peft_patterns
from upstep_fast.model.backbone import load
from upstep_fast.model.pooling import features

A0, B0 = (f"base_model.model.blocks.0.attn.qkv.lora_{letter}.weight" for letter in "AB")
NORM = "base_model.model.norm.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return peft_cases.base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def folder(base, tmp_path):
    """An adapter by PEFT: LoRA on every qkv, and the last norm as a whole."""
    peft_cases.make(Case("", True, {"modules_to_save": ["norm"]}), base, tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change(folder, function):
    tensors = load_file(folder / "adapter_model.safetensors")
    function(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def refusal(base, folder):
    with pytest.raises(ConfigError) as error:
        upstep_fast.load_adapted(base, folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    return str(error.value)


BAD_VALUES = [
    *({"lora_alpha": value} for value in ("24", [24], None, True, 1e30, -1e30, 10**400)),
    *({"r": value} for value in (0, -1, 2.5, "4", None, [4], 10**9)),
    *({"rank_pattern": value} for value in ([4], "qkv", {"qkv": 0}, {"qkv": "4"}, {"(": 4})),
    *({"alpha_pattern": value} for value in ([4], {"qkv": None}, {"qkv": [1]}, {"(": 4}, {"a" * 1001: 4})),
    *({"target_modules": value} for value in (5, {"qkv": 1}, [5], "(", ["fc1"], ["qkv", "fc1"])),
    *({"exclude_modules": value} for value in (5, [None], "*")),
    *({"modules_to_save": value} for value in (5, "norm", [5], {"norm": 1}, ["norm", "norm1"], ["attn", "norm"])),
    *({"layers_to_transform": value} for value in ("1", [1.5], {"a": 1}, True)),
    *({"target_parameters": value} for value in (5, "qkv.weight")),
    *({"use_rslora": value} for value in (1, "yes")),
    *({"base_model_name_or_path": value} for value in (5, ["a"])),
    *({"peft_type": value} for value in (None, 5, "IA3")),
]


@pytest.mark.parametrize("values", BAD_VALUES, ids=lambda values: str(values)[:40])
def test_a_wrong_value_of_the_configuration_is_refused(base, folder, values):
    edit(folder, **values)
    refusal(base, folder)


def test_null_in_fields_that_may_be_empty_is_read(base, folder):
    expected = features(upstep_fast.load_adapted(base, folder), IMAGES)
    edit(folder, rank_pattern=None, alpha_pattern=None, target_parameters=None, layers_pattern=None, bias=None)
    assert torch.equal(features(upstep_fast.load_adapted(base, folder), IMAGES), expected)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e400"])
@pytest.mark.parametrize("name", ["lora_alpha", "r"])
def test_numbers_that_are_not_finite_are_refused(base, folder, name, number):
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(path.read_text().replace(f'"{name}": {values[name]}', f'"{name}": {number}'))
    assert "not finite" in refusal(base, folder)


BAD_TENSORS = {
    "nan": lambda t: t[A0].fill_(torch.nan),
    "one nan": lambda t: t[B0][3].fill_(torch.nan),
    "inf": lambda t: t[B0][0, 0].fill_(torch.inf),
    "nan in a norm": lambda t: t[NORM][1].fill_(torch.nan),
    "float64 that overflows": lambda t: t.update({A0: t[A0].double() * 1e300}),
    "an update of 1e18": lambda t: t.update({A0: t[A0] * 1e18}),
    "a norm of 1e18": lambda t: t.update({NORM: t[NORM] * 1e18}),
    "int8": lambda t: t.update({A0: (t[A0] * 100).to(torch.int8)}),
    "bool": lambda t: t.update({B0: t[B0] > 0}),
    "int64": lambda t: t.update({NORM: t[NORM].long()}),
    "float8": lambda t: t.update({A0: t[A0].to(torch.float8_e4m3fn)}),
    "a scalar": lambda t: t.update({A0: torch.tensor(1.0)}),
    "three dimensions": lambda t: t.update({A0: t[A0][None]}),
    "empty": lambda t: t.update({A0: t[A0][:0], B0: t[B0][:, :0].clone()}),
    "another rank": lambda t: t.update({A0: t[A0][:2].clone(), B0: t[B0][:, :2].clone()}),
    "a layer is missing": lambda t: [t.pop(A0), t.pop(B0)],
    "the norm is missing": lambda t: [t.pop(NORM), t.pop(NORM.replace("weight", "bias"))],
    "half a pair": lambda t: t.pop(A0),
    "a layer that is no target": lambda t: t.update({A0.replace("attn.qkv", "mlp.fc1"): t[A0].clone()}),
    "an unknown module": lambda t: t.update({k.replace("qkv", "kqv"): t[k].clone() for k in (A0, B0)}),
    "weights of the base model": lambda t: t.update({B0.replace("lora_B", "base_layer"): t[B0].clone()}),
    "twice": lambda t: t.update({"_orig_mod." + A0: t[A0].clone()}),
}


@pytest.mark.parametrize("damage", BAD_TENSORS, ids=str)
def test_broken_tensors_are_refused(base, folder, damage):
    change(folder, BAD_TENSORS[damage])
    refusal(base, folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_point_type_is_read(base, folder, dtype):
    change(folder, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    torch.testing.assert_close(
        features(upstep_fast.load_adapted(base, folder), IMAGES), peft_cases.by_peft(base, folder), rtol=0, atol=1e-5
    )


RENAMED = {
    "a compiled model": lambda k: "_orig_mod." + k,
    "compiled before PEFT": lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled blocks": lambda k: k.replace("blocks.0.", "blocks.0._orig_mod."),
    "DistributedDataParallel": lambda k: "module." + k,
    "both": lambda k: "module._orig_mod." + k,
    "activation checkpointing": lambda k: k.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."),
    "a state dict": lambda k: k.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
    "a state dict of the norm": lambda k: k.replace(".norm.", ".norm.modules_to_save.default."),
    "no prefix": lambda k: k.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("form", RENAMED, ids=str)
def test_names_of_wrappers_are_removed(base, folder, form):
    expected = features(upstep_fast.load_adapted(base, folder), IMAGES)
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {RENAMED[form](key): value for key, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / "adapter_model.safetensors")
    assert torch.equal(features(upstep_fast.load_adapted(base, folder), IMAGES), expected)


def test_an_adapter_that_peft_saves_from_compiled_blocks_is_read(base, tmp_path):
    """PEFT itself loads it as the identity, with a warning."""
    import peft

    vit = peft_cases.fresh(base)
    vit.blocks[1] = torch.compile(vit.blocks[1], backend="eager")
    options = peft.LoraConfig(r=4, target_modules=["qkv"], alpha_pattern={r"blocks\.1\._orig_mod\.attn\.qkv": 30})
    model = peft.get_peft_model(vit, options).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(str(tmp_path))
    assert any("_orig_mod" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    with torch.no_grad():
        expected = features(model.base_model.model, IMAGES)
    ours = features(upstep_fast.load_adapted(base, tmp_path), IMAGES)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


HOSTILE = [
    "(([a-z0-9.]+)+)+!",
    "(a|a)*!",
    "(.*)*x",
    "(|)(|)" * 40 + "x",
    ".?" * 60 + "!",
    ".*" * 12 + "!",
    r"(a)\1",
    "(?:.+.+)+q",
]


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize(
    "field", ["alpha_pattern", "rank_pattern", "target_modules", "exclude_modules", "modules_to_save"]
)
def test_regular_expressions_of_a_stranger_take_no_time(base, folder, field, pattern):
    value = {"target_modules": pattern, "exclude_modules": pattern, "modules_to_save": ["norm", pattern]}
    edit(folder, **{field: value.get(field, {pattern: 3})})
    began = time.monotonic()
    assert "may take very long" in refusal(base, folder)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "pattern",
    [
        ".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"blocks\.(0|1|2|3|4|5|6|7|8|9|10|11)\.(attn\.(qkv|proj)|mlp\.fc[12])",
        r"(blocks\.\d+\.)?attn\.qkv",
        r"^blocks\.\d{1,2}\..+",
        r"(?!.*head).*\.(qkv|proj)",
    ],
)
def test_regular_expressions_that_people_write_are_matched(pattern):
    peft_patterns.bounded([pattern], "here")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "bare_parameters.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "zeros", "folder", "dangling link", "deep", "large"])
def test_what_is_no_regular_file_is_refused(base, folder, name, kind):
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to(folder / "nothing")
    elif kind == "deep":
        path.write_text("[" * 100_000)
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    refusal(base, folder)


def test_links_to_regular_files_are_read(base, folder, tmp_path):
    """As in the hub's cache."""
    expected = features(upstep_fast.load_adapted(base, folder), IMAGES)
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    assert torch.equal(features(upstep_fast.load_adapted(base, linked), IMAGES), expected)


@pytest.fixture
def ours(base, tmp_path):
    """Our adapter with a bare parameter."""
    vit = load(base).vit
    adapters = lora.inject(vit, lora.LoraSpec(r=3, alpha=5.0, targets=("q", "v")))
    files = peft_format.adapter_files(adapters, base, fully_trained={"cls_token": vit.cls_token + 1})
    peft_format.write_files(tmp_path / "ours", files)
    return tmp_path / "ours"


def test_bare_parameters_belong_to_their_adapter(base, ours):
    upstep_fast.load_adapted(base, ours)
    path = ours / peft_format.BARE
    tensors = load_file(path)
    save_file({"cls_token": tensors["cls_token"] + 1}, path)
    assert "does not belong to" in refusal(base, ours)
    for wrong in ({"blocks.0.attn.qkv.weight": torch.zeros(144, 48)}, {"cls_token": torch.tensor(1)}):
        save_file(wrong, path)
        refusal(base, ours)
    path.unlink()
    assert "lacks bare_parameters.safetensors" in refusal(base, ours)


def test_peft_loads_the_files_with_our_metadata(base, ours):
    peft_cases.by_peft(base, ours)


def test_the_model_is_unchanged_if_the_adapter_is_refused(base, folder):
    change(folder, lambda t: t.update({B0.replace("blocks.0", "blocks.1"): t[B0] * 1e18}))
    vit = load(base).vit
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    with pytest.raises(ConfigError, match=r"blocks\.1\.attn\.qkv: the update has a norm"):
        peft_format.attach(vit, folder)
    assert not lora.find(vit) and all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())
