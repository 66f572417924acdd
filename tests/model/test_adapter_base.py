"""An adapter belongs to its base model: another one, or one with the adapter merged, is refused; --any-base insists."""

import json

import peft
import peft_cases
import pytest
import timm
import torch
from peft_cases import IMAGES, Case
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import upstep_fast
from upstep_fast.cli.commands import main
from upstep_fast.errors import CheckFailedError, ConfigError
from upstep_fast.model import adapter_base, lora, model_card, peft_config, peft_format
from upstep_fast.model.backbone import load
from upstep_fast.model.export.export import export
from upstep_fast.model.pooling import features

OTHER = "was trained on another base model"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return peft_cases.base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    vit = load(base).vit
    record = adapter_base.record(vit)
    adapters = lora.inject(vit, lora.LoraSpec(r=3, alpha=5.0, targets=("q", "v")))
    for part in adapters.values():
        torch.nn.init.normal_(part.lora_b, std=0.1)
    folder = tmp_path_factory.mktemp("adapter")
    peft_format.write_files(folder, peft_format.adapter_files(adapters, base, base_record=record))
    return folder


def changed(base, folder, change):
    """Write the toy model to `folder` with other weights."""
    vit = peft_cases.fresh(base)
    change(vit)
    timm.models.save_for_hf(vit, folder, model_args=peft_cases.MODEL, safe_serialization=True)
    return f"local-dir:{folder}"


def double_one_bias(vit):
    vit.blocks[1].mlp.fc2.bias.data[0] = 2.0


def test_another_base_model_is_refused_unless_asked_for(base, adapter, tmp_path):
    other = changed(base, tmp_path, double_one_bias)
    with pytest.raises(ConfigError, match=f"{OTHER} .*its weights are not the same.*--any-base"):
        upstep_fast.load_adapted(other, adapter)
    ours = features(upstep_fast.load_adapted(other, adapter, any_base=True), IMAGES)
    torch.testing.assert_close(ours, peft_cases.by_peft(other, adapter), rtol=0, atol=1e-5)


def test_the_same_weights_with_other_settings_are_refused(base, adapter, tmp_path):
    vit = peft_cases.fresh(base)
    timm.models.save_for_hf(vit, tmp_path, model_args=peft_cases.MODEL | {"num_heads": 4}, safe_serialization=True)
    with pytest.raises(ConfigError, match=rf"{OTHER}.*num_heads was 3, is 4"):
        upstep_fast.load_adapted(f"local-dir:{tmp_path}", adapter)


def test_its_own_merged_export_is_refused(base, adapter, tmp_path):
    export(base, tmp_path / "merged", adapter=adapter, format="timm")
    with pytest.raises(ConfigError, match=OTHER):
        upstep_fast.load_adapted(f"local-dir:{tmp_path / 'merged'}", adapter)


@pytest.mark.parametrize("options", [{"img_size": 48}, {"in_chans": 1}, {}])
def test_the_size_of_the_input_does_not_matter(base, adapter, options):
    upstep_fast.load_adapted(base, adapter, **options)


def test_the_base_model_under_another_name_is_accepted(base, adapter, tmp_path):
    def change_head(vit):
        vit.head.weight.data.zero_()
        vit.pos_embed.data.zero_()

    upstep_fast.load_adapted(changed(base, tmp_path, change_head), adapter)


def test_peft_reads_an_adapter_with_a_record_without_a_warning(base, adapter, recwarn):
    peft.PeftModel.from_pretrained(peft_cases.fresh(base), str(adapter))
    assert not [w for w in recwarn if "adapter" in str(w.message) or "keyword" in str(w.message)]


def test_a_damaged_record_is_refused(base, adapter, tmp_path):
    for record in ("", "[]", "{}", "[" * 100_000, '{"sha256": 5}'):
        folder = tmp_path / str(len(record))
        peft_format.write_files(folder, peft_format.read_files(adapter))
        tensors = load_file(folder / peft_format.WEIGHTS)
        save_file(tensors, folder / peft_format.WEIGHTS, metadata={"upstep_fast.base": record})
        with pytest.raises(ConfigError, match="damaged record"):
            upstep_fast.load_adapted(base, folder)


def test_an_exported_adapter_has_the_record(base, adapter, tmp_path):
    export(base, tmp_path / "peft", adapter=adapter, format="peft")
    with safe_open(tmp_path / "peft" / peft_format.WEIGHTS, "pt") as file:
        assert file.metadata()["upstep_fast.base"] == adapter_base.record(load(base).vit)


