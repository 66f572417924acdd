"""What is no model: one line, exit code 2, nothing written, nothing changed."""

import json
import os
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from vits import SMALL, small

from upstep_fast import weights
from upstep_fast.cli import main
from upstep_fast.errors import ConfigError


def refused(capsys, tmp_path, *args):
    """The one line of a refused command, which has written nothing."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--data", str(tmp_path), "--device", "cpu", *map(str, args)])
    err = capsys.readouterr().err.strip()
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

    monkeypatch.setattr(weights, "read", no_weights)
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
            weights.fill(vit, dict(state), where="file")
        assert isinstance(error.value, ConfigError) and "\n" not in str(error.value)
        assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())
    partly = {key: value for key, value in source.items() if not key.startswith("blocks.2.")}
    vit = small(seed=9)
    match = weights.fill(vit, partly, where="file", min_matched=0.6)
    assert (match.matched, match.total) == (30, 42) and torch.equal(vit.norm.weight, source["norm.weight"])


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
