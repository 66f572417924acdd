"""What a run takes, said before it starts."""

import re
import shutil

import pytest
import torch
from adapt_configs import upstep_config
from torch.utils.flop_counter import FlopCounterMode

from upstep_fast import adapt, embed, evaluate, finetune
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.flat import from_flat
from upstep_fast.model import backbone as backbones
from upstep_fast.runtime import duration
from upstep_fast.train import cost


@pytest.mark.parametrize(("blocks", "factor"), [(None, 2.0), (1, 1.5)])
def test_flops_of_a_step(model, blocks, factor):
    """Against PyTorch's counter: a forward pass of both views, and a backward pass that costs as much per block."""
    backbone = backbones.load(model)
    assert len(backbone.blocks) == 2
    config = upstep_config(model=model, data=("x",), out="y", batch_size=5, lora_blocks=blocks)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.vit.forward_features(torch.zeros(10, 3, *backbone.img_size))
    weights = sum(p.numel() for p in backbone.vit.parameters())
    assert cost.step_flops(config, backbone, weights) == pytest.approx(factor * counter.get_total_flops(), rel=0.25)


@pytest.mark.parametrize(("tune", "adapted"), [("lora", 3), ("full", 9)])
def test_backward_runs_through_the_blocks_that_train(tune, adapted):
    """In the default recipe: the last third of them, but all with --tune full."""
    assert from_flat(AdaptConfig, model="m", data=("d",), out="o", tune=tune).num_adapted(9) == adapted


def test_a_run_says_what_it_takes(options, monkeypatch, caplog):
    caplog.set_level("INFO", "upstep_fast")
    monkeypatch.setattr(duration, "MIN_FLOPS", 0.0)
    monkeypatch.setattr(duration, "product_rate", lambda compute: 1e5)
    adapt(**options | {"report_images": False})
    log = (options["out"] / "train.log").read_text()
    assert "adapt: 24 images at " in log and "6 steps of 8 images (2 passes)" in log and "trainable parameters" in log
    line = next(line for line in log.splitlines() if "WARNING time: roughly" in line)
    assert " h on this CPU; less: --model demo" in line or " d" in line
    assert "--lora-blocks 3" in line and "embed --fit-whitening" in line


@pytest.fixture
def slow_machine(monkeypatch):
    """A machine of 2 MFLOP/s, of which a model reaches half."""
    monkeypatch.setattr(duration, "MIN_FLOPS", 0.0)
    monkeypatch.setattr(duration, "product_rate", lambda compute: 2e6)


def forward_flops(model):
    """FLOPs of a forward pass of one image, by PyTorch's counter."""
    backbone = backbones.load(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.vit.forward_features(torch.zeros(1, 3, *backbone.img_size))
    return counter.get_total_flops()


def stated(caplog):
    """The stated time in seconds."""
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("time: roughly")]
    parts = re.findall(r"(\d+) (d|h|min|s)\b", line.partition("roughly")[2].partition(" on this CPU")[0])
    return sum(int(value) * {"d": 86400, "h": 3600, "min": 60, "s": 1}[unit] for value, unit in parts)


@pytest.mark.parametrize(("method", "passes"), [("linear", 1), ("lora", 2), ("full", 3)])
def test_finetune_says_how_long_before_its_first_step(model, photos, tmp_path, slow_machine, caplog, method, passes):
    caplog.set_level("INFO", "upstep_fast")
    classes = two_classes(photos, tmp_path / "data")
    finetune(model, classes, tmp_path / "out", method=method, epochs=2, batch_size=8, device="cpu", precision="fp32")
    # 24 images: 4 to test on, 2 of the other 20 to choose the epoch by
    images = 2 * (18 * passes + 2) + 4
    assert stated(caplog) == pytest.approx(images * forward_flops(model) / 1e6, rel=0.25)
    texts = [record.getMessage() for record in caplog.records]
    first = next(i for i, text in enumerate(texts) if text.startswith("epoch 1"))
    assert next(i for i, text in enumerate(texts) if text.startswith("time: ")) < first


def test_eval_and_embed_say_how_long_once(model, photos, tmp_path, slow_machine, caplog):
    caplog.set_level("INFO", "upstep_fast")
    evaluate(model, two_classes(photos, tmp_path / "data"), device="cpu", precision="fp32")
    assert stated(caplog) == pytest.approx(24 * forward_flops(model) / 1e6, rel=0.25)
    caplog.clear()
    embed(model, photos, tmp_path / "f.npy", device="cpu", precision="fp32")
    assert stated(caplog) == pytest.approx(24 * forward_flops(model) / 1e6, rel=0.25)


def two_classes(photos, to):
    for i, path in enumerate(sorted(photos.iterdir())):
        (to / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to / "ab"[i % 2])
    return to


def test_a_short_run_is_not_warned_of_nor_measured(options, monkeypatch):
    monkeypatch.setattr(duration, "product_rate", lambda compute: pytest.fail("measured"))
    adapt(**options | {"report_images": False, "steps": 1})
    assert "roughly" not in (options["out"] / "train.log").read_text()
