"""Supervised fine-tuning: what is written and can be loaded again, resume, the cache, clips, schedules, bad input."""

import dataclasses
import hashlib
import json
import logging
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from photos import blurred_noise
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import param_groups_layer_decay

import upstep_fast
from upstep_fast.config.finetune import FinetuneConfig
from upstep_fast.config.flat import from_flat
from upstep_fast.data.labeled import clips as clip_files
from upstep_fast.data.labeled import video
from upstep_fast.data.labeled.splits import held_out, train_and_test
from upstep_fast.errors import ConfigError, DataError, Interrupted, RunFailedError
from upstep_fast.evaluation import labeled as labeled_evaluation
from upstep_fast.methods.supervised import losa as finetune_losa
from upstep_fast.methods.supervised.baselines import Baseline, layer_of, parameter_groups, set_drop_path
from upstep_fast.methods.trainable import trained
from upstep_fast.model import backbone as backbones
from upstep_fast.model import lora, peft_format
from upstep_fast.runtime.device import resolve
from upstep_fast.train.finetune import classifier as finetuned
from upstep_fast.train.finetune import feature_cache
from upstep_fast.train.finetune import loop as finetune_loop
from upstep_fast.train.finetune import run as finetuning
from upstep_fast.train.finetune import splits as finetune_splits
from upstep_fast.train.finetune import step as finetune_step
from upstep_fast.train.finetune.state import State

COLORS = {"ash": (0.8, 0.3, 0.3), "birch": (0.3, 0.8, 0.3), "cedar": (0.3, 0.3, 0.8)}


def picture(color, seed):
    return blurred_noise(torch.Generator().manual_seed(seed), 36, color)


