"""Adapters and exports have a card that the Hugging Face Hub reads, and are readable as umask says."""

import os
import shutil
import signal
import sys

import pytest
from huggingface_hub import ModelCard

import upstep_fast
from upstep_fast.errors import Interrupted
from upstep_fast.methods.upstep.upstep import UpStep
from upstep_fast.model import model_card
from upstep_fast.model.export.export import export

VIT = "vit_base_patch16_224"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (VIT, f"timm/{VIT}.augreg2_in21k_ft_in1k"),
        (f"{VIT}.dino", f"timm/{VIT}.dino"),
        ("hf-hub:facebook/dinov2-base@main", "facebook/dinov2-base"),
        ("local-dir:/models/vit", None),
        ("facebook/dinov2-small", "facebook/dinov2-small"),
        ("dinov2_vits14", "timm/vit_small_patch14_dinov2.lvd142m"),
        ("weights.pth", None),
        ("demo", None),
    ],
)
def test_base_models_are_ids_of_the_hub(name, expected):
    assert model_card.hub_id(name) == expected
    card = ModelCard(
        model_card.adapter_card(name, images=1234, steps=10, verdicts=["label-free: better | more"]).decode()
    )
    assert card.data.base_model == expected and card.data.library_name == "peft" and "lora" in card.data.tags
    assert "| images | 1,234, without labels |" in card.text and "better \\| more" in card.text
    # timm reads no repository of transformers
    assert ("timm.create_model" in card.text) == (expected is not None and expected.startswith("timm/"))


def test_control_characters_and_tables_do_not_leave_their_place():
    card = model_card.adapter_card("local-dir:a\n---\n`x`", images=1, steps=1, verdicts=["a\nb"]).decode()
    assert ModelCard(card).data.base_model is None and "\n| verdict | a\\nb |" in card and "\n---\n`x" not in card


def test_a_run_and_its_exports_have_cards_that_umask_lets_others_read(options, tmp_path):
    before = os.umask(0o022)
    try:
        result = upstep_fast.adapt(**options | {"steps": 2, "report_images": False})
        for kind in ("timm", "peft"):
            export(str(options["out"]), tmp_path / kind, format=kind)
    finally:
        os.umask(before)
    card = ModelCard.load(result.adapter / "README.md")
    assert card.data.library_name == "peft" and "| images | " in card.text and "| steps | 2 |" in card.text
    if result.verdict is not None:
        assert result.verdict.text in card.text
    for kind in ("timm", "peft"):
        exported = ModelCard.load(tmp_path / kind / "README.md")
        assert exported.data.library_name == kind and "largest difference of a feature" in exported.text
    files = [path for path in [*options["out"].rglob("*"), *tmp_path.rglob("*")] if path.is_file()]
    closed = [str(path) for path in files if path.stat().st_mode & 0o777 != 0o644]
    assert len(files) > 10 and not closed, closed


def test_an_interrupted_run_says_so(options, monkeypatch):
    real, count = UpStep.update_running_stats, iter(range(9))

    def stop(self, embedded):
        if next(count) == 1:
            signal.raise_signal(signal.SIGTERM)
        real(self, embedded)

    monkeypatch.setattr(UpStep, "update_running_stats", stop)
    with pytest.raises(Interrupted):
        upstep_fast.adapt(**options | {"steps": 4, "gate": "none"})
    card = (options["out"] / "adapter" / "README.md").read_text()
    assert "| steps | 2 |" in card and "| verdict | none: the run was interrupted at step 2 of 4 |" in card
    monkeypatch.undo()
    upstep_fast.adapt(**options | {"steps": 4, "gate": "none", "report_images": False}, resume=True)
    card = (options["out"] / "adapter" / "README.md").read_text()
    assert "| steps | 4 |" in card and "interrupted" not in card


@pytest.mark.parametrize("has_card", [True, False])
def test_the_adapter_of_a_classifier_has_its_card(options, photos, tmp_path, has_card):
    result = upstep_fast.adapt(**options | {"steps": 2, "report_images": False})
    card, labeled = result.adapter / "README.md", tmp_path / "labeled"
    for i, path in enumerate(sorted(photos.iterdir())):
        place = labeled / ("train" if i < 16 else "test") / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    before = card.read_text()
    if not has_card:
        card.unlink()
    more = dict(method="linear", epochs=1, batch_size=8, device="cpu", precision="fp32", num_workers=0)
    done = upstep_fast.finetune(options["model"], labeled, tmp_path / "tuned", adapter=result.adapter, **more)
    written = (done.model / "adapter" / "README.md").read_text()
    assert written == before if has_card else "the adapter had no card" in written and options["model"] in written


def test_without_huggingface_hub_the_card_is_text(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert model_card.with_front_matter("text", base_model=VIT, library="peft") == "text"
