"""What is no model: one line, exit code 2, nothing written, nothing changed."""

import json
import os
import pickle

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from vit_models import SMALL, small

from upstep_fast.cli.commands import main
from upstep_fast.errors import ConfigError
from upstep_fast.model.formats import checkpoint_files


@pytest.fixture(autouse=True)
def in_a_folder_of_images(photos, monkeypatch):
    monkeypatch.chdir(photos)  # --data . is read before the model


def refused(capsys, tmp_path, *args):
    """The one line of a refused command, which has written nothing."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(["embed", "--data", ".", "--out", str(tmp_path / "f.npy"), "--device", "cpu", *map(str, args)])
    said = capsys.readouterr().err.strip().splitlines()
    err = "\n".join(line for line in said if not line.startswith(("INFO", "WARNING")))
    assert stop.value.code == 2 and err.startswith("upstep-fast: ") and "\n" not in err
    assert sorted(tmp_path.rglob("*")) == before
    return err


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer, not a plain Vision Transformer; near names"),
        ("convnext_tiny", "ConvNeXt, not a plain"),
        ("vit_base_r50_s16_224", "not a plain"),
        ("vit_base_patch16_xp_224", "in parallel"),
        ("vit_bse_patch16_224", "vit_base_patch16_224"),
    ],
)
def test_other_families_are_refused_by_name(capsys, tmp_path, monkeypatch, arch, message):
    def no_weights(*args, **options):
        raise AssertionError("weights were read")

    monkeypatch.setattr(checkpoint_files, "read", no_weights)
    monkeypatch.setattr(timm, "create_model", no_weights)
    save_file({"x": torch.ones(1)}, tmp_path / "w.safetensors")
    assert message in refused(capsys, tmp_path, "--model", tmp_path / "w.safetensors", "--arch", arch)
    if arch != "vit_bse_patch16_224":
        assert message in refused(capsys, tmp_path, "--model", arch)


def test_a_pickle_with_code_is_not_run(capsys, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": Bomb()}, tmp_path / "w.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"model": Bomb()}))
    for name in ("w.pth", "old.pth"):
        line = refused(capsys, tmp_path, "--model", tmp_path / name, "--arch", "vit_tiny_patch16_224")
        assert "safetensors.torch.save_file" in line and not (tmp_path / "ran").exists()
    # a folder that timm itself would read
    timm.models.save_for_hf(small(), tmp_path / "base", model_args=SMALL, safe_serialization=True)
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "w.pth").rename(tmp_path / "base" / "pytorch_model.bin")
    assert "run code" in refused(capsys, tmp_path, "--model", f"local-dir:{tmp_path / 'base'}")
    assert not (tmp_path / "ran").exists()


def test_damaged_safetensors(capsys, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(dict(small().state_dict()), path)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    damaged = [whole[:length] for length in (0, 7, 100, header, len(whole) // 2, len(whole) - 1)]
    damaged.append((2**60).to_bytes(8, "little") + whole[8:])
    damaged.append(whole[:8] + whole[8 : 8 + header].replace(b"[0,", b"[4,", 1) + whole[8 + header :])
    for content in damaged:
        path.write_bytes(content)
        line = refused(capsys, tmp_path, "--model", path, "--arch", "vit_tiny_patch16_224")
        assert "cannot be read" in line and str(path) in line
    path.rename(tmp_path / "w.pth")
    assert "w.pth" in refused(capsys, tmp_path, "--model", tmp_path / "w.pth", "--arch", "vit_tiny_patch16_224")


def test_a_checkpoint_that_does_not_fit_changes_nothing():
    source = dict(small().state_dict())
    cases = [
        ({"fc.weight": torch.ones(5, 48), "fc.bias": torch.ones(5)}, "holds no Vision Transformer, only fc.bias"),
        ({"head.weight": torch.ones(5, 48), "head.bias": torch.ones(5)}, "holds no Vision Transformer"),
        (small(depth=2).state_dict(), r"30 of 42 tensors matched .*blocks\.2\.norm1\.weight is missing.* and 7 more"),
        (small(depth=4).state_dict(), r"blocks\.3\.norm1\.weight has no place in the model"),
        (small(embed_dim=96).state_dict(), r"cls_token is \[1, 1, 96\], the model wants \[1, 1, 48\]"),
        (small(patch_size=4).state_dict() | {"pos_embed": torch.ones(1, 3, 7)}, None),
    ]
    for state, message in cases:
        vit = small(seed=9)
        before = {key: value.clone() for key, value in vit.state_dict().items()}
        with pytest.raises(ConfigError if message else Exception, match=message) as error:
            checkpoint_files.fill(vit, dict(state), where="file")
        assert isinstance(error.value, ConfigError) and "\n" not in str(error.value)
        assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())
    # of a model's own tensors only biases may be missing, whatever --min-matched; blocks of the file may be left out
    partly = {key: value for key, value in source.items() if not key.startswith("blocks.2.")}
    with pytest.raises(ConfigError, match=r"30 of 42 tensors matched .*check --arch$"):
        checkpoint_files.fill(small(seed=9), partly, where="file", min_matched=0.0)
    no_bias = {key: value for key, value in source.items() if not key.endswith("bias")}
    with pytest.raises(ConfigError, match=r"or lower --min-matched to load what fits$"):
        checkpoint_files.fill(small(seed=9), no_bias, where="file")
    vit = small(seed=9)
    match = checkpoint_files.fill(vit, no_bias, where="file", min_matched=0.5)
    assert (match.matched, match.total) == (22, 42) and torch.equal(vit.norm.weight, source["norm.weight"])
    assert not any(value.any() for key, value in vit.state_dict().items() if key.endswith("bias") and "head" not in key)
    deeper = small(depth=4).state_dict()
    match = checkpoint_files.fill(vit, deeper, where="file", min_matched=0.5)
    assert match.matched == 42 and torch.equal(vit.norm.weight, deeper["norm.weight"])


def test_files_that_are_no_checkpoint(capsys, tmp_path):
    assert "--arch" in refused(capsys, tmp_path, "--model", tmp_path / "w.safetensors")
    assert "no file" in refused(
        capsys, tmp_path, "--model", tmp_path / "w.safetensors", "--arch", "vit_tiny_patch16_224"
    )
    torch.save([1, 2], tmp_path / "w.pth")
    assert "no state dict" in refused(capsys, tmp_path, "--model", tmp_path / "w.pth", "--arch", "vit_tiny_patch16_224")
    (tmp_path / "swin").mkdir()
    (tmp_path / "swin" / "config.json").write_text(json.dumps({"model_type": "swin", "hidden_size": 4}))
    assert "swin" in refused(capsys, tmp_path, "--model", f"local-dir:{tmp_path / 'swin'}")


# the same through the commands


def test_a_file_of_the_head_only_or_of_another_size(capsys, tmp_path):
    path = tmp_path / "w.safetensors"
    tiny = ("--model", path, "--arch", "vit_tiny_patch16_224")
    heads = [
        {"head.weight": torch.ones(5, 192), "head.bias": torch.ones(5)},
        {"mlp.0.weight": torch.ones(8, 8), "last_layer.weight_g": torch.ones(8, 1)},  # DINO's
        {"linear.weight": torch.ones(5, 192)},
    ]
    for state in heads:
        save_file(state, path)
        assert "holds no Vision Transformer, only " in refused(capsys, tmp_path, *tiny)
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=12, embed_dim=96).state_dict()
    save_file(other, path)
    line = refused(capsys, tmp_path, *tiny)
    assert "0 of 150 tensors matched" in line and "[1, 1, 96], the model wants [1, 1, 192]" in line and "--arch" in line


def test_a_hierarchical_models_weights_and_folders(capsys, tmp_path):
    path = tmp_path / "w.safetensors"
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    convnext = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    for vit, message in ((swin, "does not fit: "), (convnext, "holds no Vision Transformer")):
        save_file(dict(vit.state_dict()), path)
        assert message in refused(capsys, tmp_path, "--model", path, "--arch", "vit_tiny_patch16_224")
        timm.models.save_for_hf(vit, tmp_path / "timm", safe_serialization=True)
        line = refused(capsys, tmp_path, "--model", f"local-dir:{tmp_path / 'timm'}")
        assert f"is a {type(vit).__name__}, not a plain Vision Transformer; near names: vit" in line
    (tmp_path / "hf").mkdir()
    for kind in ("swin", "convnextv2", "siglip_vision_model", None):
        config = {"model_type": kind, "hidden_size": 4, "num_attention_heads": 1, "image_size": 8, "patch_size": 4}
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
        line = refused(capsys, tmp_path, "--model", f"local-dir:{tmp_path / 'hf'}")
        assert f"is a {kind} of transformers, not one of vit, vit_mae, dinov2, " in line or "num_hidden" in line


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_folders_whose_weights_are_damaged_or_of_another_model(capsys, tmp_path, kind):
    folder = tmp_path / "base"
    name = f"local-dir:{folder}"
    if kind == "timm":
        timm.models.save_for_hf(small(), folder, model_args=SMALL, safe_serialization=True)
    else:
        config = transformers.ViTConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8
        )
        transformers.ViTModel(config).save_pretrained(folder)
        capsys.readouterr()  # its progress
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for damaged in (b"", whole[:-1], whole[:header], b"\xff" * 8 + whole[8:], whole[:8] + b"[" + whole[9:]):
        path.write_bytes(damaged)
        assert (
            "model.safetensors is complete" in (line := refused(capsys, tmp_path, "--model", name)) or str(path) in line
        )
    path.write_bytes(whole[:header] + b"\xff" * 4 + whole[header + 4 :])  # the first number is not one
    assert "that are not finite" in refused(capsys, tmp_path, "--model", name)
    save_file({key: value[..., :-1].clone() for key, value in load_file(path).items()}, path)
    assert len(refused(capsys, tmp_path, "--model", name)) < 1000
    path.unlink()
    assert name.removeprefix("local-dir:") in refused(capsys, tmp_path, "--model", name)


def test_a_configuration_that_is_wrong(capsys, tmp_path):
    plain = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8)
    vit = {"model_type": "vit", "intermediate_size": 96} | plain
    timm_config = {"architecture": "vit_tiny_patch16_224"}
    wrong = ["", "{", "[]", "3", "{}", vit | {"hidden_size": 0}, vit | {"hidden_size": "wide"}, vit | {"patch_size": 0}]
    wrong += [vit | {"num_attention_heads": 5}, vit | {"intermediate_size": None}, vit | {"hidden_act": "relu"}]
    wrong += [{"model_type": "dinov3_vit", "key_bias": True} | plain, {"model_type": "vit"}]
    wrong += [timm_config | {"model_args": args} for args in ([1], "x", {"depths": 3}, {"patch_size": 0})]
    wrong += [{"architecture": "nothing_of_the_kind"}, {"architecture": 5}]
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(dict(small().state_dict()), folder / "model.safetensors")
    for content in wrong:
        (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
        line = refused(capsys, tmp_path, "--model", f"local-dir:{folder}")
        assert line.startswith("upstep-fast: model: ") and str(folder) in line, content


@pytest.mark.parametrize("command", ["adapt", "embed", "export"])
def test_no_command_writes_when_the_model_is_wrong(capsys, tmp_path, photos, command):
    path = tmp_path / "w.safetensors"
    save_file({"head.weight": torch.ones(5, 192)}, path)
    options = ["--data", str(photos), "--out", str(tmp_path / ("out.npy" if command == "embed" else "out"))]
    models = [("swin_tiny_patch4_window7_224",), (str(path), "--arch", "vit_tiny_patch16_224"), (f"local-dir:{path}",)]
    for model in models:
        with pytest.raises(SystemExit) as stop:
            main([command, "--model", *model, *options])
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("INFO")]
        assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("upstep-fast: model: ")
        assert list(tmp_path.iterdir()) == [path]
