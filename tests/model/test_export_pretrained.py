"""Exports of a real pretrained model with an adapter, compared on real drawings."""

import importlib.util

import pytest
import torch
from torch import nn

from upstep_fast.model import backbone, lora, peft_format
from upstep_fast.model.export.export import BOUND, export

NEEDS = {"peft": "peft", "hf": "transformers", "onnx": "onnxruntime"}


@pytest.mark.parametrize("kind", ["timm", "hf", "peft", "dinov2", "torch", "onnx"])
def test_base_mid_on_sketches(shared, tmp_path, kind):
    if importlib.util.find_spec(NEEDS.get(kind, "timm")) is None:
        pytest.skip(f"needs {NEEDS[kind]}")
    name = f"local-dir:{shared / 'base_mid'}"
    adapters = lora.inject(backbone.load(name).vit, lora.LoraSpec(r=4, targets=("q", "k", "v", "proj")))
    torch.manual_seed(1)
    for adapter in adapters.values():
        nn.init.normal_(adapter.lora_b, std=0.1)
    peft_format.save_adapter(tmp_path / "adapter", adapters, name)
    data = (str(shared / "pacs_sketch_64.tar"),)
    done = export(name, tmp_path / "out", adapter=tmp_path / "adapter", format=kind, data=data)
    assert done.difference < BOUND / 10 and done.images == f"16 images of {data[0]}"
    assert f"{done.difference:.1e}, measured in" in (tmp_path / "out" / "README.md").read_text()
