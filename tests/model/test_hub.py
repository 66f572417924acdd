"""Adapters are pushed to the hub without anything private, and loaded from there, over a local server."""

import json
import shutil

import numpy as np
import peft
import pytest
import timm
import torch
from fake_hub import OWNER, TOKEN, fake_hub, hub_client
from huggingface_hub import ModelCard

import upstep_fast
from upstep_fast.cli import main
from upstep_fast.config.tools import PushConfig
from upstep_fast.errors import ConfigError, RunFailedError
from upstep_fast.model import hub as hubs

VIT = "vit_base_patch16_224"


@pytest.fixture(scope="module")
def run_folder(model, photos, short_run, tmp_path_factory):
    """A run of adapt on a folder with a private name."""
    data = tmp_path_factory.mktemp("secret-data") / "patients"
    shutil.copytree(photos, data)
    out = tmp_path_factory.mktemp("runs") / "adapted"
    upstep_fast.adapt(model, data, out, **short_run | {"steps": 2, "report_images": False})
    return out


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with fake_hub() as server, hub_client(server, tmp_path / "cache", monkeypatch):
        yield server


def push(*args):
    with pytest.raises(SystemExit) as stop:
        main(["push", *map(str, args)])
    return stop.value.code


def test_only_the_adapter_and_its_card_are_pushed(hub, run_folder, photos, capsys):
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    assert push(run_folder, f"{OWNER}/adapted", "--private") == 0
    assert capsys.readouterr().out == f"pushed: {hub.url}/{OWNER}/adapted\n"
    repository = hub.repositories[f"{OWNER}/adapted"]
    assert repository.private
    assert sorted(repository.files) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    private = ["secret-data", "patients", str(run_folder.parent), *(path.name for path in photos.iterdir())]
    config = json.loads((run_folder / "adapter" / "adapter_config.json").read_text())
    private.append(str(config["base_model_name_or_path"]).removeprefix("local-dir:"))
    for name, content in repository.files.items():
        assert not [word for word in private if word.encode() in content], name
    assert before == {path: path.read_bytes() for path in before}


def test_a_card_that_is_a_link_is_not_pushed(run_folder, tmp_path):
    """A link in a stranger's folder may name any file of the user."""
    folder, secret = tmp_path / "adapter", tmp_path / "secret"
    shutil.copytree(run_folder / "adapter", folder)
    secret.write_text("secret")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(secret)
    card = hubs.files_to_push(folder)["README.md"]
    assert b"secret" not in card and b"image-feature-extraction" in card


def test_the_card_names_task_library_tags_images_and_verdict(hub, run_folder):
    push(run_folder / "adapter", "adapted")
    card = ModelCard(hub.repositories[f"{OWNER}/adapted"].files["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "image-feature-extraction")
    assert {"upstep", "lora"} <= set(card.data.tags) and "| images | " in card.text and "| steps | 2 |" in card.text
    assert f'load_adapted("hf-hub:{OWNER}/adapted")' in card.text


def test_an_adapter_from_the_hub_is_the_one_that_was_pushed(hub, run_folder, model, photos, tmp_path):
    push(run_folder, "adapted")
    name = f"hf-hub:{OWNER}/adapted"
    expected = upstep_fast.load(run_folder, device="cpu").embed(photos)
    loaded = upstep_fast.load(name, model=model, device="cpu").embed(photos)
    np.testing.assert_allclose(loaded, expected, atol=1e-6)
    for file, content in hub.repositories[f"{OWNER}/adapted"].files.items():
        (tmp_path / file).write_bytes(content)
    vit = timm.create_model(model, pretrained=True)
    by_peft = peft.PeftModel.from_pretrained(vit, tmp_path).merge_and_unload().eval()
    ours = upstep_fast.load_adapted(model, name)
    images = torch.randn(2, 3, *ours.patch_embed.img_size)
    with torch.no_grad():
        torch.testing.assert_close(by_peft(images), ours(images), atol=1e-4, rtol=1e-4)


def test_an_adapter_that_is_not_there_is_one_line(hub, tmp_path):
    with pytest.raises(ConfigError, match=r"adapter: cannot fetch hf-hub:someone/nothing: .*; check the name"):
        upstep_fast.load_adapted("hf-hub:someone/nothing")


def message(*args):
    with pytest.raises((ConfigError, RunFailedError)) as caught:
        hubs.push(PushConfig(*map(str, args[:2]), **dict.fromkeys(args[2:], True)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_pushed_is_one_line(hub, run_folder, tmp_path, monkeypatch):
    assert "run: no folder at" in message(tmp_path / "nothing", "a/b")
    assert "write OWNER/NAME" in message(run_folder, "a/b/c") and "write OWNER/NAME" in message(run_folder, "a b")
    push(run_folder, "open")
    assert "open exists and is public" in message(run_folder, "open", "private")
    hub.status = 403
    assert "the Hugging Face Hub refused a/b: " in message(run_folder, "a/b")
    monkeypatch.setenv("HF_TOKEN", TOKEN[:-1])
    hub.status = None
    assert "the Hugging Face Hub refused a/b: " in message(run_folder, "a/b")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert message(run_folder, "a/b") == (
        "push: no token of the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN"
    )


def test_a_hub_out_of_reach_is_one_line(hub, run_folder, monkeypatch):
    monkeypatch.setattr("upstep_fast.network._checked", (float("inf"), "no route"))
    assert message(run_folder, "a/b") == "push: the Hugging Face Hub does not answer (no route); try again later"


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("local-dir:/home/me/vit", "vit"),
        ("/home/me/secret/vit.safetensors", "vit.safetensors"),
        ("local-dir:C:\\Users\\me\\vit\\", "vit"),
        ("weights/vit.pth", "vit.pth"),
        ("local-dir:/", "base model"),
        ("demo", "demo"),
        (VIT, VIT),
        ("dinov2_vits14", "dinov2_vits14"),
        ("facebook/dinov2-small", "facebook/dinov2-small"),
        ("hf-hub:me/vit", "hf-hub:me/vit"),
    ],
)
def test_names_of_base_models_lose_their_folders(name, public):
    assert hubs.public_name(name) == public
