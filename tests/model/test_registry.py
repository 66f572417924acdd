"""Models of the hub, from its cache and offline, and folders of transformers: whole, in shards, as pickles."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from vit_models import SMALL, assert_same, images, saved, small

from upstep_fast.errors import ConfigError
from upstep_fast.model import backbone, registry
from upstep_fast.model.formats import checkpoint_files

HF = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=56, patch_size=14)


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(**HF, intermediate_size=96)
    return transformers.ViTModel(config, add_pooling_layer=False).eval()


def dinov2():
    torch.manual_seed(1)
    return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**HF, mlp_ratio=2)).eval()


def dinov3():
    torch.manual_seed(2)
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**HF, intermediate_size=96)).eval()


def in_shards(model, folder):
    """As transformers saves large models."""
    model.save_pretrained(folder, max_shard_size="40KB")
    assert (folder / checkpoint_files.INDEX).is_file() and len(list(folder.glob("*.safetensors"))) > 2
    return folder


def as_pickle(model, folder):
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / checkpoint_files.PICKLE)
    return folder


def assert_features(base, model):
    x = images(base.img_size)
    with torch.no_grad():
        expected = model(x).last_hidden_state[:, 0]
        torch.testing.assert_close(base.vit.forward_features(x)[:, 0], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("make", [vit, dinov2, dinov3])
def test_folders_in_shards_and_as_pickles(tmp_path, make):
    make().save_pretrained(tmp_path / "whole")
    whole = backbone.load(f"local-dir:{tmp_path / 'whole'}")
    for write in (in_shards, as_pickle):
        folder = write(make(), tmp_path / write.__name__)
        base = backbone.load(f"local-dir:{folder}")
        assert_same(base.vit, whole.vit)
        assert_features(base, make())
    # a single file comes before shards that an older export left there, as in transformers
    other = tmp_path / "whole"
    for path in (tmp_path / "in_shards").glob("model*"):
        shutil.copy(path, other)
    for path in other.glob("model-*"):
        path.write_bytes(b"")
    assert_same(backbone.load(f"local-dir:{other}").vit, whole.vit)


def test_an_index_that_is_wrong(tmp_path):
    folder = in_shards(vit(), tmp_path / "vit")
    index = folder / checkpoint_files.INDEX
    real = json.loads(index.read_text())
    shard = sorted(folder.glob("*.safetensors"))[1]
    for wrong in ("../secret.safetensors", "/etc/secret.safetensors", "code.bin", "", 3, None):
        index.write_text(json.dumps(real | {"weight_map": real["weight_map"] | {"x": wrong}}))
        with pytest.raises(ConfigError, match=r"is not an index of safetensors files beside it; fetch"):
            backbone.load(f"local-dir:{folder}")
    for text in ("", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', "\0"):
        index.write_text(text)
        with pytest.raises(ConfigError, match="is not an index"):
            backbone.load(f"local-dir:{folder}")
    index.write_text(json.dumps(real))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ConfigError, match=f"{shard.name} cannot be read"):
        backbone.load(f"local-dir:{folder}")
    shard.unlink()
    with pytest.raises(ConfigError, match=f"no file at .*{shard.name}"):
        backbone.load(f"local-dir:{folder}")


# the hub's cache, made by hand: its client reads the environment when imported, hence the other process


def cached(cache: Path, name: str, source: Path, revision="main") -> None:
    """Puts a folder into a cache as the repository `name`: blobs, and a snapshot of links to them."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs, refs = repository / "snapshots" / ("f" * 40), repository / "blobs", repository / "refs"
    for folder in (snapshot, blobs, refs):
        folder.mkdir(parents=True)
    for path in source.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    (refs / revision).write_text("f" * 40)


LOAD = """
import sys
from safetensors.torch import save_file
from upstep_fast.model import backbone
from upstep_fast.errors import ConfigError
for at, name in enumerate(sys.argv[1:]):
    name, _, arch = name.partition("=")
    try:
        vit = backbone.load(name, arch=arch or None, img_size=32 if arch else None).vit
        save_file(vit.state_dict(), f"{at}.safetensors")
        print("loaded")
    except ConfigError as error:
        print(error)
"""


def load_offline(folder: Path, names, **environment):
    """For each name the state dict that an offline process loads, or the message of its refusal."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *names], cwd=folder, env=env | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(names)
    return [load_file(folder / f"{at}.safetensors") if line == "loaded" else line for at, line in enumerate(lines)]


class Bomb:
    """A pickle of it makes a folder when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("is_legacy", [False, True])
def test_a_pickle_is_checked_without_reading_its_tensors(tmp_path, monkeypatch, is_legacy):
    folder = tmp_path / "timm"
    saved(small(), folder, SMALL)
    (folder / "model.safetensors").unlink()
    torch.save(small().state_dict(), folder / checkpoint_files.PICKLE, _use_new_zipfile_serialization=not is_legacy)
    calls, real = [], torch.load

    def load(*args, **kwargs):
        calls.append(kwargs.get("mmap"))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "load", load)
    registry.find(f"local-dir:{folder}")
    assert calls == [not is_legacy]


def test_the_hubs_cache_offline(tmp_path):
    cache = tmp_path / "home" / "hub"
    saved(small(), tmp_path / "timm", SMALL)
    cached(cache, "someone/timm", tmp_path / "timm")
    dinov2().save_pretrained(tmp_path / "dinov2")
    cached(cache, "facebook/dinov2-tiny", tmp_path / "dinov2")
    cached(cache, "facebook/dinov3-sharded", in_shards(dinov3(), tmp_path / "dinov3"))
    cached(cache, "google/vit-pickled", as_pickle(vit(), tmp_path / "vit"), revision="v2")
    (tmp_path / "half").mkdir()
    shutil.copy(tmp_path / "dinov2" / "config.json", tmp_path / "half")
    cached(cache, "someone/half", tmp_path / "half")
    lost = in_shards(vit(), tmp_path / "lost")
    sorted(lost.glob("*.safetensors"))[0].unlink()
    cached(cache, "someone/lost", lost)
    saved(small(), tmp_path / "bomb", SMALL)
    (tmp_path / "bomb" / "model.safetensors").unlink()
    torch.save({"model": Bomb(tmp_path / "ran")}, tmp_path / "bomb" / checkpoint_files.PICKLE)
    cached(cache, "someone/bomb", tmp_path / "bomb")
    names = [
        *("hf-hub:someone/timm", "hf-hub:facebook/dinov2-tiny", "hf-hub:facebook/dinov3-sharded"),
        *("hf-hub:google/vit-pickled@v2", "hf-hub:someone/timm=vit_tiny_patch16_224"),
        *("hf-hub:google/vit-pickled", "hf-hub:someone/half", "hf-hub:someone/lost", "hf-hub:no/where"),
        "hf-hub:someone/bomb",
    ]
    found = load_offline(tmp_path, names, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    for state, folder in zip(found, ("timm", "dinov2", "dinov3", "vit"), strict=False):
        expected = backbone.load(f"local-dir:{tmp_path / folder}").vit.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in state.items())
    assert "tensors matched" in found[4]  # another architecture
    assert "safetensors.torch.save_file" in found[-1] and not (tmp_path / "ran").exists()
    for message, name in zip(found[5:-1], names[5:-1], strict=True):
        assert message.startswith(f"model: cannot load {name}: ") and message.endswith(
            "check the network or the cache (HF_HOME), or use local-dir:PATH with weights on disk"
        )
