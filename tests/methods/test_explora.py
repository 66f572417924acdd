"""ExPLoRA: trained parameters, published counts, adapter files, teacher, masks, both objectives, bad input."""

import copy
import json
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import upstep_fast
from upstep_fast.cli.parse import parse
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.explora import Dinov2Config, MaeConfig
from upstep_fast.config.files import read_toml, to_toml
from upstep_fast.config.flat import from_flat
from upstep_fast.data.loading.loader import Batch
from upstep_fast.errors import CheckFailedError, ConfigError, Interrupted, RunFailedError
from upstep_fast.methods import trainable
from upstep_fast.methods.explora import crops as explora_crops
from upstep_fast.methods.explora import tokens as explora_tokens
from upstep_fast.methods.explora import unfrozen_blocks as explora
from upstep_fast.methods.explora.dinov2 import ExploraDinov2
from upstep_fast.methods.explora.mae import ExploraMae
from upstep_fast.methods.explora.mae_decoder import Decoder, sincos_positions
from upstep_fast.model import backbone, lora, peft_format, pooling
from upstep_fast.model.export import export
from upstep_fast.model.lora import LoraSpec
from upstep_fast.runtime.device import resolve
from upstep_fast.train import failures
from upstep_fast.train.adapter_check import check_adapter
from upstep_fast.train.state import fresh_state

CPU = resolve("cpu", "fp32")
DINO = dict(prototypes=16, head_hidden=32, head_dim=16, local_views=2)
MAE = dict(decoder_width=32, decoder_depth=1, decoder_heads=4)
SMALL = {"dinov2": DINO, "mae": MAE}


@pytest.fixture
def options(model, photos, tmp_path):
    shared = dict(model=model, data=photos, out=tmp_path / "out", method="explora", steps=6, batch_size=8, lora_r=4)
    return shared | dict(precision="fp32", device="cpu", num_workers=0)


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def config_of(options, objective="dinov2", **extra):
    config_class = {"dinov2": Dinov2Config, "mae": MaeConfig}[objective]
    fields = {key: str(value) if key in ("out", "data") else value for key, value in options.items()}
    return from_flat(config_class, **fields | {"data": ("d",)} | SMALL[objective] | extra)


def state_of(options, objective="dinov2", **extra):
    config = config_of(options, objective, **extra)
    return config, fresh_state(config, CPU, backbone.load(config.model.name))


def a_batch(num=8, size=40):
    pixels = torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fields = dict(images=list(pixels), indices=torch.arange(num), epoch=0, replaced=0)
    known = Batch.__dataclass_fields__
    return Batch(**{name: value for name, value in fields.items() if name in known})


# what trains


@pytest.mark.parametrize(
    ("arch", "blocks", "r", "published"),
    [
        ("vit_large_patch14_dinov2", (23,), None, 12.69),
        ("vit_large_patch14_dinov2", (23,), 64, 18.72),
        ("vit_large_patch14_dinov2", (0, 22, 23), 64, 43.39),
        ("vit_base_patch14_dinov2", (11,), 64, 9.29),
    ],
)
def test_the_published_numbers_of_trained_parameters(arch, blocks, r, published):
    with torch.device("meta"):
        vit = timm.create_model(arch, img_size=224)
        spec = None if r is None else LoraSpec(r=r, alpha=1, targets=("q", "v"))
        explora.extend(vit, blocks, spec, class_token=False)
    width, depth = vit.embed_dim, len(vit.blocks)
    block = 12 * width**2 + 13 * width + 2 * width  # projections and MLP with biases and norms; two LayerScales
    norms = 4 * width * (depth - len(blocks)) + 2 * width
    adapters = 0 if r is None else (depth - len(blocks)) * 2 * r * 2 * width
    count = sum(p.numel() for p in vit.parameters() if p.requires_grad)
    assert count == len(blocks) * block + norms + adapters
    assert round(count / 1e6, 2) == published


def test_the_published_number_of_the_fine_tuning_after_it():
    with torch.device("meta"):
        vit = timm.create_model("vit_large_patch14_dinov2", img_size=224).requires_grad_(False)
        lora.inject(vit, LoraSpec(r=8, alpha=8, targets=("q", "v")))
    assert sum(p.numel() for p in vit.parameters() if p.requires_grad) == 786_432


