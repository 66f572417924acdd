"""Names as people type them load the model that they mean, or the error says the right name."""

import logging
import shutil
from pathlib import Path

import pytest
import timm
from timm.models import get_pretrained_cfg
from vit_models import SMALL, small

from upstep_fast.cli.demo import assets
from upstep_fast.errors import ConfigError
from upstep_fast.model import backbone, names, registry

BASE = Path(assets()[0].removeprefix("local-dir:"))


@pytest.mark.parametrize(
    ("typed", "read_as"),
    [
        ("facebook/dinov2-small", "hf-hub:facebook/dinov2-small"),
        ("Facebook/DINOv2-Small", "hf-hub:facebook/dinov2-small"),
        ("google/vit-base-patch16-224", "hf-hub:google/vit-base-patch16-224"),
        ("facebook/dino-vitb16", "hf-hub:facebook/dino-vitb16"),
        ("hf:facebook/dinov2-base", "hf-hub:facebook/dinov2-base"),
        ("https://huggingface.co/facebook/dinov2-base/", "hf-hub:facebook/dinov2-base"),
        ("openai/clip-vit-base-patch32", "vit_base_patch32_clip_quickgelu_224.openai"),
        ("ViT-L/14@336px", "vit_large_patch14_clip_quickgelu_336.openai"),
        ("dinov2_vits14", "vit_small_patch14_dinov2.lvd142m"),
        ("mae_vit_base_patch16", "vit_base_patch16_224.mae"),
        ("mae_vit_huge_patch14", "vit_huge_patch14_224.mae"),
        ("dinov2_vitg14_reg", "vit_giant_patch14_reg4_dinov2.lvd142m"),
        ("dino_vitb8", "vit_base_patch8_224.dino"),
        ("timm/vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224.augreg_in21k"),
        ("timm:vit_base_patch16_224", "vit_base_patch16_224"),
        ("ViT_Base_Patch16_224.AugReg_in21k", "vit_base_patch16_224.augreg_in21k"),
        ("google/siglip2-base-patch16-512", "vit_base_patch16_siglip_512.v2_webli"),
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "vit_huge_patch14_clip_224.laion2b"),
        # these stay
        ("vit_base_patch16_224.no_such_tag", "vit_base_patch16_224.no_such_tag"),
        ("hf-hub:a/b", "hf-hub:a/b"),
        ("local-dir:a/b", "local-dir:a/b"),
        ("weights.pth", "weights.pth"),
        ("somebody/model", "somebody/model"),  # may be a path: the hub is not asked
        ("nodine", "nodine"),
    ],
)
def test_a_name_is_read_as_what_it_certainly_means(typed, read_as):
    assert names.resolve(typed) == read_as


def test_every_known_name_has_weights_of_a_model_that_can_be_adapted():
    weights = set(timm.list_pretrained())
    assert [name for name, ours in names.KNOWN.items() if ours not in weights] == []
    for ours in set(names.KNOWN.values()):
        registry.check_arch(ours, ours)
    for name in names.KNOWN:  # the input size that a name states is that of the weights
        if name.split("-")[-1] in ("224", "256", "384", "512"):
            size = get_pretrained_cfg(names.KNOWN[name]).input_size
            assert size == (3, int(name[-3:]), int(name[-3:])), name


def test_folders_and_files_need_no_prefix(tmp_path, monkeypatch):
    shutil.copytree(BASE, tmp_path / "facebook" / "dinov2-small")
    monkeypatch.chdir(tmp_path)
    folder = "facebook/dinov2-small"
    assert names.resolve(folder) == f"local-dir:{folder}"  # the user's own before the hub's
    assert names.resolve(f"{folder}/model.safetensors") == f"local-dir:{folder}"
    assert names.resolve(f"{folder}/model.safetensors", "vit_tiny_patch16_224") == f"{folder}/model.safetensors"
    assert backbone.fingerprint(backbone.load(folder).vit) == backbone.fingerprint(backbone.load(assets()[0]).vit)


def test_demo_is_the_included_model_in_any_folder_and_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder of this name is local-dir:demo
    names._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "upstep_fast"):
        loaded = [backbone.load("demo") for _ in range(2)]
    assert backbone.fingerprint(loaded[0].vit) == backbone.fingerprint(backbone.load(f"local-dir:{BASE}").vit)
    assert loaded[0].img_size == (64, 64)
    assert [line for line in caplog.messages if line.startswith("model: ")] == [
        "model: demo is the small model included in the package (64 x 64 pixels), for trying out"
    ]


@pytest.mark.parametrize(
    ("typed", "cure"),
    [
        ("dinov2-small", "near names: facebook/dinov2-small, "),
        ("vit_b_16", "near names: vit_base_patch16_224, "),
        ("ViT-L-14", "near names: vit_large_patch14_224, "),
        ("torchvision/vit_h_14", "near names: vit_huge_patch14_224, "),
        ("vit_bas_patch16_224", "near names: vit_base_patch16_224, "),
        ("nodine", "_dinov"),
        ("somebody/model", "write hf-hub:somebody/model; near names: "),
        ("", "near names: "),
        ("Readme", "the endings of checkpoint files are .bin, "),
    ],
)
def test_other_names_are_told_the_right_one(typed, cure, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Readme").write_text("")
    with pytest.raises(ConfigError) as error:
        backbone.load(typed)
    assert cure in str(error.value) and f"unknown model {typed!r}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("typed", ["local-dir:", "local_dir:", "hf-hub:", "hf:"])
def test_a_prefix_with_nothing_behind_it_is_not_the_working_folder(typed, tmp_path, monkeypatch):
    timm.models.save_for_hf(small(), tmp_path, model_args=SMALL, safe_serialization=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^model: (local-dir:|hf-hub:) names no model; write \1(PATH|OWNER/NAME)$"):
        backbone.load(typed)
    assert backbone.load("local-dir:.").img_size == (32, 32)


def test_a_refused_name_is_not_among_its_near_names():
    assert "vit_tiny_patch16_224," not in registry.nearest_names("vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match="VisionTransformer of timm's vision_transformer_hybrid, not a plain"):
        backbone.load("vit_tiny_r_s16_p8_224")


@pytest.mark.parametrize(
    ("typed", "text", "distance"),
    [("nodine", "dino", 3), ("bas", "vit_base", 0), ("kitten", "sitting", 2), ("", "x", 0), ("ab", "", 2)],
)
def test_edit_distance_to_a_part(typed, text, distance):
    assert names._distance(typed, text) == distance
