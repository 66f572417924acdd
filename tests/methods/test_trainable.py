"""Trained parameters: adapters on all blocks, on the last ones, or every weight."""

import json

import pytest
import timm
import torch
from adapt_configs import upstep_config
from safetensors.torch import load_file

import upstep_fast
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.files import from_options, read_toml, to_toml
from upstep_fast.errors import ConfigError
from upstep_fast.model import backbone, peft_format, pooling


@pytest.fixture
def options(model, photos, tmp_path):
    small = dict(batch_size=8, prototypes=8, head_hidden=32, head_dim=16, num_workers=0)
    return dict(model=model, data=photos, out=tmp_path / "out", steps=4, precision="fp32", device="cpu", **small)


def test_full_tuning_trains_every_weight_and_the_folder_holds_them(options, model, tmp_path):
    upstep_fast.adapt(**options, tune="full", lr=1e-2, cvr="sq", gate="none")
    base, adapted = backbone.load(model).vit, upstep_fast.load_adapted(model, tmp_path / "out" / "adapter")
    same = [name for name, p in adapted.named_parameters() if torch.equal(p, base.get_parameter(name))]
    assert set(same) == {"head.weight", "head.bias"}  # the classifier, behind the features
    config = json.loads((tmp_path / "out" / "adapter" / peft_format.CONFIG).read_text())
    assert config["target_modules"] == "dummy-target-modules"
    assert set(load_file(tmp_path / "out" / "adapter" / peft_format.BARE)) == {"cls_token", "pos_embed"}


def test_peft_reads_what_full_tuning_wrote(options, model, tmp_path):
    peft = pytest.importorskip("peft")
    upstep_fast.adapt(**options, tune="full", lr=1e-2)
    folder = tmp_path / "out" / "adapter"
    inner = peft.PeftModel.from_pretrained(
        timm.create_model(model, pretrained=True).eval(), str(folder)
    ).base_model.model
    for name, value in load_file(folder / peft_format.BARE).items():
        inner.get_parameter(name).data.copy_(value)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = pooling.features(upstep_fast.load_adapted(model, folder), x)
        assert torch.allclose(pooling.features(inner.eval(), x), ours, atol=1e-5)
        assert (ours - pooling.features(backbone.load(model).vit, x)).abs().max() > 1e-2


def test_the_penalty_acts_on_full_tuning_as_on_lora(options, tmp_path):
    """The first update does not know it yet; by the last the center is shorter with it than without."""
    last = {}
    for tune in ("lora", "full"):
        for cvr in ("off", "sq"):
            out = tmp_path / f"{tune}-{cvr}"
            own = dict(tune=tune, cvr=cvr, cvr_weight=20.0, out=out, steps=12, gate="none", lr=3e-3)
            upstep_fast.adapt(**options | own)
            rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            last[tune, cvr] = rows[-1]["center"]
    assert last["lora", "sq"] < last["lora", "off"] and last["full", "sq"] < last["full", "off"]


def test_adapters_on_the_last_blocks_alone(options, model, tmp_path):
    upstep_fast.adapt(**options, lora_blocks=1)
    config = json.loads((tmp_path / "out" / "adapter" / peft_format.CONFIG).read_text())
    depth = len(backbone.load(model).vit.blocks)
    assert depth > 1 and config["target_modules"] == [f"blocks.{depth - 1}.attn.qkv"]
    with pytest.raises(ConfigError, match=f"lora_blocks: got {depth + 1}, but .* has {depth} blocks"):
        upstep_fast.adapt(**options | {"out": tmp_path / "other"}, lora_blocks=depth + 1)


@pytest.mark.parametrize(
    "wrong", [{"lora_r": 2}, {"lora_blocks": 1}, {"distil": "feature"}, {"strength": 0.5}, {"shard_weights": True}]
)
def test_full_tuning_refuses_what_needs_adapters(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: needs --tune lora"):
        upstep_config(model="m", data=("d",), out="o", tune="full", **wrong)


def test_tune_is_an_option_of_upstep(options):
    with pytest.raises(ConfigError, match="tune: belongs to --method upstep"):
        upstep_fast.adapt(**options, method="explora", tune="full")


def test_configuration_round_trips_through_toml(tmp_path):
    config = upstep_config(model="m", data=("d",), out="o", tune="full")
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert from_options(AdaptConfig, read_toml(tmp_path / "config.toml", AdaptConfig), "adapt") == config
