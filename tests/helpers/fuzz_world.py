"""Inputs of the fuzz of the command line: a few good ones, and as many odd ones of each kind."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import timm
import torch
from photos import blurred_noise, save_photos
from safetensors.torch import load_file, save_file
from vit_models import saved

import upstep_fast

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5)
DEEP = "[" * 100_000
SHORT = dict(steps=2, batch_size=8, prototypes=8, head_hidden=32, head_dim=16, lora_r=2, num_workers=0, gate="none")


def build(world: Path) -> None:
    """Fill the folder `world`: good/ and odd/, each with models, adapters, data, runs and files."""
    good, odd = world / "good", world / "odd"
    for folder in (good, odd):
        folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = saved(timm.create_model("vit_tiny_patch16_224", **SMALL), good / "model", SMALL)
    (good / "photos").mkdir()
    save_photos(good / "photos", 10)
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("test", 3)):
        for name, tint in (("red", (1.0, 0.0, 0.0)), ("blue", (0.0, 0.0, 1.0))):
            (good / "labeled" / split / name).mkdir(parents=True)
            for i in range(count):
                blurred_noise(generator, 40, tint).save(good / "labeled" / split / name / f"{i}.png")
    with tarfile.open(good / "photos.tar", "w") as tar:
        tar.add(good / "photos", arcname="photos")
    (good / "list.txt").write_text("".join(f"photos/{i:02}.png\n" for i in range(10)))
    run = SHORT | dict(device="cpu", precision="fp32", memory_check=False, report_images=False)
    upstep_fast.adapt(model=model, data=good / "photos", out=good / "run", **run)
    shutil.copytree(good / "run" / "adapter", good / "adapter")
    upstep_fast.embed(
        model=model, data=good / "photos", out=good / "f.npy", fit_whitening=good / "whitening.safetensors",
        device="cpu", precision="fp32", num_workers=0,
    )  # fmt: skip
    upstep_fast.finetune(
        model=model, data=good / "labeled", out=good / "tuned", epochs=1, batch_size=8, losa_rank=2, num_workers=0,
        device="cpu", precision="fp32",
    )  # fmt: skip
    shutil.copytree(good / "tuned" / "model", good / "classifier")
    odd_files(odd)
    odd_folders(good, odd)
    odd_contents(good, odd)


def odd_files(odd: Path) -> None:
    """Write single files that are no good to anyone."""
    (odd / "empty").touch()
    (odd / "text.txt").write_text("no such file\n\x1b]0;title\x07\n")
    (odd / "text.toml").write_text("steps: 3\n")
    (odd / "deep.json").write_text(DEEP)
    (odd / "deep.toml").write_text(f"a = {DEEP}")
    (odd / "huge.toml").write_text(f"steps = 0x{'F' * 5000}\nlr = 1e999\n")
    (odd / "types.toml").write_text('steps = [1, 2]\nmodel = 3\ndata = "x"\nlr = 1979-05-27\n[gate]\nrate = {a = 1}\n')
    (odd / "keys.toml").write_text('"\\u001b[2J\\n" = 1\n')
    save_file({"mean": torch.full((48,), torch.nan), "x": torch.zeros(0)}, odd / "nan.safetensors")
    png = io.BytesIO()
    blurred_noise(torch.Generator().manual_seed(1), 40).save(png, "PNG")
    (odd / "cut.png").write_bytes(png.getvalue()[:400])
    (odd / "cut.tar").write_bytes(b"\x1b" * 700)
    (odd / "pickle.pth").write_bytes(b"\x80\x02}q\x00.")
    os.mkfifo(odd / "pipe")
    (odd / "loop").symlink_to("loop")
    (odd / "zero").symlink_to("/dev/zero")
    (odd / "nothing").symlink_to("gone")
    with open(odd / "sparse.safetensors", "wb") as file:
        file.truncate(1 << 40)
    (odd / "list.txt").write_text("gone.png\n/dev/zero\n../odd/pipe\n\x1b[2J\n")
    (odd / "list.csv").write_text("id,image\n0,=1+1\n")


def odd_folders(good: Path, odd: Path) -> None:
    """Write models, adapters, runs and data with one odd part each."""
    (odd / "folder").mkdir()
    data = odd / "data"
    data.mkdir()
    for name in ("a\nb.png", "\x1b[2J.png", os.fsdecode(b"\xff\xfe.png"), "=1+1.png", "n" * 240 + ".png"):
        shutil.copy(good / "photos" / "00.png", data / name)
    shutil.copy(odd / "cut.png", data)
    os.mkfifo(data / "pipe.png")
    (data / "loop").symlink_to(".")
    (data / "zero.png").symlink_to("/dev/zero")
    for folder, files in (
        ("model", ("config.json", "model.safetensors")),
        ("adapter", ("adapter_config.json", "adapter_model.safetensors")),
        ("classifier", ("config.json", "trained.safetensors", "learned.safetensors")),
        ("run", ("config.toml", "metrics.jsonl", "train.log", "skipped.csv")),
    ):
        for file in files:
            for kind in ("empty", "deep.json", "pipe", "zero", "loop", "text.txt", "sparse.safetensors", None):
                copy = odd / f"{folder}-{file}-{kind}"
                shutil.copytree(good / folder, copy, ignore=shutil.ignore_patterns("checkpoints"))
                (copy / file).unlink()
                if kind:
                    (copy / file).symlink_to(odd / kind)
    for folder, file in (("model", "model.safetensors"), ("adapter", "adapter_model.safetensors")):
        copy = odd / f"{folder}-nan"
        shutil.copytree(good / folder, copy)
        tensors = load_file(copy / file)
        save_file({name: torch.full_like(value, torch.nan) for name, value in tensors.items()}, copy / file)
    for number, (folder, file, changes) in enumerate(ODD_JSON):
        copy = odd / f"{folder}-json-{number}"
        shutil.copytree(good / folder, copy)
        content = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps(content | changes))


def odd_contents(good: Path, odd: Path) -> None:
    """Write files of the right format whose contents are odd."""
    whitening = load_file(good / "whitening.safetensors")
    for name, value in whitening.items():
        for kind, other in (
            ("nan", value * torch.nan),
            ("int", value.int()),
            ("short", value.flatten()[:1]),
            ("none", None),
        ):
            changed = whitening | {name: other}
            save_file({key: v for key, v in changed.items() if v is not None}, odd / f"whitening-{name}-{kind}")
    with tarfile.open(odd / "data.tar", "w") as tar:
        for name, kind in (("../up.png", tarfile.REGTYPE), ("/dev/zero", tarfile.CHRTYPE), ("l.png", tarfile.SYMTYPE),
                           ("\x1b[2J\n.png", tarfile.REGTYPE), ("d.png", tarfile.DIRTYPE)):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    for name, text in (
        ("csv", "path,label\n../good/photos/00.png,a\n../good/photos/01.png,\n"),
        ("txt", "../good/photos/00.png 0\n../good/photos/01.png 1\n"),
        ("tsv", "path\tlabel\n../good/photos/00.png\t=1+1\n../good/photos/01.png\t\x1b[2J\n"),
    ):
        (odd / f"data-list.{name}").write_text(text)
    for name, value in (
        ("nested", {"a": {"b": [1, 2]}, "state_dict": {"x": 3}}),
        ("numbers", {str(i): float(i) for i in range(5)}),
        ("names", {"\x1b[2J": torch.zeros(3), "blocks.0.attn.qkv.weight": torch.zeros(2, 2)}),
        ("list", [torch.zeros(2)]),
    ):
        torch.save(value, odd / f"checkpoint-{name}.pth")


ODD_JSON = [
    ("model", "config.json", {"architecture": "\x1b[2J"}),
    ("model", "config.json", {"architecture": 7}),
    ("model", "config.json", {"model_args": {"depth": 10**7}}),
    ("model", "config.json", {"model_args": {"img_size": 0}}),
    ("model", "config.json", {"model_args": 3}),
    ("model", "config.json", {"pretrained_cfg": {"mean": [1e308, 0, 0], "std": [0, 0, 0]}}),
    ("model", "config.json", {"pretrained_cfg": {"crop_pct": "x", "interpolation": "\n", "input_size": [3]}}),
    ("adapter", "adapter_config.json", {"r": 0}),
    ("adapter", "adapter_config.json", {"r": "8"}),
    ("adapter", "adapter_config.json", {"lora_alpha": None}),
    ("adapter", "adapter_config.json", {"lora_alpha": 1e300}),
    ("adapter", "adapter_config.json", {"alpha_pattern": ["x"]}),
    ("adapter", "adapter_config.json", {"alpha_pattern": {"(((((": 3}}),
    ("adapter", "adapter_config.json", {"target_modules": "\x1b[2J"}),
    ("adapter", "adapter_config.json", {"target_modules": 5}),
    ("adapter", "adapter_config.json", {"modules_to_save": 5}),
    ("adapter", "adapter_config.json", {"peft_type": {}}),
    ("classifier", "config.json", {"classes": ["\x1b[2J", "=1+1"]}),
    ("classifier", "config.json", {"classes": 3}),
    ("classifier", "config.json", {"learned_sha256": [1]}),
    ("classifier", "config.json", {"backbone": {"model": 7}}),
    ("classifier", "config.json", {"backbone": {"model": "\x1b[2J", "img_size": "x"}}),
    ("classifier", "config.json", {"settings": {"method": "losa", "lora_targets": 5}}),
    ("classifier", "config.json", {"settings": []}),
    ("classifier", "config.json", {"has_adapter": True}),
]