@pytest.fixture(scope="session")
def labeled(tmp_path_factory):
    """train/ with 12 and test/ with 6 pictures of each of three classes; not to be written to."""
    folder = tmp_path_factory.mktemp("labeled")
    for split, count in (("train", 12), ("test", 6)):
        for c, (name, color) in enumerate(COLORS.items()):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                picture(color, 1000 * c + 100 * (split == "test") + i).save(folder / split / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """train/CLASS/CLIP/frame.png: the classes differ in the order of their frames alone."""
    folder = tmp_path_factory.mktemp("clips")
    for split, count in (("train", 6), ("test", 3)):
        for name in ("brighter", "darker"):
            for i in range(count):
                clip = folder / split / name / f"clip{i}"
                clip.mkdir(parents=True)
                for frame in range(4):
                    level = (frame if name == "brighter" else 3 - frame) * 60
                    noise = np.random.default_rng(i + 10 * frame).integers(0, 40, (36, 36, 3))
                    Image.fromarray((level + noise).astype(np.uint8)).save(clip / f"{frame}.png")
    return folder


@pytest.fixture
def options(model, labeled, tmp_path):
    return dict(
        model=model,
        data=labeled,
        out=tmp_path / "out",
        epochs=3,
        batch_size=8,
        held_out=0.2,
        losa_rank=3,
        lora_r=2,
        precision="fp32",
        device="cpu",
        num_workers=0,
    )


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


METHODS = ["losa", "lora", "linear", "full"]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_what_it_writes_can_be_loaded(options, labeled, tmp_path, method):
    lr = {"losa": 1e-2, "lora": 1e-2, "linear": 5e-2, "full": 2e-3}[method]
    more = dict(epochs=12, preset_views="none", method=method, lr=lr, json=tmp_path / "scores.json")
    result = upstep_fast.finetune(**{**options, **more})
    figures = json.loads((tmp_path / "scores.json").read_text())
    assert set(figures) == {"top1", "balanced", "trainable_parameters", "seconds", "peak_bytes"}
    assert figures == result.metrics and figures["peak_bytes"] > 1e6 and figures["seconds"] > 0
    assert figures["top1"] > 66  # of three classes
    written = rows(tmp_path / "out")
    first, last = ([row["loss"] for row in written][i] for i in (slice(0, 3), slice(-3, None)))
    assert sum(last) < 0.8 * sum(first)
    # loaded again it gives what was measured
    net = upstep_fast.load_finetuned(result.model)
    assert net.classes == tuple(COLORS) and not net.training
    count = sum(p.numel() for name, p in trained(build(options, method)).items())
    assert count == figures["trainable_parameters"]
    config = from_flat(FinetuneConfig, **{**options, **more, "data": (str(labeled),), "out": "o", "json": None})
    one, (_, test) = backbones.load(options["model"]), train_and_test(config.data.paths, "finetune")
    reader = finetuning.make_reader(config, one, torch.device("cpu"))
    predicted, truth = finetune_step.predict(net, finetuning._in_order(test, reader), resolve("cpu", "fp32"))
    assert finetune_step.top1(predicted, truth) == pytest.approx(figures["top1"])
    assert 100 * balanced_accuracy_score(truth, predicted) == pytest.approx(figures["balanced"])


def test_eval_and_finetune_hold_out_the_same_images_without_a_test_part(options, labeled, monkeypatch, caplog):
    caplog.set_level("INFO", logger="upstep_fast")
    seen, real = {}, finetune_splits.train_and_test
    for module, command in ((finetune_splits, "finetune"), (labeled_evaluation, "eval")):

        def kept(*args, command=command, **keywords):
            parts = real(*args, **keywords)
            seen[command] = [[p.source.name(i) for i in range(len(p.y))] for p in parts]
            return parts

        monkeypatch.setattr(module, "train_and_test", kept)
    figures = upstep_fast.finetune(**{**options, "data": labeled / "train", "epochs": 1}).metrics
    more = {k: options[k] for k in ("model", "device", "precision", "num_workers")}
    scores = upstep_fast.evaluate(data=labeled / "train", **more)
    assert seen["eval"] == seen["finetune"] and [len(names) for names in seen["eval"]] == [30, 6]
    assert scores["n_train"] == 30 and scores["n_test"] == 6 and 0 <= figures["top1"] <= 100
    assert caplog.text.count("no test part: 20 % of each of 3 classes held out, seed 0") == 2
    assert "data: train: 30 images" in caplog.text and "data: test: 6 images" in caplog.text


def build(options, method="losa", **more):
    fields = {**options, **more, "data": ("d",), "out": "o", "method": method}
    return finetuned.build(backbones.load(options["model"]), from_flat(FinetuneConfig, **fields), 3)


@pytest.mark.parametrize("method", METHODS)
def test_only_what_the_method_names_learns(options, method):
    learning = set(trained(build(options, method)))
    assert {"head.weight", "head.bias"} <= learning
    others = learning - {"head.weight", "head.bias"}
    if method == "linear":
        assert not others
    elif method == "full":
        assert "vit.patch_embed.proj.weight" in others and "vit.head.weight" not in others
    else:
        assert others and all(name.startswith("side.") or "lora_" in name for name in others)


def test_the_best_epoch_by_the_held_out_part_is_kept(options, tmp_path, monkeypatch, caplog):
    """Accuracies by hand: the second epoch is best, and patience ends the run two epochs later."""
    caplog.set_level(logging.INFO, "upstep_fast")
    at_epoch = {}
    accuracies = iter([50.0, 80.0, 60.0, 80.0, 99.0])

    def measured(predicted, truth):
        if len(truth) == 18:  # test/
            return 10.0
        return next(accuracies)

    end_epoch = State.end_epoch

    def spy(state, accuracy):
        at_epoch[state.epoch] = {n: p.detach().clone() for n, p in trained(state.model).items()}
        end_epoch(state, accuracy)

    for module in (finetuning, finetune_loop):
        monkeypatch.setattr(module, "top1", measured)
    monkeypatch.setattr(State, "end_epoch", spy)
    result = upstep_fast.finetune(**{**options, "epochs": 9}, patience=2)
    assert (result.epochs, result.best_epoch) == (4, 1)
    assert "patience: 2 epochs in a row were no better; stopped after epoch 4 of 9" in caplog.text
    saved = trained(upstep_fast.load_finetuned(result.model).requires_grad_(True))
    for name, value in at_epoch[1].items():
        assert torch.equal(saved[name], value)
    assert any(not torch.equal(at_epoch[1][name], at_epoch[3][name]) for name in at_epoch[1])


def test_the_test_split_chooses_nothing(options, tmp_path, labeled):
    """With other labels on test/ the run is the same up to its last line."""
    other = tmp_path / "other"
    for split, names in (("train", list(COLORS)), ("test", ["birch", "cedar", "ash"])):
        for old, new in zip(COLORS, names, strict=True):
            (other / split / new).mkdir(parents=True)
            for file in sorted((labeled / split / old).iterdir()):
                (other / split / new / file.name).write_bytes(file.read_bytes())
    results = [
        upstep_fast.finetune(**{**options, "data": d, "out": tmp_path / f"run-{d.name}"}) for d in (labeled, other)
    ]
    a, b = ((result.model / finetuned.WEIGHTS).read_bytes() for result in results)
    assert a == b
    assert results[0].metrics["top1"] + results[1].metrics["top1"] <= 100.001


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_the_uninterrupted_one(options, tmp_path, method, monkeypatch):
    extra = dict(method=method, mixup=0.3, drop_path=0.3 if method in ("lora", "full") else 0.0)
    whole = upstep_fast.finetune(**{**options, **extra, "out": tmp_path / "whole"})
    train_step = finetune_step.train_step

    def stopping(state, *args):
        if state.step == 5:
            signal.raise_signal(signal.SIGTERM)
        return train_step(state, *args)

    monkeypatch.setattr(finetune_loop, "train_step", stopping)
    with pytest.raises(Interrupted, match=r"stopped after 6 of 9 steps.*--resume"):
        upstep_fast.finetune(**options, **extra)
    monkeypatch.setattr(finetune_loop, "train_step", train_step)
    again = upstep_fast.finetune(**options, **extra, resume=True)
    a, b = ((result.model / finetuned.WEIGHTS).read_bytes() for result in (whole, again))
    assert a == b
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("whole", "out")]
    assert losses[0] == losses[1] and len(losses[0]) == 9