@pytest.mark.parametrize(
    ("extra", "also"),
    [
        ({}, set()),
        ({"train_class_token": False}, set()),
        ({"train_patch_embed": True}, {"patch_embed.proj.weight", "patch_embed.proj.bias"}),
        ({"train_positions": True}, {"pos_embed"}),
    ],
)
def test_trained_parameters_of_the_backbone(options, extra, also):
    config = config_of(options, unfreeze="first", **extra)
    method = ExploraDinov2(backbone.load(config.model.name), config)
    found = set(trainable.trained(method.vit))
    expected = {name for name, _ in method.vit.named_parameters() if name.startswith("blocks.0.")}
    expected |= {f"blocks.1.norm{n}.{part}" for n in (1, 2) for part in ("weight", "bias")}
    expected |= {"norm.weight", "norm.bias", "blocks.1.attn.qkv.lora_a", "blocks.1.attn.qkv.lora_b"} | also
    expected |= {"cls_token"} if config.explora.train_class_token else set()
    assert found == expected
    assert method.adapters["blocks.1.attn.qkv"].parts == (0, 2)
    assert not any("lora" in name for name in expected if name.startswith("blocks.0."))


@pytest.mark.parametrize(
    ("text", "blocks"), [("last", (11,)), ("first,last", (0, 11)), ("3, 0", (0, 3)), ("11,last", (11,))]
)
def test_block_names(text, blocks):
    assert explora.unfrozen_blocks(text, 12) == blocks


@pytest.mark.parametrize(
    ("alpha", "given", "scale"), [("faithful", None, 1 / 64), ("customary", None, 1.0), ("faithful", 32.0, 0.5)]
)
def test_presets_of_alpha(options, alpha, given, scale):
    config = config_of(options | {"lora_r": 64}, alpha=alpha, lora_alpha=given)
    spec = explora.lora_spec(config)
    assert spec.alpha / spec.r == scale


# tokens


@pytest.mark.parametrize(
    "arch",
    [
        "vit_tiny_patch16_224",
        "vit_base_patch16_clip_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_siglip_224",
    ],
)
def test_tokens_equal_timms(arch):
    torch.manual_seed(0)
    patch = 14 if "14" in arch else 16
    vit = timm.create_model(arch, img_size=4 * patch, depth=2, embed_dim=48, num_heads=3).eval()
    x = torch.randn(2, 3, 4 * patch, 4 * patch)
    with torch.no_grad():
        (ours,) = explora_tokens.Encoder(vit)(explora_tokens.embed(vit, x))
        assert torch.allclose(ours, vit.forward_features(x), atol=1e-5)
        assert torch.allclose(pooling.pooled(vit, ours), pooling.features(vit, x), atol=1e-5)


def test_other_input_sizes_equal_timms_dynamic_img_size():
    torch.manual_seed(0)
    args = dict(patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, **args).eval()
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, dynamic_img_size=True, **args).eval()
    other.load_state_dict(vit.state_dict())
    x = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        (ours,) = explora_tokens.Encoder(vit)(explora_tokens.embed(vit, x))
        assert torch.allclose(ours, other.forward_features(x), atol=1e-5)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"separate_heads": True, "unfreeze": "first", "memory": "lean"},
        {"ema": "products", "save": "student", "centring": "softmax"},
    ],
    ids=lambda extra: "-".join(extra),
)
def test_the_engine_and_the_plain_model_agree(options, extra):
    found = {}
    for name in ("reference", "auto"):
        _, state = state_of(options, implementation=name, **extra)
        with torch.no_grad():  # adapters as after some steps, which the teacher has followed half the way
            for seed, adapter in enumerate(state.method.adapters.values()):
                adapter.lora_b.copy_(torch.randn(adapter.lora_b.shape, generator=torch.Generator().manual_seed(seed)))
            state.method.momentum = 0.5
            state.method.after_update(torch.tensor(True))
        crops = state.method.views(a_batch(), CPU.device)
        found[name] = state.method.loss(state.method.embed(crops))
        found[name].backward()
        found[name, "grad"] = {n: p.grad.clone() for n, p in state.method.named_parameters() if p.grad is not None}
    assert found["auto"].item() == pytest.approx(found["reference"].item(), rel=1e-5)
    assert found["auto", "grad"].keys() == found["reference", "grad"].keys()
    for name, gradient in found["reference", "grad"].items():
        assert torch.allclose(found["auto", "grad"][name], gradient, atol=1e-4 * gradient.abs().max() + 1e-7), name


