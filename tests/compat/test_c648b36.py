"""Files that commit c648b36 wrote (c648b36/make.py): adapter, checkpoint, whitening and config.toml still load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import upstep_fast
from upstep_fast.cli.commands import main

FILES = Path(__file__).with_name("c648b36")
EXACT = dict(precision="fp32", device="cpu", implementation="reference")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A copy of the files, as the current folder: config.toml names its model and images relative to it."""
    shutil.copytree(FILES, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_the_config_and_the_checkpoint_resume(here):
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    last = load_file("run/adapter/adapter_model.safetensors")  # after step 8
    with pytest.raises(SystemExit) as stop:
        main(["adapt", "--config", "run/config.toml", "--resume"])
    assert stop.value.code == 0
    again = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in again] == list(range(8))
    assert any(row["open"] for row in again[4:])  # a step after the checkpoint moves the adapter
    for old, new in zip(rows[4:], again[4:], strict=True):
        assert old["open"] == new["open"] and old["center"] == pytest.approx(new["center"], rel=1e-4)
    for name, tensor in load_file("run/adapter/adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, last[name], rtol=1e-3, atol=1e-5)


def test_the_adapter_and_the_whitening_give_their_features(here):
    upstep_fast.embed(
        "local-dir:model", "photos", "now.npy", adapter="run/adapter", whitening="whitening.safetensors", **EXACT
    )
    np.testing.assert_allclose(np.load("now.npy"), np.load("features.npy"), rtol=1e-3, atol=1e-4)


def test_the_adapter_is_not_the_base_model(here):
    """So that the two tests above compare something."""
    upstep_fast.embed("local-dir:model", "photos", "base.npy", **EXACT)
    base, adapted = np.load("base.npy"), np.load("features.npy")[:, :48]
    assert np.abs(base - adapted).max() > 1e-3


def test_public_paths_import():
    from upstep_fast import adapt, embed, evaluate, finetune, kernels, load_adapted, load_finetuned
    from upstep_fast.cli import main as entry  # noqa: F401
    from upstep_fast.config import AdaptConfig, BackboneConfig, EmbedConfig, EvalConfig, ModelConfig  # noqa: F401
    from upstep_fast.data.decode import decode  # noqa: F401
    from upstep_fast.data.sources import open_source  # noqa: F401
    from upstep_fast.data.views import ViewConfig, multi_crop, random_views  # noqa: F401
    from upstep_fast.errors import CheckFailedError, ConfigError, DataError, Interrupted  # noqa: F401
    from upstep_fast.evaluation import embed as embed_features  # noqa: F401
    from upstep_fast.evaluation import evaluate as evaluate_features
    from upstep_fast.integrations.peft import patch

    assert all(callable(f) for f in (adapt, embed, evaluate, finetune, load_adapted, load_finetuned, patch))
    assert evaluate_features is evaluate and callable(kernels.lora_linear)