def test_a_finished_run_goes_on_for_more_epochs(options, tmp_path, caplog):
    """Its further steps have the learning rates of the longer run; fewer epochs than it has are refused."""
    caplog.set_level(logging.INFO, "upstep_fast")
    extra = {"method": "linear", "patience": 0}
    whole = upstep_fast.finetune(**{**options, **extra, "out": tmp_path / "whole", "epochs": 5})
    first = upstep_fast.finetune(**options, **extra)
    longer = upstep_fast.finetune(**{**options, **extra, "epochs": 5}, resume=True)
    assert (first.epochs, longer.epochs, whole.epochs) == (3, 5, 5) and "epochs: 5 instead of 3" in caplog.text
    a, b = rows(tmp_path / "out"), rows(tmp_path / "whole")
    assert len(a) == len(b) == 15 and [row["lr"] for row in a[9:]] == [row["lr"] for row in b[9:]]
    assert a[0]["loss"] == b[0]["loss"]
    with pytest.raises(ConfigError, match="is 5 epochs long; give at least as many --epochs"):
        upstep_fast.finetune(**{**options, **extra, "epochs": 4}, resume=True)


def test_resume_refuses_other_labels_of_the_same_files(options, monkeypatch):
    upstep_fast.finetune(**options)
    real = finetune_splits.train_and_test

    for change, message in (
        (lambda train: {"y": 2 - train.y}, "or other names, labels or sizes"),  # other images are held out
        (lambda train: {"classes": train.classes[::-1]}, "resume: the labels are not those of"),
    ):

        def turned(*args, change=change):
            train, test = real(*args)
            return dataclasses.replace(train, **change(train)), test

        monkeypatch.setattr(finetune_splits, "train_and_test", turned)
        with pytest.raises(ConfigError, match=message) as error:
            upstep_fast.finetune(**options, resume=True)
        assert "\n" not in str(error.value)


