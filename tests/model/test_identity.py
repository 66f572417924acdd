"""Identity of a model: with equal weights, other heads, another activation or other pixels make another model."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from vit_models import SMALL, saved, small

import upstep_fast
from upstep_fast.errors import ConfigError
from upstep_fast.model import backbone
from upstep_fast.model.identity import differences, model_identity
from upstep_fast.runtime import distributed

# entries of config.json that change the features and no weight, and what a refusal names
CHANGES = {
    "heads": ({"model_args": {"num_heads": 6}}, "num_heads was 3, is 6"),
    "activation": ({"model_args": {"act_layer": "quick_gelu"}}, r"mlp.act.class was GELU, is QuickGELU"),
    "pooling": ({"model_args": {"global_pool": "avg", "fc_norm": False}}, "global_pool was token, is avg"),
    "mean": ({"pretrained_cfg": {"mean": [0.4, 0.4, 0.4]}}, r"mean was \[0.5, 0.5, 0.5\], is \[0.4, 0.4, 0.4\]"),
    "crop": ({"pretrained_cfg": {"crop_pct": 0.8}}, "crop_pct was 0.9, is 0.8"),
    "squash": ({"pretrained_cfg": {"crop_mode": "squash"}}, "crop_mode was center, is squash"),
}


def changed(name: str, folder: Path, change: dict) -> str:
    """A copy of a timm folder whose configuration differs."""
    shutil.copytree(name.removeprefix("local-dir:"), folder)
    config = json.loads((folder / "config.json").read_text())
    for part, entries in change.items():
        config[part] = config.get(part, {}) | entries
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved(small(), tmp_path_factory.mktemp("base"), SMALL)


@pytest.fixture(scope="module")
def before(base):
    return model_identity(backbone.load(base))


@pytest.mark.parametrize("kind", CHANGES)
def test_what_changes_the_features_is_another_model(tmp_path, base, before, kind):
    change, message = CHANGES[kind]
    now = model_identity(backbone.load(changed(base, tmp_path / "other", change)))
    assert now["sha256"] == before["sha256"]
    assert re.search(message, "; ".join(differences(before, now)))


def test_the_same_model_under_another_name(tmp_path, base, before):
    copied = backbone.load(changed(base, tmp_path / "copy", {"model_args": {"qkv_bias": True}}))  # the default, said
    assert not differences(before, model_identity(copied))
    assert json.loads(json.dumps(before)) == before  # as a manifest gives it back
    assert not differences({"sha256": before["sha256"]}, before)  # of an earlier version
    other = copy.deepcopy(before) | {"sha256": "0"}
    assert differences(other, before) == ["its weights are not the same"]


@pytest.mark.parametrize("kind", ["heads", "mean"])
def test_a_run_is_not_resumed_on_it(options, base, tmp_path, kind):
    upstep_fast.adapt(**options | {"model": base, "steps": 2})
    other = changed(base, tmp_path / "other", CHANGES[kind][0])
    with pytest.raises(ConfigError, match=f"another model, of the same weights: .*{CHANGES[kind][1]}"):
        upstep_fast.adapt(**options | {"model": other, "steps": 2}, resume=True)


def test_ranks_whose_folders_differ_do_not_start(base, before, tmp_path, monkeypatch):
    """What `adapt` gathers at its start, of two ranks with equal weights."""
    other = changed(base, tmp_path / "other", CHANGES["heads"][0])
    parts = [
        {"backbone": {"name": base} | model_identity(model)} for model in (backbone.load(base), backbone.load(other))
    ]
    monkeypatch.setattr(distributed, "gather", lambda facts: parts)
    with pytest.raises(ConfigError, match=r"rank 1 differs from rank 0: backbone\.settings\.blocks\.N\.attn\.\w+ is"):
        distributed.agree_on(parts[0])


def test_a_whitening_is_not_used_with_it(base, before, photos, tmp_path):
    common = dict(device="cpu", precision="fp32", implementation="reference")
    kept = tmp_path / "whitening.safetensors"
    upstep_fast.embed(base, photos, tmp_path / "a.npy", fit_whitening=str(kept), **common)
    other = changed(base, tmp_path / "other", CHANGES["mean"][0])
    with pytest.raises(ConfigError, match=f"fitted to another model, of the same weights: {CHANGES['mean'][1]}"):
        upstep_fast.embed(other, photos, tmp_path / "b.npy", whitening=str(kept), **common)
    save_file(load_file(kept), old := tmp_path / "old.safetensors", {"base": before["sha256"]})
    upstep_fast.embed(other, photos, tmp_path / "c.npy", whitening=str(old), **common)  # of an earlier version