def test_masks_are_rectangles_of_the_expected_share_and_depend_on_keys_alone(options):
    _, state = state_of(options)
    shares = []
    for seed in range(300):
        mask = explora_tokens.block_mask((8, 8), 20, np.random.default_rng(seed))
        assert mask.sum() <= 20
        shares.append(mask.sum())
    assert np.mean(shares) > 17
    assert explora_tokens.block_mask((8, 8), 0, np.random.default_rng(0)).sum() == 0
    one, again = (state.method.views(a_batch(), CPU.device) for _ in range(2))
    assert torch.equal(one.masked, again.masked) and torch.equal(one.pixels, again.pixels)
    half = state.method.views(a_batch(4), CPU.device)
    assert torch.equal(half.masked, one.masked[:, :4]) and torch.equal(half.local, one.local[:, :4])
    masks = [explora_crops.mask(state.method.config, state.method.grid, 0, index, 0) for index in range(400)]
    of_crop = one.masked.flatten(0, 1)
    assert one.indices.tolist() == of_crop.flatten().nonzero().flatten().tolist()
    assert one.weights.sum().item() == pytest.approx(of_crop.any(1).sum().item())
    assert 0.4 < np.mean([mask.any() for mask in masks]) < 0.6


def test_student_does_not_see_masked_patches(options):
    """Two crops that differ in masked patches alone give the student the same."""
    _, state = state_of(options, local_views=0)
    crops = state.method.views(a_batch(), CPU.device)
    view, image, patch = crops.masked.nonzero()[0].tolist()
    row, column = 8 * (patch // 4), 8 * (patch % 4)
    changed = crops.pixels.clone()
    changed[view, image, :, row : row + 8, column : column + 8] += 5
    with torch.no_grad():
        before, after = (state.method.embed(replace(crops, pixels=x)) for x in (crops.pixels, changed))
        assert torch.equal(before.extras.features, after.extras.features)
        seen = replace(crops, pixels=changed, masked=torch.zeros_like(crops.masked))
        assert not torch.equal(state.method.embed(seen).extras.features, after.extras.features)


def test_mae_encoder_sees_visible_patches_only(options):
    _, state = state_of(options, "mae")
    views = state.method.views(a_batch(), CPU.device)
    with torch.no_grad():
        before = state.method.embed(views)
        changed = views.pixels.clone()
        patch = before.extras.masked[0].nonzero()[0].item()
        changed[0, 0, :, 8 * (patch // 4) : 8 * (patch // 4) + 8, 8 * (patch % 4) : 8 * (patch % 4) + 8] *= -1
        after = state.method.embed(replace(views, pixels=changed))
        assert before.extras.tokens.shape[1] == 1 + 4 and torch.equal(before.extras.tokens, after.extras.tokens)
        assert not torch.equal(state.method.loss(before), state.method.loss(after))


# teacher


def test_the_teacher_is_a_moving_average_of_factors_and_is_never_merged(options):
    _, state = state_of(options, momentum=0.9)
    method = state.method
    student = dict(method.vit.named_parameters())
    teacher = dict(method.teacher.named_parameters())
    shared = {name for name in student if teacher[name] is student[name]}
    assert shared == {name for name, p in student.items() if not p.requires_grad}
    images = torch.randn(2, 3, 32, 32)
    before = {name: p.detach().clone() for name, p in teacher.items()}

    def teachers_features():
        with torch.no_grad():
            (tokens,) = method.teacher_encoder(explora_tokens.embed(method.teacher, images))
            return pooling.pooled(method.teacher, tokens)

    first = teachers_features()
    with torch.no_grad():
        for p in student.values():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    method.eval(), method.train()  # what DINOv2 does to its teacher at every step
    method.schedule(state.optimizer, 0)
    method.after_update(torch.tensor(True))
    for name, p in teacher.items():
        expected = before[name].lerp(student[name], 0.1) if name not in shared else before[name]
        assert torch.allclose(p, expected, atol=1e-6), name
        assert not p.requires_grad
    assert isinstance(method.teacher.blocks[0].attn.qkv, lora.LoraLinear)
    plain = copy.deepcopy(method.teacher)
    assert not torch.allclose(teachers_features(), first, atol=1e-3)
    with torch.no_grad():
        assert torch.allclose(teachers_features(), pooling.features(lora.merge(plain), images), atol=1e-4)


def test_an_average_of_products_is_not_the_product_of_averages(options):
    _, state = state_of(options, ema="products", save="student", momentum=0.75)
    method, name = state.method, "blocks.0.attn.qkv"
    adapter, frozen = method.adapters[name], method.adapters[name].base.weight.clone()
    method.schedule(state.optimizer, 0)
    expected = frozen.clone()
    for seed in range(2):
        with torch.no_grad():
            adapter.lora_b.copy_(torch.randn(adapter.lora_b.shape, generator=torch.Generator().manual_seed(seed)))
        method.after_update(torch.tensor(True))
        expected = 0.75 * expected + 0.25 * (frozen + adapter.delta())
    assert torch.allclose(method.teacher.get_parameter(f"{name}.weight"), expected, atol=1e-5)
    assert torch.equal(adapter.base.weight, frozen)
    assert f"teacher.{name}.weight" in method.state_tensors()


def test_centers_follow_the_teachers_mean_scores(options):
    _, state = state_of(options, centring="softmax", mask_probability=1.0)
    method = state.method
    crops = method.views(a_batch(), CPU.device)
    tokens = backbone_tokens(method.teacher, crops.pixels.flatten(0, 1))
    of_class = method.teacher_head(pooling.pooled(method.teacher, tokens)).mean(0)
    of_patch = method.teacher_head(tokens[:, 1:][crops.masked.flatten(0, 1)]).mean(0)
    for applied, share in ((False, 0.0), (True, 0.1), (True, 0.19)):
        method.loss(method.embed(crops))
        method.momentum = 1.0  # the teacher stands still
        method.after_update(torch.tensor(applied))
        assert torch.allclose(method.class_center, share * of_class, atol=1e-5)
        assert torch.allclose(method.patch_center, share * of_patch, atol=1e-5)


def backbone_tokens(vit, images):
    """Tokens after the final norm, by timm's own modules."""
    return vit.norm(vit.blocks(explora_tokens.embed(vit, images)))


def test_schedules_of_a_run(options):
    config, state = state_of(options | {"steps": 100}, momentum=0.9, freeze_last_layer=4)
    method, optimizer = state.method, state.optimizer
    seen = []
    for step in range(100):
        method.schedule(optimizer, step)
        decayed, plain, last = optimizer.param_groups
        seen.append((decayed["lr"], last["lr"], decayed["weight_decay"], method.temperature, method.momentum))
        assert plain["weight_decay"] == 0 and plain["lr"] == decayed["lr"]
    lr, last, decay, temperature, momentum = zip(*seen, strict=True)
    assert set(last[:4]) == {0.0} and last[4:] == lr[4:] and max(lr) == pytest.approx(config.optimization.lr)
    assert (decay[0], decay[-1]) == (pytest.approx(0.04), pytest.approx(0.4))
    assert temperature[0] == 0.04 and temperature[15] == pytest.approx(0.055) and temperature[-1] == 0.07
    assert momentum[0] == pytest.approx(0.9) and momentum[-1] == 1 and list(momentum) == sorted(momentum)


def test_a_distilled_model_is_refused_by_name():
    model = backbone.load("deit_tiny_distilled_patch16_224", pretrained=False, img_size=32)
    with pytest.raises(ConfigError, match="is a VisionTransformerDistilled"):
        explora.prepare(model, from_flat(MaeConfig, model="any", data=("none",), out="none", steps=2))


def test_weight_decay_is_that_of_dinov2_and_mae():
    # DINOv2's get_params_groups_with_decay, MAE's add_weight_decay of timm without a skip list
    def dinov2(name):
        return not (name.endswith(".bias") or "norm" in name or "gamma" in name)

    vit = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=28, embed_dim=48, num_heads=2, depth=1)
    named = dict(vit.named_parameters()) | {"mask_token": torch.zeros(1, 1, 48)}
    assert {"cls_token", "reg_token", "pos_embed", "blocks.0.ls1.gamma", "blocks.0.norm1.weight"} <= named.keys()
    for name, p in named.items():
        assert trainable.decays(name, p) == dinov2(name) == (p.dim() > 1 and not name.endswith(".bias")), name


def test_positions_of_another_grid_are_timms_and_near_dinov2s():
    vit = timm.create_model("vit_small_patch14_dinov2", img_size=224, embed_dim=48, num_heads=2, depth=1)
    smooth = sincos_positions((16, 16), 48, 1)
    with torch.no_grad():
        vit.pos_embed.copy_(smooth)
    _, ours = explora_tokens.positions(vit, (7, 7))
    grid = smooth[:, 1:].unflatten(1, (16, 16)).permute(0, 3, 1, 2)
    official = torch.nn.functional.interpolate(grid, scale_factor=(7.1 / 16, 7.1 / 16), mode="bicubic", antialias=False)
    timms = torch.nn.functional.interpolate(grid, size=(7, 7), mode="bicubic", antialias=True)
    assert torch.equal(ours, timms.permute(0, 2, 3, 1).flatten(1, 2))
    difference = (ours - official.permute(0, 2, 3, 1).flatten(1, 2)).norm() / ours.norm()
    assert 0.01 < difference < 0.1


def test_parameters_without_weight_decay(options):
    _, state = state_of(options)
    decayed, plain, last = (group["params"] for group in state.optimizer.param_groups)
    names = {id(p): name for name, p in state.method.named_parameters()}
    assert [names[id(p)] for p in last] == ["head.prototypes"]
    assert all(p.dim() >= 2 for p in decayed)
    assert "vit.norm.weight" in {names[id(p)] for p in plain}
    assert len(decayed) + len(plain) + len(last) == len(trainable.trained(state.method))


# runs


@pytest.mark.parametrize(
    ("objective", "extra"),
    [
        ("dinov2", {}),
        ("dinov2", {"centring": "softmax", "separate_heads": True}),
        ("dinov2", {"ema": "products", "save": "student", "local_views": 0, "koleo_weight": 0.0}),
        ("dinov2", {"gate": "alternate", "ibot_weight": 0.0}),
        ("dinov2", {"memory": "lean"}),
        ("mae", {}),
        ("mae", {"norm_pixels": False, "train_patch_embed": True, "train_positions": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_a_resumed_run_equals_the_uninterrupted_one(options, monkeypatch, tmp_path, objective, extra):
    """Each run ends with the check that all that trains received a gradient, where all is computed again too (lean)."""
    options |= SMALL[objective] | extra | {"objective": objective, "checkpoint_every": 2}
    upstep_fast.adapt(**options | {"out": tmp_path / "whole"})
    method = ExploraMae if objective == "mae" else ExploraDinov2
    with monkeypatch.context() as patch:
        real, count = method.schedule, iter(range(100))  # in each step, skipped or not

        def schedule(self, optimizer, index):
            if next(count) == 3:
                signal.raise_signal(signal.SIGTERM)
            real(self, optimizer, index)

        patch.setattr(method, "schedule", schedule)
        with pytest.raises(Interrupted, match=r"after 4 of 6 steps"):
            upstep_fast.adapt(**options)
    upstep_fast.adapt(**options, resume=True)
    files = [f"checkpoints/step-00000006/{name}" for name in ("state.safetensors", peft_format.WEIGHTS)]
    for name in [*files, f"adapter/{peft_format.WEIGHTS}", f"adapter/{peft_format.BARE}"]:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    exact = [
        [{k: row[k] for k in ("loss", "center", "lr", "open")} for row in rows(tmp_path / n)] for n in ("out", "whole")
    ]
    assert exact[0] == exact[1]
    held = load_file(tmp_path / "out" / files[0])
    if objective == "dinov2":
        assert {"method.teacher.blocks.1.mlp.fc1.weight", "method.teacher_head.prototypes"} <= held.keys()
        assert not torch.equal(held["method.teacher.norm.weight"], held["method.vit.norm.weight"])
    assert not any(".base." in name for name in held), "frozen weights have no place in a checkpoint"


@pytest.mark.parametrize("objective", ["dinov2", "mae"])
def test_a_short_run_lowers_its_own_loss(options, objective, tmp_path):
    steps = 40
    extra = {"dinov2": {"momentum": 0.9, "teacher_temperature": 0.04, "freeze_last_layer": 0.0}, "mae": {}}[objective]
    options |= (
        SMALL[objective] | extra | {"objective": objective, "steps": steps, "batch_size": 12, "alpha": "customary"}
    )
    upstep_fast.adapt(**options, lr=3e-3)
    losses = [row["loss"] for row in rows(tmp_path / "out")]
    first, last = np.mean(losses[:5]), np.mean(losses[-5:])
    assert last < 0.97 * first
    if objective == "dinov2":
        entropies = [row["teacher_entropy"] for row in rows(tmp_path / "out")]
        assert all(0 < value < 0.999 for value in entropies)


@pytest.mark.long
@pytest.mark.parametrize(
    "extra", [DINO | {"koleo_weight": 0.0}, DINO | {"koleo_weight": 0.0, "centring": "softmax"}, MAE]
)
def test_two_processes_equal_one(options, tmp_path, extra):
    """KoLeo apart: as in DINOv2, neighbors are looked for among a process's own images."""
    objective = "mae" if extra is MAE else "dinov2"
    named = options | extra | {"objective": objective, "steps": 4}
    flags = [part for name, value in named.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, "-m", "upstep_fast", "adapt", *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    upstep_fast.adapt(**named | {"out": tmp_path / "alone"})
    two, one = (rows(tmp_path / name) for name in ("out", "alone"))
    for name in ("loss", "center"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-4)


def test_collapse_warns_and_then_ends_the_run(options, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(failures, "MAX_COLLAPSED_STEPS", 4)
    real = pooling.pooled
    monkeypatch.setattr("upstep_fast.methods.explora.tokens.pooled", lambda vit, x: 1e-6 * real(vit, x) + 1)
    with (
        caplog.at_level("WARNING", logger="upstep_fast"),
        pytest.raises(RunFailedError, match=r"4 steps in a row") as end,
    ):
        upstep_fast.adapt(**options | DINO)
    assert end.value.exit_code == 1 and caplog.text.count("collapse: the features of all images point one way") >= 1
    # what the fourth tells is read by the fifth
    assert len(rows(tmp_path / "out")) == 5 and rows(tmp_path / "out")[0]["collapsed"]


def test_uniform_targets_are_a_collapse_too(options):
    _, state = state_of(options)
    method = state.method
    crops = method.views(a_batch(), CPU.device)
    learning = method.embed(crops)
    method.loss(learning)
    assert method.collapsed({"center": 0.5, **method.metrics()}) is None
    with torch.no_grad():
        method.teacher_head.prototypes.copy_(torch.ones_like(method.teacher_head.prototypes))
    method.loss(learning)
    assert "every prototype" in method.collapsed({"center": 0.5, **method.metrics()})


def test_an_adapter_without_gradient_is_noticed(options):
    _, state = state_of(options)
    state.got_grad.fill_(True)
    names = list(state.method.must_receive_grad())
    assert "blocks.0.attn.qkv" in names and "blocks.1.mlp.fc1.weight" in names and "norm.weight" in names
    state.got_grad[names.index("blocks.0.attn.qkv")] = False
    with pytest.raises(CheckFailedError, match=r"blocks\.0\.attn\.qkv never received a gradient"):
        check_adapter(state, torch.randn(4, 3, 32, 32), CPU, "out")


# what is saved


@pytest.fixture(scope="module", params=["dinov2", "mae"])
def finished(request, model, photos, tmp_path_factory):
    """(model, its run's folder): a run that trained all that can be."""
    out = tmp_path_factory.mktemp("finished") / "out"
    extra = SMALL[request.param] | {"train_positions": True, "train_patch_embed": True, "alpha": "customary"}
    shared = dict(method="explora", objective=request.param, steps=6, batch_size=8, lora_r=4, lr=1e-2, unfreeze="first")
    upstep_fast.adapt(
        model=model, data=photos, out=out, device="cpu", precision="fp32", num_workers=0, **shared, **extra
    )
    return model, out


def test_the_adapter_folder_is_read_by_peft(finished):
    peft = pytest.importorskip("peft")
    model, out = finished
    vit = timm.create_model(model, pretrained=True).eval()
    theirs = peft.PeftModel.from_pretrained(vit, str(out / "adapter")).eval()
    sidecar = load_file(out / "adapter" / peft_format.BARE)
    assert set(sidecar) == {"cls_token", "pos_embed"}
    inner = theirs.base_model.model
    for name, value in sidecar.items():
        inner.get_parameter(name).data.copy_(value)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = pooling.features(inner, x)
        base = pooling.features(backbone.load(model).vit, x)
        for merged in (True, False):
            ours = upstep_fast.load_adapted(model, out / "adapter", merged=merged)
            assert torch.allclose(pooling.features(ours, x), expected, atol=1e-5)
        assert torch.allclose(
            pooling.features(inner.merge_and_unload() if hasattr(inner, "merge_and_unload") else inner, x), expected
        )
    assert (expected - base).abs().max() > 1e-2


def test_adapter_config_names_its_modules(finished):
    _, out = finished
    config = json.loads((out / "adapter" / peft_format.CONFIG).read_text())
    assert config["target_modules"] == ["blocks.1.attn.qkv"]
    saved = set(config["modules_to_save"])
    assert {"blocks.0.attn.qkv", "blocks.0.mlp.fc2", "blocks.1.norm1", "model.norm", "patch_embed.proj"} <= saved
    assert not any(name.startswith("blocks.1.attn") for name in saved)


def test_eval_embed_and_export_read_it(finished, photos, tmp_path):
    model, out = finished
    adapted = upstep_fast.load_adapted(model, out / "adapter")
    path = upstep_fast.embed(
        model, photos, tmp_path / "f.npy", adapter=str(out / "adapter"), device="cpu", num_workers=0
    )
    base = upstep_fast.embed(model, photos, tmp_path / "b.npy", device="cpu", num_workers=0)
    assert np.abs(np.load(path) - np.load(base)).max() > 1e-3
    x = torch.randn(2, 3, 32, 32)
    exported = export.export(model, tmp_path / "timm", adapter=out / "adapter")
    again = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.allclose(pooling.features(again, x), pooling.features(adapted, x), atol=1e-4)
    assert exported.difference <= 1e-4
    export.export(model, tmp_path / "hf", adapter=out / "adapter", format="hf")
    peft_folder = export.export(model, tmp_path / "peft", adapter=out / "adapter", format="peft").folder
    with torch.no_grad():
        same = upstep_fast.load_adapted(model, peft_folder)
        assert torch.allclose(pooling.features(same, x), pooling.features(adapted, x), atol=1e-5)


def test_an_adapter_of_another_model_is_refused_before_anything_is_changed(finished, tmp_path):
    _, out = finished
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=96, depth=2, num_heads=3)
    before = copy.deepcopy(vit.state_dict())
    with pytest.raises(ConfigError, match=r"does not fit this model"):
        peft_format.attach(vit, out / "adapter")
    assert all(torch.equal(before[name], value) for name, value in vit.state_dict().items())


def test_pretrained_decoder_trains_lora_and_norms_only(options, tmp_path):
    config = config_of(options, "mae")
    fresh = Decoder(48, (4, 4), 1, 192, config)
    state = fresh.state_dict()
    saved = {"mask_token" if name == "mask_token" else f"decoder_{name}": value for name, value in state.items()}
    save_file({name: value.contiguous() for name, value in saved.items()}, tmp_path / "mae.safetensors")
    config = config_of(options, "mae", decoder=str(tmp_path / "mae.safetensors"), decoder_lora_r=2, decoder_width=64)
    method = ExploraMae(backbone.load(config.model.name), config)
    names = set(trainable.trained(method.decoder))
    assert {name.rpartition(".")[0] for name in names} == {
        "blocks.0.attn.qkv",
        "blocks.0.norm1",
        "blocks.0.norm2",
        "norm",
    }
    assert torch.equal(method.decoder.pred.weight, fresh.pred.weight) and not method.decoder.pred.weight.requires_grad
    assert "decoder.blocks.0.attn.qkv" in method.must_receive_grad()
    save_file({"decoder_embed.weight": torch.zeros(64, 7)}, tmp_path / "bad.safetensors")
    with pytest.raises(ConfigError, match=r"decoder: .*does not fit: .* wanted"):
        broken = config_of(options, "mae", decoder=str(tmp_path / "bad.safetensors"))
        ExploraMae(backbone.load(config.model.name), broken)
    save_file({"pos_embed": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match=r"no decoder_"):
        ExploraMae(
            backbone.load(config.model.name), config_of(options, "mae", decoder=str(tmp_path / "none.safetensors"))
        )


# configuration and bad input


def test_each_method_has_its_own_defaults_and_flags(tmp_path):
    flags = ["--model", "m", "--data", "d", "--out", "o"]
    found = parse(AdaptConfig, [*flags, "--method", "explora", "--unfreeze", "first,last"], "adapt")
    assert isinstance(found, Dinov2Config) and (found.lora.r, found.lora.targets, found.gate.rule) == (
        64,
        ("q", "v"),
        "none",
    )
    mae = parse(AdaptConfig, [*flags, "--method=explora", "--objective", "mae"], "adapt")
    assert isinstance(mae, MaeConfig) and mae.views.brightness == 0
    assert type(parse(AdaptConfig, flags, "adapt")) is AdaptConfig
    for config in (found, mae):
        (tmp_path / "c.toml").write_text(to_toml(config))
        assert parse(AdaptConfig, ["--config", str(tmp_path / "c.toml")], "adapt") == config
    with pytest.raises(ConfigError, match=r"unfreeze"):
        (tmp_path / "u.toml").write_text('model = "m"\nunfreeze = "last"\n')
        read_toml(tmp_path / "u.toml", AdaptConfig)


def test_untrained_parts_are_logged(options, caplog):
    with caplog.at_level("WARNING", logger="upstep_fast"):
        upstep_fast.adapt(**options | MAE | {"objective": "mae", "steps": 2})
    assert "has no MAE decoder; a fresh one of 1 blocks" in caplog.text


@pytest.mark.parametrize("objective", ["dinov2", "mae"])
def test_memory_is_counted_before_the_run(options, caplog, objective):
    with caplog.at_level("INFO", logger="upstep_fast"):
        upstep_fast.adapt(**options | SMALL[objective] | {"objective": objective, "steps": 1})
    assert "memory: level fast" in caplog.text and "not checked" not in caplog.text


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"unfreeze": "none"}, "unfreeze: got 'none'"),
        ({"unfreeze": "7"}, "unfreeze: there is no block 7"),
        ({"unfreeze": "first,last"}, "unfreeze: first,last leaves no block"),
        ({"cvr": "off"}, "cvr: belongs to --method upstep"),
        ({"layout": "asymmetric"}, "layout: belongs to"),
        ({"momentum": 1.5}, "momentum: got 1.5"),
        ({"mask_ratio": (0.5, 0.1)}, "mask_ratio: got 0.5 to 0.1"),
        ({"ema": "products"}, "ema: products"),
        ({"teacher_temperature": 0.0}, "teacher_temperature: got 0"),
        ({"objective": "mae", "hidden": 1.0}, "hidden: got 1.0"),
        ({"objective": "mae", "decoder_width": 30}, "decoder_width: got 30"),
        ({"objective": "mae", "decoder": "/no/such/file.pth"}, "file.pth"),
        ({"auto_batch": True}, "auto_batch: --method explora cannot"),
    ],
)
def test_bad_input_raises_one_line(options, extra, named):
    objective = extra.get("objective", "dinov2")
    with pytest.raises(ConfigError, match=named) as error:
        upstep_fast.adapt(**options | SMALL[objective] | extra)
    assert "\n" not in str(error.value) and error.value.exit_code == 2


def test_unsupported_model_raises(options):
    eva = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1, embed_dim=48, num_heads=3)
    config = config_of(options)
    with pytest.raises(ConfigError, match=r"method: explora runs timm's VisionTransformer; .* is a Eva"):
        explora.prepare(backbone.Backbone(eva, "eva", 48, (28, 28), (0,), (1,), "bicubic", 1.0), config)
