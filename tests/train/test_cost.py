"""What a run takes, said before it starts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from upstep_fast import adapt
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.flat import from_flat
from upstep_fast.model import backbone as backbones
from upstep_fast.train import cost


@pytest.mark.parametrize(("blocks", "factor"), [(None, 2.0), (1, 1.5)])
def test_flops_of_a_step(model, blocks, factor):
    """Against PyTorch's counter: a forward pass of both views, and a backward pass that costs as much per block."""
    backbone = backbones.load(model)
    assert len(backbone.blocks) == 2
    config = from_flat(AdaptConfig, model=model, data=("x",), out="y", batch_size=5, lora_blocks=blocks)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.vit.forward_features(torch.zeros(10, 3, *backbone.img_size))
    weights = sum(p.numel() for p in backbone.vit.parameters())
    assert cost.step_flops(config, backbone, weights) == pytest.approx(factor * counter.get_total_flops(), rel=0.25)


def test_a_run_says_what_it_takes(options, monkeypatch, caplog):
    caplog.set_level("INFO", "upstep_fast")
    monkeypatch.setattr(cost, "MIN_FLOPS", 0.0)
    monkeypatch.setattr(cost, "product_rate", lambda compute: 1e5)
    adapt(**options | {"report_images": False})
    log = (options["out"] / "train.log").read_text()
    assert "adapt: 24 images at " in log and "6 steps of 8 images (2 passes)" in log and "trainable parameters" in log
    line = next(line for line in log.splitlines() if "WARNING time: roughly" in line)
    assert " h on this CPU; less: --model demo" in line or " d" in line
    assert "--lora-blocks 3" in line and "embed --fit-whitening" in line


def test_a_short_run_is_not_warned_of_nor_measured(options, monkeypatch):
    monkeypatch.setattr(cost, "product_rate", lambda compute: pytest.fail("measured"))
    adapt(**options | {"report_images": False, "steps": 1})
    assert "roughly" not in (options["out"] / "train.log").read_text()
