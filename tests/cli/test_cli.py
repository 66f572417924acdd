"""What a user meets at the command line: every bad input is one line with its exit code, and nothing is lost."""

import errno
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import load_file

from upstep_fast.cli.commands import COMMANDS, Command, main

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5)
FAST = [
    "--batch-size",
    "8",
    "--prototypes",
    "8",
    "--head-hidden",
    "32",
    "--head-dim",
    "16",
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--num-workers",
    "0",
]


@pytest.fixture
def photos(tmp_path):
    """A labeled folder in eval's layout: two classes of colored noise that are easy to tell apart."""
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for name, color in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(color) + random.normal(0, 40, (36, 44, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return tmp_path / "photos"


def call(capsys, *args):
    """Exit code, stdout and stderr of one command."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def last_line(err):
    lines = err.strip().splitlines()
    assert "Traceback" not in err
    return lines[-1]


def adapt(capsys, model, data, out, *more):
    return call(capsys, "adapt", "--model", model, "--data", data, "--out", out, "--steps", 3, *FAST, *more)


def test_adapt_eval_embed(capsys, model, photos, tmp_path):
    code, out, _ = adapt(capsys, model, photos, tmp_path / "out", "--gate", "none")
    assert code == 0 and "upstep-fast embed" in out
    adapter = tmp_path / "out" / "adapter"
    common = [
        "--model",
        model,
        "--data",
        photos,
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--adapter",
        adapter,
    ]
    code, out, _ = call(capsys, "eval", *common, "--source", photos, "--json", tmp_path / "s.json", "--k", 3)
    scores = json.loads((tmp_path / "s.json").read_text())
    assert code == 0 and scores["n_train"] == 24 and scores["n_test"] == 12 and scores["k"] == 3
    for kind in ("base", "adapted", "ensemble"):
        assert scores[kind].keys() == {"knn", "knn_whitened", "linear", "linear_whitened"} and scores[kind]["knn"] > 90
        # the same images serve as source here, so forgetting is measured by the very same figures
        assert scores["source"][kind] == scores[kind]["knn"]
        assert scores["source_whitened"][kind] == scores[kind]["knn_whitened"]
    assert "knn, whitened" in out
    code, _, _ = call(capsys, "embed", *common, "--out", tmp_path / "f.npy", "--ensemble")
    features = np.load(tmp_path / "f.npy")
    names = (tmp_path / "f.txt").read_text().splitlines()
    assert code == 0 and features.shape == (36, 96) and len(names) == 36
    assert np.linalg.norm(features, axis=1) == pytest.approx(1, abs=1e-5)
    code, _, _ = call(capsys, "embed", *common, "--out", tmp_path / "f.safetensors")
    assert code == 0 and load_file(tmp_path / "f.safetensors")["features"].shape == (36, 48)


def test_eval_without_an_adapter_has_no_adapted_part(capsys, model, photos, tmp_path):
    code, _, _ = call(
        capsys, "eval", "--model", model, "--data", photos, "--json", tmp_path / "s.json", "--device", "cpu"
    )
    assert code == 0
    details = {"intervals", "gains", "probe", "notes"}
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores.keys() == {"base", "n_train", "n_test", "k"} | details
    assert all(scores[name].keys() == {"base"} for name in ("intervals", "gains", "probe"))


def test_adapt_reads_train_only(capsys, model, photos, tmp_path):
    for path in (photos / "test").rglob("*.jpg"):
        path.write_text("broken")
    code, _, _ = adapt(capsys, model, photos, tmp_path / "out", "--max-bad-fraction", 0)
    assert code == 0


def test_a_tar_works_as_a_folder_does(capsys, model, photos, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for split in ("train", "test"):
            tar.add(photos / split, arcname=split)
    code, _, _ = adapt(capsys, model, tmp_path / "photos.tar", tmp_path / "out")
    assert code == 0
    for data in (photos, tmp_path / "photos.tar"):
        call(
            capsys,
            "eval",
            "--model",
            model,
            "--data",
            data,
            "--device",
            "cpu",
            "--json",
            tmp_path / f"{data.name}.json",
        )
    assert (tmp_path / "photos.json").read_text() == (tmp_path / "photos.tar.json").read_text()


def test_a_missing_folder(capsys, model, tmp_path):
    code, _, err = adapt(capsys, model, tmp_path / "nowhere", tmp_path / "out")
    assert code == 3 and "nowhere" in last_line(err) and not (tmp_path / "out").exists()


def test_an_empty_folder(capsys, model, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = adapt(capsys, model, tmp_path / "empty", tmp_path / "out")
    assert code == 3 and "empty" in last_line(err) and not (tmp_path / "out").exists()


def test_no_readable_image(capsys, model, tmp_path):
    (tmp_path / "bad").mkdir()
    for i in range(20):
        (tmp_path / "bad" / f"{i}.jpg").write_text("<html>not found</html>")
    code, _, err = adapt(capsys, model, tmp_path / "bad", tmp_path / "out")
    assert code == 3 and ".jpg" in last_line(err)


def test_a_few_bad_files_are_skipped_and_listed(capsys, model, photos, tmp_path):
    bad = photos / "train" / "red" / "0.jpg"
    bad.write_bytes(bad.read_bytes()[:400])
    code, _, err = adapt(capsys, model, photos, tmp_path / "one", "--steps", 6)
    assert code == 3 and "max-bad-fraction" in last_line(err).replace("_", "-")
    assert "0.jpg" in (tmp_path / "one" / "skipped.csv").read_text()
    code, _, err = adapt(capsys, model, photos, tmp_path / "two", "--steps", 6, "--max-bad-fraction", 0.1)
    listed = (tmp_path / "two" / "skipped.csv").read_text().splitlines()
    assert code == 0 and len(listed) == 2 and "0.jpg" in listed[1]


@pytest.mark.parametrize(
    ("command", "flag"), [("adapt", "out"), ("embed", "out"), ("explore", "device"), ("curate", "out")]
)
def test_an_empty_value_is_refused_before_it_means_the_current_folder(capsys, photos, command, flag):
    code, _, err = call(capsys, command, "--data", photos, f"--{flag}", "")
    assert code == 2 and f"{flag}: got '', must not be empty" in last_line(err)


def test_a_non_empty_out(capsys, model, photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    code, _, err = adapt(capsys, model, photos, tmp_path / "out")
    assert code == 2 and "--overwrite" in last_line(err) and (tmp_path / "out" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("vit_bse_patch16_224", "vit_base_patch16_224"),
        ("resnet50", "ResNet"),
        ("swin_tiny_patch4_window7_224", "swin"),
        ("local-dir:/nowhere", "/nowhere"),
        ("vit_base_patch16_224.nonsense", "augreg"),
    ],
)
def test_an_unknown_or_unsupported_model(capsys, photos, tmp_path, monkeypatch, name, hint):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    real = timm.create_model  # weights cannot be downloaded here, and the refusal must not depend on them
    monkeypatch.setattr(timm, "create_model", lambda n, pretrained=False, **k: real(n, pretrained=False, **k))
    code, _, err = adapt(capsys, name, photos, tmp_path / "out")
    assert code == 2 and hint in err and len(last_line(err)) < 600 and not (tmp_path / "out").exists()


def test_weights_that_cannot_be_had(capsys, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    code, _, err = adapt(capsys, "hf-hub:nobody/nothing", photos, tmp_path / "out")
    assert code == 2 and "local-dir:" in last_line(err)


def test_an_adapter_for_another_model(capsys, model, photos, tmp_path):
    adapt(capsys, model, photos, tmp_path / "out")
    other = tmp_path / "other"
    args = dict(SMALL, embed_dim=96)
    timm.models.save_for_hf(
        timm.create_model("vit_tiny_patch16_224", **args), other, model_args=args, safe_serialization=True
    )
    code, _, err = call(
        capsys,
        "eval",
        "--model",
        f"local-dir:{other}",
        "--data",
        photos,
        "--adapter",
        tmp_path / "out" / "adapter",
    )
    assert code == 2 and "blocks.0.attn.qkv.lora_A is [24, 48], the model wants [24, 96]" in last_line(err)


def test_test_classes_that_train_lacks(capsys, model, photos, tmp_path):
    (photos / "test" / "red").rename(photos / "test" / "green")
    code, _, err = call(capsys, "eval", "--model", model, "--data", photos, "--device", "cpu")
    assert code == 3 and "green" in last_line(err)


def test_eval_without_labels(capsys, model, photos, tmp_path):
    code, _, err = call(capsys, "eval", "--model", model, "--data", photos / "train" / "red", "--device", "cpu")
    assert code == 3 and "test" in last_line(err)


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["adpt"], "did you mean adapt"),
        (["adapt", "--config"], "needs a file"),
        (["adapt", "--config", "/no/such.toml"], "cannot read"),
        (["adapt", "--model", "m", "--data", "d", "--out", "o", "--lr", "-1"], "lr"),
        (
            ["adapt", "--model", "m", "--data", "d", "--out", "o", "--lerning-rate", "1"],
            "unknown option --lerning-rate; did you mean",
        ),
        (["embed", "--model", "m", "--data", "d", "--out", "f.csv"], ".npy"),
        (["adapt", "--model", "m", "--data", "d", "--out", "o", "--device", "tpu"], "device"),
    ],
)
def test_usage_errors(capsys, args, hint):
    code, _, err = call(capsys, *args)
    assert code == 2 and hint in err and "Traceback" not in err


def test_resume(capsys, model, photos, tmp_path):
    for _ in range(2):
        code, out, _ = adapt(capsys, model, photos, tmp_path / "out", "--resume")
        assert code == 0 and "adapter:" in out
    code, _, err = adapt(capsys, model, photos, tmp_path / "out", "--resume", "--lr", "0.5")
    assert code == 2 and "lr was 0.001, is 0.5" in last_line(err) and "--overwrite" in last_line(err)


def test_debug_shows_the_traceback(model, tmp_path):
    from upstep_fast.errors import DataError

    with pytest.raises(DataError):
        main(
            [
                "adapt",
                "--model",
                model,
                "--data",
                str(tmp_path / "none"),
                "--out",
                str(tmp_path / "o"),
                "--debug",
            ]
        )


def test_help_names_every_command(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0 and all(f"  {name} " in out for name in ("adapt", "eval", "embed", "demo"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_loadable_adapter_and_75(model, photos, tmp_path, number):
    command = [
        sys.executable,
        "-m",
        "upstep_fast",
        "adapt",
        "--model",
        model,
        "--data",
        photos,
        "--out",
        tmp_path / "out",
    ]
    # from another folder: the checkout must not be what is imported
    process = subprocess.Popen(
        [*map(str, command), "--steps", "100000", *FAST],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics = Path(tmp_path / "out" / "metrics.jsonl")
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "--resume" in last_line(err)
    import upstep_fast

    upstep_fast.load_adapted(model, tmp_path / "out" / "adapter")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (MemoryError(), 1, "memory: the system has no more for this command; use smaller inputs"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "o"), 2, "out: cannot use o: File name too long; give ano"),
        (OSError(errno.EIO, "Input/output error", "x"), 1, "file: cannot use x: Input/output error; make it"),
        (OSError(errno.EMFILE, "Too many open files"), 1, "export: the system refused: Too many open files; free"),
        (OSError("a reason\nof two lines"), 1, "export: the system refused: a reason; free"),
    ],
)
def test_an_error_of_the_system_is_one_line(capsys, monkeypatch, error, code, line):
    def fail(config):
        raise error

    monkeypatch.setitem(COMMANDS, "export", Command(COMMANDS["export"].config, fail))
    found, _, err = call(capsys, "export", "--model", "m", "--out", "o")
    assert found == code and err.startswith(f"upstep-fast: {line}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--steps", "ten"], "steps: got 'ten', must be an integer"),
        (["--steps"], "steps: got nothing, must be an integer"),
        (["--lr", "1", "2"], "lr: got '1' '2', must be a number"),
        (["--crop-ratio", "1"], "crop_ratio: got '1', must be 2 numbers"),
        (["--img-size", "1", "2", "3"], "img_size: got '1' '2' '3', must be an integer or 2 integers"),
        (["--memory", "much"], "memory: got 'much', must be one of 'fast', 'balanced', 'lean', 'auto'"),
        (["--strength", "x"], "strength: got 'x', must be a number or 'auto'"),
        (["--overwrite", "yes"], "overwrite: takes no value, got 'yes'; write --overwrite alone"),
        (["--no-lr"], "unknown option --no-lr; did you mean --lr?"),
        (["--steps", "3", "--epochs", "1"], "steps and epochs: give one of them, not both"),
        (["--seed", "-1"], "seed: got -1, must lie in 0 to 4294967295"),
        (["--seed", "99999999999999999999999"], "seed: got 99999999999999999999999, must lie in 0 to 4294967295"),
        (["--config", "a", "--config=b"], "config: --config is given 2 times; give it once"),
    ],
)
def test_a_wrong_value_is_one_line(capsys, args, line):
    code, out, err = call(capsys, "adapt", "--model", "m", "--data", "d", "--out", "o", *args)
    assert (code, out, err) == (2, "", f"upstep-fast: {line}\n")


def test_missing_and_stray_arguments_are_one_line(capsys, tmp_path):
    needed = "adapt: --data and --out must be given; upstep-fast adapt --help shows an example"
    assert call(capsys, "adapt", "--model", "m")[2] == f"upstep-fast: {needed}\n"
    assert call(capsys, "adapt", "m", "--data", "d")[2] == "upstep-fast: 'm' follows no flag; write --flag value\n"
    folder = str(tmp_path)
    assert call(capsys, "adapt", folder)[2] == f"upstep-fast: {folder!r} follows no flag; write --data {folder}\n"
    (tmp_path / "adapter_config.json").write_text("{}")
    cure = f"--from {folder} starts from the adapter of that run"
    assert call(capsys, "adapt", folder)[2] == f"upstep-fast: {folder!r} follows no flag; {cure}\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('steps = "ten"', "steps: got 'ten', must be an integer"),
        ("lr = [1, 2]", "lr: got '1' '2', must be a number"),
        ("lr = true", "lr: got True, must be a number"),
        ("overwrite = 1", "overwrite: got 1, must be True or False"),
        ("lr = 1979-05-27", "lr: got datetime.date(1979, 5, 27), must be a number"),
        ('arch = "a\\u0000b"', "arch: got 'a\\x00b', must be text"),
        ("[gate]\nrate = {a = 1}", "gate_rate: got {'a': 1}, must be a number"),
        ('preset = ["gentle"]', "must be given"),
    ],
)
def test_a_wrong_value_of_a_file_is_one_line(capsys, tmp_path, text, line):
    (tmp_path / "c.toml").write_text(text)
    code, _, err = call(capsys, "adapt", "--config", tmp_path / "c.toml")
    assert code == 2 and line in err and err.startswith("upstep-fast: ") and err.count("\n") == 1
