"""adapt --from: a run starts at an earlier adapter, as the files say it; --resume with more steps goes on."""

import json
import shutil

import pytest
import torch

import upstep_fast
from upstep_fast.cli.commands import main
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.files import from_options
from upstep_fast.errors import ConfigError
from upstep_fast.model import adapter_base, lora, peft_format
from upstep_fast.model.adapter_start import start_from
from upstep_fast.model.backbone import load
from upstep_fast.model.pooling import features


@pytest.fixture(scope="module")
def first(short_run, model, photos, tmp_path_factory):
    """A run at half strength, of another rank and other targets than the default."""
    out = tmp_path_factory.mktemp("first") / "adapted"
    own = {"steps": 2, "lr": 0.1, "lora_r": 3, "lora_targets": ("q", "v", "fc1"), "strength": 0.5, "img_size": 48}
    upstep_fast.adapt(model, photos, out, **short_run | own | {"report_images": False})
    return out


@pytest.mark.parametrize("alpha", [3.0, 1.0])
def test_the_start_is_the_model_that_the_files_describe(first, model, alpha):
    vit = load(model, img_size=48).vit
    record = adapter_base.record(vit)
    adapters = lora.inject(vit, lora.LoraSpec(r=3, alpha=alpha, targets=("q", "v", "fc1")))
    start_from(adapters, first / "adapter", base_record=record, model=model)
    images = torch.rand(2, 3, 48, 48)
    expected = features(upstep_fast.load_adapted(first), images)
    torch.testing.assert_close(features(vit, images), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(features(load(model, img_size=48).vit, images), expected, atol=1e-3)


def test_a_run_starts_there_with_the_model_and_lora_of_the_run(first, photos, short_run, tmp_path):
    flags = {name: value for name, value in short_run.items() if not name.startswith("lora")}
    options = {"from_": first, "data": photos, "report_images": False, **flags}
    # at a learning rate of almost 0 the adapter stays where it starts
    result = upstep_fast.adapt(None, out=tmp_path / "second", **options | {"steps": 2, "lr": 1e-12})
    images = torch.rand(2, 3, 48, 48)
    ours, theirs = (features(upstep_fast.load_adapted(out), images) for out in (result.adapter, first))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    assert config["rank_pattern"] or config["r"] == 6
    # the run continues without the folder that it started from
    again = {name: value for name, value in options.items() if name != "from_"} | {"steps": 2, "lr": 1e-12}
    shutil.copytree(first, tmp_path / "gone")
    upstep_fast.adapt(tmp_path / "gone", out=tmp_path / "third", **again)  # the folder in place of the model
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(SystemExit) as stop:
        main(["adapt", "--config", str(tmp_path / "third" / "config.toml"), "--resume"])
    assert stop.value.code == 0


def test_flags_override_the_run(first, photos):
    config = from_options(
        AdaptConfig, {"from_": first, "data": photos, "out": "x", "lora_r": 5, "img_size": 64}, "adapt"
    )
    assert config.lora.r == 5 and config.model.img_size == 64 and config.lora.targets == ("q", "v", "fc1")
    assert config.lora.start == str(first / "adapter")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"lora_r": 5}, "from: A and B of .* are .*give --lora-r"),
        ({"lora_targets": ("q",)}, "from: the adapter in .* is on other modules"),
        ({"method": "explora"}, "from: belongs to --method upstep"),
        ({"tune": "full"}, "from: needs --tune lora"),
        ({"model": "local-dir:OTHER"}, "was trained on another base model"),
        ({"from_": "/nowhere"}, "from: no folder at /nowhere"),
    ],
)
def test_what_does_not_fit_is_refused(first, model, photos, short_run, tmp_path, change, wanted):
    if "model" in change:
        folder = shutil.copytree(model.removeprefix("local-dir:"), tmp_path / "other")
        from safetensors.torch import load_file, save_file

        state = load_file(folder / "model.safetensors")
        state["blocks.0.mlp.fc1.bias"] += 1
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        change = {"model": f"local-dir:{folder}"}
    options = {"from_": first, "data": photos, **{k: v for k, v in short_run.items() if not k.startswith("lora")}}
    options["model"] = None
    if change.get("method") == "explora":
        options = {name: options[name] for name in ("model", "from_", "data", "steps")}
    with pytest.raises(ConfigError, match=wanted):
        upstep_fast.adapt(out=tmp_path / "out", **options | change)
    assert not (tmp_path / "out").exists()


def test_mixed_parts_and_full_weights_are_refused(first, model, tmp_path):
    vit = load(model, img_size=48).vit
    record = adapter_base.record(vit)
    fresh = lora.inject(vit, lora.LoraSpec(r=3, alpha=3.0, targets=("q", "v", "fc1")))
    loaded = upstep_fast.load_adapted(first, merged=False)
    adapters = lora.find(loaded)
    first_name = next(name for name in adapters if "qkv" in name)
    with torch.no_grad():
        adapters[first_name].lora_b.fill_(0.1)
    peft_format.save_adapter(tmp_path / "mixed", adapters, model)
    with pytest.raises(ConfigError, match="mixes q, k and v"):
        start_from(fresh, tmp_path / "mixed", base_record=record, model=model)
    files = peft_format.adapter_files(adapters, model, fully_trained={"norm.weight": torch.ones(48)})
    peft_format.write_files(tmp_path / "more", files)
    with pytest.raises(ConfigError, match="holds more than LoRA"):
        start_from(fresh, tmp_path / "more", base_record=record, model=model)


def test_a_finished_run_goes_on_with_more_steps(first, tmp_path, capsys):
    out = shutil.copytree(first, tmp_path / "out")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["adapt", "--config", str(first / "config.toml"), "--resume", "--steps", "5", "--out", str(out)])
    shown = capsys.readouterr()
    assert stop.value.code == 0 and "(5 steps" in shown.out
    assert "steps: 5 instead of 2: from step 2 on, learning rate and all else" in shown.err