def test_resume_refuses_another_run(options):
    upstep_fast.finetune(**options)
    with pytest.raises(ConfigError, match="losa_rank was 3, is 4"):
        upstep_fast.finetune(**{**options, "losa_rank": 4}, resume=True)
    with pytest.raises(ConfigError, match="not empty"):
        upstep_fast.finetune(**options)


@pytest.mark.parametrize("method", ["losa", "linear"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_cached_activations_change_nothing(options, tmp_path, method, where, caplog):
    extra = dict(method=method, preset_views="none")
    upstep_fast.finetune(**{**options, **extra, "out": tmp_path / "off"})
    with caplog.at_level("INFO", "upstep_fast"):
        upstep_fast.finetune(**{**options, **extra, "out": tmp_path / "on"}, cache=where)
    said = next(m for m in caplog.messages if m.startswith("cache:"))
    assert "MB of frozen activations" in said and where in said
    off, on = ([row["loss"] for row in rows(tmp_path / name)] for name in ("off", "on"))
    assert off == pytest.approx(on, rel=1e-5)
    assert not list((tmp_path / "on").glob(f"*{feature_cache.FILE}"))


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_cache_that_does_not_fit_is_refused(options, monkeypatch, where):
    monkeypatch.setattr(feature_cache, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=rf"cache: .* MB do not fit into {where}"):
        upstep_fast.finetune(**options, preset_views="none", cache=where)
    assert not options["out"].exists()  # so that the corrected command is accepted


def test_the_cached_backbone_runs_once(options, monkeypatch):
    seen = []
    frozen = finetune_losa.Losa.frozen
    monkeypatch.setattr(finetune_losa.Losa, "frozen", lambda self, x: seen.append(len(x)) or frozen(self, x))
    upstep_fast.finetune(**{**options, "epochs": 4}, preset_views="none", cache="memory", patience=0)
    assert sum(seen) == 1 + 36  # one for the size, and every image of train/ once


WHOLE = [f"blocks.{part}.{kind}" for part in ("0.norm1", "1.mlp.fc1") for kind in ("weight", "bias")]


@pytest.mark.parametrize("whole", [(), (*WHOLE, "cls_token")])
def test_from_an_adapted_model(options, tmp_path, whole):
    """whole: parameters that ExPLoRA trains fully, beside LoRA."""
    one = backbones.load(options["model"])
    adapters = lora.inject(one.vit, lora.LoraSpec(r=2, alpha=2))
    for parameter in [adapter.lora_b for adapter in adapters.values()] + [
        one.vit.get_parameter(name) for name in whole
    ]:
        torch.nn.init.normal_(parameter, std=0.3)
    values = {name: one.vit.get_parameter(name).detach() for name in whole}
    peft_format.write_files(
        tmp_path / "adapter", peft_format.adapter_files(adapters, options["model"], fully_trained=values)
    )
    result = upstep_fast.finetune(**options, adapter=tmp_path / "adapter", method="losa")
    (tmp_path / "adapter" / peft_format.WEIGHTS).unlink()  # the folder must not need it any more
    net = upstep_fast.load_finetuned(result.model)
    merged = lora.merge(one.vit)
    for (name, ours), theirs in zip(net.vit.state_dict().items(), merged.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_a_classifier_belongs_to_its_base_model_and_its_class_names(options, tmp_path):
    result = upstep_fast.finetune(**options | {"epochs": 1, "method": "linear"})
    folder = tmp_path / "other"
    shutil.copytree(options["model"].removeprefix("local-dir:"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_args": config["model_args"] | {"num_heads": 6}}))
    with pytest.raises(
        ConfigError, match=r"trained on another base model than .*num_heads was 3, is 6; .*give the base"
    ):
        upstep_fast.load_finetuned(result.model, model=f"local-dir:{folder}")
    torch.manual_seed(1)
    vit = timm.create_model("vit_tiny_patch16_224", **config["model_args"])
    timm.models.save_for_hf(vit, folder, model_args=config["model_args"], safe_serialization=True)
    with pytest.raises(ConfigError, match="its weights are not the same"):
        upstep_fast.load_finetuned(result.model, model=f"local-dir:{folder}")

    values = json.loads((result.model / finetuned.CONFIG).read_text())
    turned = values | {"classes": values["classes"][::-1]}
    (result.model / finetuned.CONFIG).write_text(json.dumps(turned))
    with pytest.raises(ConfigError, match=r"the classes in config\.json are not those of trained\.safetensors"):
        upstep_fast.load_finetuned(result.model)
    # an earlier version wrote the tensors without metadata
    bare = safetensors.torch.save(safetensors.torch.load((result.model / finetuned.WEIGHTS).read_bytes()))
    (result.model / finetuned.WEIGHTS).write_bytes(bare)
    old = turned | {"sha256": hashlib.sha256(bare).hexdigest()}
    (result.model / finetuned.CONFIG).write_text(json.dumps(old))
    assert upstep_fast.load_finetuned(result.model).classes == tuple(turned["classes"])


def test_loading_at_another_size_says_so(options, caplog):
    result = upstep_fast.finetune(**options)
    with caplog.at_level("WARNING", "upstep_fast"):
        net = upstep_fast.load_finetuned(result.model, img_size=48)
    assert "4 x 4 patches and is interpolated to 6 x 6" in caplog.text
    assert net(torch.randn(2, 3, 48, 48)).shape == (2, 3)
    with pytest.raises(ConfigError, match="is not what"):
        broken = result.model / finetuned.WEIGHTS
        broken.write_bytes(broken.read_bytes()[:-1])
        upstep_fast.load_finetuned(result.model)


def test_clips_tell_an_order_of_frames(options, clips, tmp_path):
    extra = dict(data=clips, frames=4, epochs=25, lr=2e-2, batch_size=8, preset_views="none", held_out=0.0, patience=0)
    figures = upstep_fast.finetune(**{**options, **extra}, cache="memory").metrics
    assert figures["top1"] == 100
    # without time a bag of frames is the same for both classes
    linear = upstep_fast.finetune(**{**options, **extra, "out": tmp_path / "linear"}, method="linear").metrics
    assert linear["top1"] < 90
    net = upstep_fast.load_finetuned(tmp_path / "out" / "model")
    assert net(torch.randn(2, 4, 3, 32, 32)).shape == (2, 2)


def test_random_frames_of_a_clip_share_their_changes(options, clips):
    config = from_flat(FinetuneConfig, **{**options, "data": (str(clips),), "out": "o"}, frames=2)
    train, _ = clip_files.train_and_test_clips(config.data.paths, 2)
    reader = finetuning.make_reader(config, backbones.load(options["model"]), torch.device("cpu"))
    x, y = next(reader.training(train, 0))
    assert x.shape == (8, 2, 3, 32, 32) and y.shape == (8,)
    again, _ = next(reader.training(train, 0))
    other, _ = next(reader.training(train, 1))
    assert torch.equal(x, again) and not torch.equal(x, other)
    same = clip_files.Clips(
        tuple(dataclasses.replace(c, frames=(c.frames[0],) * 4) for c in train.source.clips), train.source.source
    )
    x, _ = next(reader.training(dataclasses.replace(train, source=same), 0))
    assert torch.equal(x[:, 0], x[:, 1])


def test_frames_come_from_equal_segments():
    assert clip_files.middle_frames(8, 4) == [1, 3, 5, 7]
    assert clip_files.middle_frames(3, 3) == [0, 1, 2]
    draws = [clip_files.random_frames(10, 5, seed=0, epoch=e, index=3) for e in range(50)]
    assert all(frame // 2 == i for frames in draws for i, frame in enumerate(frames))
    assert len({tuple(frames) for frames in draws}) > 10


@pytest.mark.parametrize("library", ["av", "torchcodec"])
def test_video_files(options, clips, tmp_path, monkeypatch, library):
    av = pytest.importorskip("av")  # writes them
    pytest.importorskip(library)
    monkeypatch.setattr(video, "backend", lambda path: library)
    folder = tmp_path / "videos"
    for source in sorted(clips.glob("*/*/*")):
        split, name, clip = source.relative_to(clips).parts
        (folder / split / name).mkdir(parents=True, exist_ok=True)
        with av.open(str(folder / split / name / f"{clip}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=4)
            stream.width = stream.height = 36
            stream.pix_fmt = "yuv420p"
            for file in sorted(source.iterdir()):
                for packet in stream.encode(av.VideoFrame.from_image(Image.open(file))):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
    one = str(folder / "train" / "brighter" / "clip0.mp4")
    assert video.count_frames(one) == 4
    frames = video.read(one, [0, 3])
    assert [tuple(f.shape) for f in frames] == [(3, 36, 36)] * 2 and frames[0].dtype == torch.uint8
    assert frames[1].float().mean() - frames[0].float().mean() == pytest.approx(180, abs=15)
    extra = dict(data=folder, frames=4, epochs=20, lr=2e-2, preset_views="none", held_out=0.0)
    assert upstep_fast.finetune(**{**options, **extra}, cache="memory").metrics["top1"] == 100


def test_video_files_without_a_library(clips, tmp_path, monkeypatch):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "x.mp4").write_bytes(b"")
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"x.mp4 is a video file, and neither PyAV nor torchcodec .* pip install av"):
        clip_files.train_and_test_clips((str(tmp_path),), 2)


def copy_tree(source, target):
    for file in source.rglob("*.png"):
        path = target / file.relative_to(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.read_bytes())
    return target


def bad_unlabeled(labeled, clips, folder):
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        picture((0, 0, 0), 0).save(folder / split / "0.png")
    return {}, "outside class folders; finetune needs train/CLASS/image"


def bad_one_class(labeled, clips, folder):
    for split in ("train", "test"):
        copy_tree(labeled / split / "ash", folder / split / "ash")
    return {}, "train/ has one class, ash; a classifier needs at least 2"


def bad_other_classes(labeled, clips, folder):
    copy_tree(labeled, folder)
    (folder / "test" / "ash").rename(folder / "test" / "oak")
    return {}, "classes in test/ that train/ lacks: oak"


def bad_no_test(labeled, clips, folder):
    copy_tree(labeled / "train", folder)
    return {"test_fraction": 0}, r"no test images in .*; it must hold train/CLASS"


def bad_short_clips(labeled, clips, folder):
    copy_tree(clips, folder)
    return {"frames": 6}, r"12 of 12 clips are shorter than --frames 6; the shortest: .* with 4; lower --frames"


def bad_video(labeled, clips, folder):
    pytest.importorskip("av")
    copy_tree(clips, folder)
    (folder / "train" / "darker" / "broken.mp4").write_bytes(b"no video")
    return {"frames": 2}, "broken.mp4 cannot be read: "


def bad_no_clips(labeled, clips, folder):
    copy_tree(labeled, folder)
    return {"frames": 2}, "lies directly in its class; --frames wants train/CLASS/CLIP/frame"


def bad_unreadable(labeled, clips, folder):
    copy_tree(labeled, folder)
    for file in (folder / "train" / "ash").iterdir():
        file.write_bytes(b"no picture")
    return {}, "images cannot be used, more than the 1.00% allowed"


def bad_unreadable_clips(labeled, clips, folder):
    copy_tree(clips, folder)
    for file in (folder / "train").rglob("2.png"):
        file.write_bytes(b"no picture")
    return {"frames": 4}, "cannot be used, more than the 1.00% allowed; the first: .*frame .*2.png"


BAD = [f for name, f in sorted(globals().items()) if name.startswith("bad_")]


@pytest.mark.parametrize("make", BAD)
def test_bad_data_is_one_line(options, labeled, clips, tmp_path, make):
    more, message = make(labeled, clips, tmp_path / "data")
    with pytest.raises(DataError, match=message) as error:
        upstep_fast.finetune(**{**options, **more, "data": tmp_path / "data"})
    assert "\n" not in str(error.value) and error.value.exit_code == 3


def test_a_class_without_test_images_is_logged(options, labeled, tmp_path, caplog):
    copy_tree(labeled, tmp_path / "data")
    for file in (tmp_path / "data" / "test" / "ash").iterdir():
        file.unlink()
    with caplog.at_level("WARNING", "upstep_fast"):
        upstep_fast.finetune(**{**options, "data": tmp_path / "data"})
    assert "test/ lacks, so they are not measured: ash" in caplog.text


@pytest.mark.parametrize(
    ("field", "value", "more"),
    [
        ("epochs", 0, {}),
        ("held_out", 0.95, {}),
        ("label_smoothing", 1.0, {}),
        ("drop_path", 0.1, {"method": "losa"}),
        ("drop_path", 0.1, {"method": "linear"}),
        ("cache", "memory", {"method": "lora"}),
        ("cache", "memory", {}),
        ("cache", "disk", {"preset_views": "none", "cutmix": 1.0}),
        ("frames", 1, {}),
        ("layer_decay", 0.0, {}),
        ("layer_decay", 1.1, {}),
        ("losa_every", 0, {}),
        ("lora_targets", ("q", "x"), {}),
        ("mixup", -1.0, {}),
    ],
)
def test_a_bad_value_is_refused_by_its_name(field, value, more):
    with pytest.raises(ConfigError, match=f"^{field}: ") as error:
        from_flat(FinetuneConfig, **{"model": "m", "data": ("d",), "out": "o", field: value, **more})
    assert "\n" not in str(error.value)


def test_the_command(options, labeled, tmp_path):
    args = [sys.executable, "-m", "upstep_fast", "finetune", "--model", options["model"], "--data", str(labeled)]
    args += ["--out", str(tmp_path / "o"), "--epochs", "1", "--batch-size", "8", "--method", "linear"]
    done = subprocess.run([*args, "--json", str(tmp_path / "j.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "top-1" in done.stdout and "load_finetuned" in done.stdout
    assert json.loads((tmp_path / "j.json").read_text())["trainable_parameters"] == 48 * 3 + 3
    missing = subprocess.run([*args[:-1], "nothing"], capture_output=True, text=True)
    assert missing.returncode == 2


def test_a_loss_that_is_not_finite_changes_nothing_and_ends_the_run(options, tmp_path, monkeypatch):
    before = {}

    def bad(state, x, y, logits, *rest):
        before.setdefault("w", state.model.head.weight.detach().clone())
        row = finetune_step.train_step(state, x, y, lambda x: logits(x) * float("nan"), *rest)
        assert torch.equal(state.model.head.weight, before["w"])
        return row

    monkeypatch.setattr(finetune_loop, "train_step", bad)
    with pytest.raises(RunFailedError, match="step 2: the loss is nan, 3 in a row"):
        upstep_fast.finetune(**options)
    assert [row["loss"] for row in rows(tmp_path / "out")] == [None] * 3


def test_layer_decay_is_timms(options):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3)
    net = torch.nn.Module()
    net.vit, net.head = vit, torch.nn.Linear(48, 3)
    vit.head.requires_grad_(False)
    ours = {
        id(p): group["scale"]
        for group in parameter_groups(net, 3, weight_decay=0.1, layer_decay=0.5)
        for p in group["params"]
    }
    for group in param_groups_layer_decay(vit, weight_decay=0.1, layer_decay=0.5):
        for p in group["params"]:
            # the final norm counts to the head, as in BEiT and MAE; timm counts it to the last block
            if p.requires_grad and p is not vit.norm.weight and p is not vit.norm.bias:
                assert ours[id(p)] == pytest.approx(group["lr_scale"])
    assert ours[id(net.head.weight)] == ours[id(vit.norm.weight)] == 1.0
    assert layer_of("vit.blocks.2.attn.qkv.lora_a", 12) == 3
    assert layer_of("side.adaptors.1.mixers.token.up", 12, taps=(5, 11)) == 12
    assert layer_of("side.positions", 12) == 0


def test_learning_rates_follow_the_closed_form(options, tmp_path):
    upstep_fast.finetune(**options, lr=0.5e-2, warmup=2, layer_decay=0.5)
    rates = [row["lr"] for row in rows(tmp_path / "out")]
    want = [1 / 3, 2 / 3] + [0.5 * (1 + np.cos(np.pi * (step - 2) / 7)) for step in range(2, 9)]
    assert rates == pytest.approx([0.5e-2 * factor for factor in want])


def test_drop_path_rises_over_the_blocks(model):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=5, num_heads=3)
    set_drop_path(vit, 0.2)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=5, drop_path_rate=0.2)

    def rates(m):
        return [getattr(block.drop_path1, "drop_prob", 0.0) for block in m.blocks]

    assert rates(vit) == pytest.approx(rates(theirs)) and rates(vit)[-1] == pytest.approx(0.2)
    net = Baseline(backbones.load(model), "lora", 3, drop_path=0.9)
    x = torch.randn(16, 3, 32, 32)
    assert not torch.equal(net.train()(x), net(x)) and torch.equal(net.eval()(x), net(x))


def test_mixup_and_smoothing_are_timms(options):
    config = from_flat(FinetuneConfig, **{**options, "data": ("d",), "out": "o"}, mixup=0.4, cutmix=1.0)
    mix = finetune_step.make_mixup(config, 3)
    x, y = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    for step in range(4):
        np.random.seed((config.runtime.seed * 1_000_003 + step) % 2**32)
        theirs = timm.data.Mixup(0.4, 1.0, label_smoothing=0.1, num_classes=3)(x.clone(), y)
        ours = mix(x.clone(), y, step)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    logits = torch.randn(6, 3)
    assert torch.nn.functional.cross_entropy(logits, y, label_smoothing=0.1) == pytest.approx(
        LabelSmoothingCrossEntropy(0.1)(logits, y).item()
    )
    flat, _ = mix(x[:, None].repeat(1, 2, 1, 1, 1), y, 0)
    assert flat.shape == (6, 2, 3, 8, 8) and torch.equal(flat[:, 0], flat[:, 1])


def test_held_out_takes_its_part_of_every_class():
    y = torch.tensor([0] * 20 + [1] * 10 + [2])
    mask = held_out(y, 0.2, 0)
    assert [int(mask[y == c].sum()) for c in range(3)] == [4, 2, 0]
    assert torch.equal(mask, held_out(y, 0.2, 0)) and not torch.equal(mask, held_out(y, 0.2, 1))


@pytest.mark.long
def test_base_tiny_on_hand_signs(shared, tmp_path):
    """LoSA on real photographs and weights, far above the linear layer on the same activations in as many epochs."""
    common = dict(
        model=f"local-dir:{shared / 'base_tiny'}",
        data=shared / "sign_digits_64.tar",
        preset_views="none",
        cache="memory",
        precision="fp32",
        num_workers=1,
        epochs=6,
    )
    top1 = {
        method: upstep_fast.finetune(**common, out=tmp_path / method, method=method).metrics["top1"]
        for method in ("linear", "losa")
    }
    assert top1["losa"] > top1["linear"] + 5 and top1["linear"] > 60
