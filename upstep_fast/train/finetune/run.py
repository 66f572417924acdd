"""Supervised fine-tuning: a classifier on a frozen, a partly trained or a wholly trained backbone.

train/ is split into a part that is learnt from and a part that chooses the epoch; test/ is read once, at the end.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from upstep_fast.config.files import from_options
from upstep_fast.config.finetune import FinetuneConfig
from upstep_fast.config.flat import replace_flat
from upstep_fast.config.options import FinetuneOptions
from upstep_fast.config.signatures import with_keywords
from upstep_fast.data.labelled.batches import Reader
from upstep_fast.data.labelled.clips import train_and_test_clips
from upstep_fast.data.labelled.reader import ReaderOptions
from upstep_fast.data.labelled.splits import Labelled, held_out, train_and_test
from upstep_fast.data.loading.skipped import write_skipped
from upstep_fast.data.views.view_config import view_config
from upstep_fast.errors import ConfigError, DataError, Interrupted, RunFailedError
from upstep_fast.kernels import _dispatch as dispatch
from upstep_fast.methods.supervised.baselines import parameter_groups
from upstep_fast.methods.supervised.losa import Losa
from upstep_fast.methods.trainable import trained
from upstep_fast.model import backbone as backbones
from upstep_fast.model.backbone import Backbone
from upstep_fast.report.logs import train_log
from upstep_fast.report.metrics import Metrics
from upstep_fast.runtime import distributed
from upstep_fast.runtime import run_folder as output
from upstep_fast.runtime.atomic_file import write_atomic
from upstep_fast.runtime.device import Compute, resolve
from upstep_fast.runtime.machine import default_workers, peak_bytes
from upstep_fast.runtime.signals import signals
from upstep_fast.train.failures import MAX_BAD_STEPS
from upstep_fast.train.finetune import classifier as finetuned
from upstep_fast.train.finetune import feature_cache
from upstep_fast.train.finetune import state as finetune_state
from upstep_fast.train.finetune.feature_cache import Cached
from upstep_fast.train.finetune.state import State
from upstep_fast.train.finetune.step import balanced, make_logits, make_mixup, predict, top1, train_step
from upstep_fast.train.identity import Identity, identify
from upstep_fast.version import __version__

log = logging.getLogger("upstep_fast")

LR = {"losa": 3e-3, "lora": 6e-3, "linear": 1e-2, "full": 2e-4}
MODEL, RESULT = "model", "result.json"


@dataclass(frozen=True)
class FinetuneResult:
    """What a finished run brought; `figures` is what --json holds."""

    model: Path
    figures: dict[str, float]
    epochs: int
    best_epoch: int


@dataclass(frozen=True)
class Splits:
    """What is learnt from, what chooses the epoch, and what measures."""

    learn: Labelled
    choose: Labelled
    test: Labelled


@with_keywords(FinetuneConfig)
def finetune(
    model: str | Path, data: str | Path | Sequence[str | Path], out: str | Path, **keywords: Unpack[FinetuneOptions]
) -> FinetuneResult:
    """Train a classifier on labeled images and write it to the folder `out`.

    data: a folder with train/CLASS/... and test/CLASS/... . Keywords are the flags of `upstep-fast finetune
    --help-all`. Raises UpstepError.
    """
    return run(from_options(FinetuneConfig, {"model": model, "data": data, "out": out, **keywords}, "finetune"))


def run(config: FinetuneConfig) -> FinetuneResult:
    """One run, from configuration to classifier. Raises UpstepError with the exit code of what went wrong."""
    if distributed.local_size() > 1:
        raise ConfigError("finetune: runs on one device; start it without torchrun")
    compute = resolve(config.runtime.device, config.runtime.precision)
    splits = read_splits(config)
    asked, config = config, fit_to_data(config, splits)
    backbone = finetuned.load_backbone(config)
    implementation = None if config.runtime.implementation == "auto" else config.runtime.implementation
    with output.lock_run_folder(config) as out, train_log(out / "train.log"), dispatch.forced(implementation):
        log.info(
            "upstep-fast %s, torch %s, %s in %s", __version__, torch.__version__, compute.device, compute.precision
        )
        if asked.optimization.batch_size != config.optimization.batch_size:
            log.warning(
                "batch_size: reduced from %d to %d for the images there are",
                asked.optimization.batch_size,
                config.optimization.batch_size,
            )
        if absent := sorted(set(splits.test.classes) - {splits.test.classes[i] for i in splits.test.y.tolist()}):
            log.warning("data: classes of train/ that test/ lacks, so they are not measured: %s", ", ".join(absent[:5]))
        return _run(config, compute, splits, backbone, out)


def read_splits(config: FinetuneConfig) -> Splits:
    """The labelled data of a run. Raises DataError."""
    if config.frames is None:
        train, test = train_and_test(config.data.paths, "finetune")
    else:
        train, test = train_and_test_clips(config.data.paths, config.frames)
    if len(train.classes) < 2:
        raise DataError(f"data: train/ has one class, {train.classes[0]}; a classifier needs at least 2")
    mask = held_out(train.y, config.optimization.held_out, config.runtime.seed)
    return Splits(train.subset((~mask).nonzero()[:, 0]), train.subset(mask.nonzero()[:, 0]), test)


def fit_to_data(config: FinetuneConfig, splits: Splits) -> FinetuneConfig:
    """The configuration with the batch reduced to what the data can fill, even under mixup, and `lr` resolved."""
    batch = min(config.optimization.batch_size, len(splits.learn.y))
    if config.regularization.mixup or config.regularization.cutmix:
        batch -= batch % 2  # timm pairs the images of a batch
    if batch < 2:
        raise DataError(f"data: {len(splits.learn.y)} images to learn from, at least 2 are needed")
    if config.optimization.held_out and not len(splits.choose.y):
        log.warning("held_out: %s of each class is no image; the last epoch is kept", config.optimization.held_out)
        config = replace_flat(config, held_out=0.0)
    lr = LR[config.method] if config.optimization.lr is None else config.optimization.lr
    return replace_flat(config, batch_size=batch, lr=lr)


def make_reader(config: FinetuneConfig, backbone: Backbone, device: torch.device) -> Reader:
    """How this run reads images or clips."""
    preset = config.views.preset
    like: Any = {"size": backbone.img_size, "mean": backbone.mean, "std": backbone.std}
    options = ReaderOptions(
        size=backbone.img_size,
        mean=backbone.mean,
        std=backbone.std,
        interpolation=backbone.interpolation,
        crop_pct=backbone.crop_pct,
        views=None if preset == "none" else view_config(preset, **like, **config.views.overrides()),
        batch_size=config.optimization.batch_size,
        seed=config.runtime.seed,
        num_workers=default_workers() if config.data.num_workers is None else config.data.num_workers,
        max_bad_fraction=config.data.max_bad_fraction,
        device=device,
        frames=config.frames,
    )
    return Reader(options)


def _run(config: FinetuneConfig, compute: Compute, splits: Splits, backbone: Backbone, out: Path) -> FinetuneResult:
    if compute.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(compute.device)
    identity = identify(config, compute, splits.learn.source, backbones.fingerprint(backbone.vit))
    settings = {name: value for name, value in identity.config.items() if name not in ("json", "cache", "adapter")}
    identity = replace(identity, config=settings)
    reader = make_reader(config, backbone, compute.device)
    model = finetuned.build(backbone, config, len(splits.learn.classes)).to(compute.device)
    if config.runtime.implementation != "reference":
        model.accelerate(compute.dtype or torch.float32, compute.fp8)
    state = fresh_state(model, config, compute)
    if config.output.resume:
        finetune_state.resume_from(state, out / output.CHECKPOINTS, identity, reader.skipped)
    count = sum(p.numel() for p in trained(model).values())
    log.info("%s: %d trainable parameters, %d images", config.method, count, len(splits.learn.y))
    learn, choose = _sources(model, splits, config, compute, reader, out)
    try:
        _train(state, learn, choose, config, compute, reader, out, identity)
    finally:
        with contextlib.suppress(OSError):
            write_skipped(out / "skipped.csv", [*splits.learn.source.problems, *reader.skipped.items()])
    if state.best_tensors:
        with torch.no_grad():
            for name, parameter in trained(model).items():
                parameter.copy_(state.best_tensors[name])
    predicted, truth = predict(model, _in_order(splits.test, reader), compute)
    figures = {
        "top1": top1(predicted, truth),
        "balanced": balanced(predicted, truth),
        "trainable_parameters": count,
        "seconds": state.seconds,
        "peak_bytes": peak_bytes(compute.device),
    }
    with output.writing(out):
        tensors: dict[str, Tensor] = dict(trained(model))
        finetuned.save(out / MODEL, tensors, config, splits.learn.classes)
        text = (json.dumps(figures, indent=2) + "\n").encode()
        write_atomic(out / RESULT, text)
    if config.json is not None:
        try:
            write_atomic(Path(config.json), text)
        except OSError as error:
            raise ConfigError(f"json: cannot write {config.json}: {error.strerror}") from error
    return FinetuneResult(out / MODEL, figures, state.epoch, state.best_epoch)


def fresh_state(model: Any, config: FinetuneConfig, compute: Compute) -> State:
    """The state before the first step."""
    taps = model.side.taps if isinstance(model, Losa) else ()
    groups = parameter_groups(
        model,
        len(model.vit.blocks),
        weight_decay=config.optimization.weight_decay,
        layer_decay=config.optimization.layer_decay,
        taps=taps,
    )
    optimizer = torch.optim.AdamW(groups, lr=config.optimization.lr or 0.0, betas=(0.9, 0.999), fused=True)
    scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16")
    return State(model, optimizer, scaler)


Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]
InOrder = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def _sources(
    model: Any, splits: Splits, config: FinetuneConfig, compute: Compute, reader: Reader, out: Path
) -> tuple[Batches, InOrder]:
    """Batches to learn from, from a step on, and those that choose the epoch: of images, or of frozen activations."""
    if config.cache == "off":
        return lambda step: reader.training(splits.learn, step), lambda: _in_order(splits.choose, reader)
    parts = [splits.learn, splits.choose]
    learn, choose = feature_cache.fill(model, parts, reader, compute, config.cache, out)
    if len(learn.y) < config.optimization.batch_size:
        batch = config.optimization.batch_size
        raise DataError(f"data: {len(learn.y)} readable images, fewer than --batch-size {batch}")
    cached: Cached = learn
    return (
        lambda step: cached.training(config.optimization.batch_size, config.runtime.seed, step, compute.device),
        lambda: choose.in_order(config.optimization.batch_size, compute.device),
    )


def _in_order(data: Labelled, reader: Reader) -> Iterator[tuple[Tensor, Tensor]]:
    for indices, x in reader.in_order(data):
        yield x, data.y[indices]


def _train(
    state: State,
    learn: Batches,
    choose: InOrder,
    config: FinetuneConfig,
    compute: Compute,
    reader: Reader,
    out: Path,
    identity: Identity,
) -> None:
    per_epoch = identity.data["images"] // config.optimization.batch_size
    steps, logits = config.optimization.epochs * per_epoch, make_logits(state.model, config)
    mix = make_mixup(config, state.model.head.out_features)  # type: ignore[union-attr,arg-type]
    batches = learn(state.step)
    with Metrics(out / "metrics.jsonl", state.step) as metrics, signals() as requests:
        while state.step < steps and not _is_over(state, config):
            began = time.monotonic()
            x, y = next(batches)
            row = train_step(state, x, y, logits, mix, config, compute, steps)
            is_last = state.step % per_epoch == 0
            if is_last:
                if config.optimization.held_out:
                    accuracy = top1(*predict(state.model, choose(), compute, logits))
                    state.end_epoch(accuracy)
                    row["held_out_top1"] = accuracy
                else:
                    state.epoch += 1
                log.info("epoch %d of %d: %s", state.epoch, config.optimization.epochs, _summary(row, state))
            state.seconds += time.monotonic() - began
            stop, save = requests.poll()
            with output.writing(out):
                metrics.write(row)
                if is_last or stop or save:
                    metrics.sync()
                    finetune_state.save(state, out / output.CHECKPOINTS, identity, reader.skipped)
            if state.bad >= MAX_BAD_STEPS:
                raise RunFailedError(f"step {row['step']}: {row['bad']}, {state.bad} in a row; lower --lr")
            if stop and state.step < steps:
                raise Interrupted(
                    f"stopped after {state.step} of {steps} steps, all saved; go on with the same command and --resume"
                )
    if isinstance(batches, Generator):
        batches.close()


def _is_over(state: State, config: FinetuneConfig) -> bool:
    """Whether the last epochs brought nothing."""
    patience = config.optimization.patience
    return bool(config.optimization.held_out and patience and state.epoch - 1 - state.best_epoch >= patience)


def _summary(row: dict[str, Any], state: State) -> str:
    text = f"loss {row['loss']:.3f}"
    if "held_out_top1" in row:
        text += f", held-out top-1 {row['held_out_top1']:.1f}, best {state.best:.1f} in epoch {state.best_epoch + 1}"
    return text