NAMES = [
    ("timm/vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224.augreg2_in21k_ft_in1k", True),
    ("vit_base_patch16_224", "vit_small_patch16_224", True),
    ("vit_base_patch16_224", "vit_base_patch16_224.augreg2_in21k_ft_in1k", False),  # the default tag
    ("hf-hub:timm/vit_base_patch16_224.dino", "vit_base_patch16_224.dino", False),
    ("local-dir:somewhere", "vit_base_patch16_224.dino", False),
    ("facebook/dinov2-base", "vit_base_patch14_dinov2", False),
    (None, "vit_base_patch16_224.dino", False),
    ("", "vit_base_patch16_224.dino", False),
    ("vit_base_patch16_224.dino", "local-dir:somewhere", False),
]


@pytest.mark.parametrize(("made_for", "given", "is_refused"), NAMES)
def test_without_a_record_timm_names_are_compared(base, tmp_path, made_for, given, is_refused):
    peft_cases.make(Case("", True), base, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": made_for}))
    vit = load(base).vit
    if not is_refused:
        peft_format.attach(vit, tmp_path, model=given)
        return
    with pytest.raises(ConfigError, match=OTHER):
        peft_format.attach(vit, tmp_path, model=given)
    peft_format.attach(vit, tmp_path, model=given, any_base=True)


@pytest.fixture
def labeled(tmp_path):
    for index in range(12):
        place = tmp_path / "data" / ("train", "test")[index % 2] / "ab"[index // 2 % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 255, (32, 32, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(place / f"{index}.png")
    return tmp_path / "data"


COMMANDS = {
    "embed": "--data DATA --out OUT.npy",
    "eval": "--data DATA",
    "export": "--out OUT --format timm",
    "finetune": "--data DATA --out OUT --method linear --epochs 1 --preset-views none",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_with_an_adapter_compares_its_base(base, adapter, labeled, tmp_path, capsys, command):
    other = changed(base, tmp_path / "other", double_one_bias)
    arguments = COMMANDS[command].replace("DATA", str(labeled)).replace("OUT", str(tmp_path / "out")).split()
    arguments = [command, "--model", other, "--adapter", str(adapter), *arguments]
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2 and OTHER in capsys.readouterr().err
    with pytest.raises(SystemExit) as accepted:
        main([*arguments, "--any-base"])
    assert accepted.value.code == 0
    if command == "finetune":
        upstep_fast.load_finetuned(tmp_path / "out" / "model")
    if command == "export":
        card = (tmp_path / "out" / "README.md").read_text()
        assert json.loads(adapter_base.record(load(other).vit))["sha256"] in card
        assert peft_format.fingerprint(adapter) in card


def test_finetune_copies_the_adapter_and_nothing_beside_it(base, adapter, labeled, tmp_path):
    """Who publishes OUT/model must not publish what a stranger's folder links to."""
    folder, secret = tmp_path / "linked", tmp_path / "secret"
    folder.mkdir()
    secret.write_text("secret")
    for path in adapter.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / model_card.NAME).unlink(missing_ok=True)
    for name in ("notes", model_card.NAME):
        (folder / name).symlink_to(secret)
    (folder / "state.safetensors").write_bytes(b"x")
    (folder / "more").mkdir()
    result = upstep_fast.finetune(base, labeled, tmp_path / "out", adapter=folder, method="linear", epochs=1)
    copied = result.model / "adapter"
    assert {path.name for path in copied.iterdir()} == {
        peft_format.CONFIG,
        peft_format.WEIGHTS,
        model_card.NAME,
    }
    assert not any(path.is_symlink() for path in copied.iterdir())
    assert peft_format.fingerprint(copied) == peft_format.fingerprint(adapter)
    assert "secret" not in (copied / model_card.NAME).read_text()


def test_the_export_compares_its_reading_of_the_adapter_with_peft(base, adapter, tmp_path, monkeypatch):
    """An error of the reading must not certify itself."""
    monkeypatch.setattr(peft_config.AdapterConfig, "scale", lambda self, name: 0.5)
    with pytest.raises(CheckFailedError, match="in PEFT differ by"):
        export(base, tmp_path / "out", adapter=adapter, format="timm")
    assert not (tmp_path / "out").exists()


READ = [
    case for case in peft_cases.CASES if case.is_read and case.name.split()[-1] in ("pissa", "olora", "norm", "alpha")
]


@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
def test_an_export_of_an_adapter_by_peft_has_its_features(base, tmp_path, case):
    peft_cases.make(case, base, tmp_path / "adapter")
    assert export(base, tmp_path / "peft", adapter=tmp_path / "adapter", format="peft").difference <= 1e-5
    expected = peft_cases.by_peft(base, tmp_path / "adapter")
    torch.testing.assert_close(peft_cases.by_peft(base, tmp_path / "peft"), expected, rtol=0, atol=1e-5)
