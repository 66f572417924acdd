"""Supervised fine-tuning: a classifier on a frozen, partly trained or fully trained backbone.

train/ is split into images to learn from and held-out ones that choose the epoch; test/ is read once, at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from upstep_fast.config.files import from_options
from upstep_fast.config.finetune import FinetuneConfig
from upstep_fast.config.options import FinetuneOptions
from upstep_fast.config.signatures import with_keywords
from upstep_fast.data.labeled.batches import Reader
from upstep_fast.data.labeled.reader import ReaderOptions
from upstep_fast.data.labeled.splits import Labeled, log_splits
from upstep_fast.data.loading.skipped_images import write_skipped
from upstep_fast.data.views.view_config import view_config
from upstep_fast.errors import ConfigError, DataError
from upstep_fast.kernels import _dispatch as dispatch
from upstep_fast.methods.trainable import trained
from upstep_fast.model.backbone import Backbone
from upstep_fast.report.logs import held_messages, train_log
from upstep_fast.report.metrics import Metrics
from upstep_fast.runtime import distributed
from upstep_fast.runtime import run_folder as output
from upstep_fast.runtime.atomic_file import require_writable, write_atomic
from upstep_fast.runtime.device import Compute, resolve
from upstep_fast.runtime.machine import num_workers, peak_bytes
from upstep_fast.runtime.progress import track
from upstep_fast.train.cost import log_finetune
from upstep_fast.train.finetune import classifier as finetuned
from upstep_fast.train.finetune import feature_cache
from upstep_fast.train.finetune import state as finetune_state
from upstep_fast.train.finetune.learned import fingerprints
from upstep_fast.train.finetune.loop import Batches, InOrder, train
from upstep_fast.train.finetune.splits import Splits, fit_to_data, read_splits
from upstep_fast.train.finetune.state import State
from upstep_fast.train.finetune.step import balanced, predict, top1
from upstep_fast.train.identity import Identity, identify
from upstep_fast.train.intensity import as_recorded, with_intensity_of_splits
from upstep_fast.version import __version__

log = logging.getLogger("upstep_fast")

MODEL, RESULT = finetuned.MODEL, "result.json"


@dataclass(frozen=True)
class FinetuneResult:
    """Result of a finished run."""

    model: Path
    metrics: dict[str, float]  # content of --json
    epochs: int
    best_epoch: int


@with_keywords(FinetuneConfig)
def finetune(
    model: str | Path, data: str | Path | Sequence[str | Path], out: str | Path, **keywords: Unpack[FinetuneOptions]
) -> FinetuneResult:
    """Train a classifier on labeled images and write it to the folder `out`.

    data: a folder with train/CLASS/... and test/CLASS/..., or CLASS/... . Keywords are the flags of
    `upstep-fast finetune --help-all`. Raises UpstepError.
    """
    return run(from_options(FinetuneConfig, {"model": model, "data": data, "out": out, **keywords}, "finetune"))


@track("finetune")
def run(config: FinetuneConfig) -> FinetuneResult:
    """Run one fine-tuning. Raises UpstepError, with the exit code of the command line."""
    if distributed.local_size() > 1:
        raise ConfigError("finetune: runs on one device; start it without torchrun")
    if config.json is not None:
        require_writable(Path(config.json), "json")
    compute = resolve(config.runtime.device, config.runtime.precision, config.runtime.implementation)
    config = as_recorded(config)
    splits = read_splits(config)
    output.check(config)  # before weights are fetched
    requested, config = config, fit_to_data(config, splits)
    backbone, base = finetuned.load_backbone(config)
    config, splits = with_intensity_of_splits(config, splits, len(backbone.mean))
    implementation = None if config.runtime.implementation == "auto" else config.runtime.implementation
    with output.lock_run_folder(config) as out, dispatch.forced(implementation):
        with held_messages() as messages:
            _log_start(requested, config, compute, splits)
            # all that can refuse the configuration comes before anything in the folder is changed
            prepared = _prepare(config, compute, splits, backbone, out)
            images = (len(splits.learn.y), len(splits.choose.y), len(splits.test.y))
            left = config.optimization.epochs - prepared.state.epoch
            log_finetune(config, compute, images, backbone, prepared.num_trained, left)
        output.begin(config, anew=prepared.state.step == 0)
        with train_log(out / "train.log", messages):
            return _run(config, compute, splits, prepared, base, out)


def _log_start(requested: FinetuneConfig, config: FinetuneConfig, compute: Compute, splits: Splits) -> None:
    log.info("upstep-fast %s, torch %s, %s in %s", __version__, torch.__version__, compute.device, compute.precision)
    was, batch = requested.optimization.batch_size, config.optimization.batch_size
    if was != batch:
        log.warning("batch_size: reduced from %d to %d for the images there are", was, batch)
    log_splits(splits.learn, splits.test, splits.copies)


def make_reader(config: FinetuneConfig, backbone: Backbone, device: torch.device) -> Reader:
    """Return the reader of this run's images or clips."""
    preset = config.views.preset
    like: Any = {"size": backbone.img_size, "mean": backbone.mean, "std": backbone.std}
    options = ReaderOptions(
        size=backbone.img_size,
        mean=backbone.mean,
        std=backbone.std,
        interpolation=backbone.interpolation,
        crop_pct=backbone.crop_pct,
        crop_mode=backbone.crop_mode,
        views=None if preset == "none" else view_config(preset, **like, **config.views.overrides()),
        batch_size=config.optimization.batch_size,
        seed=config.runtime.seed,
        num_workers=num_workers(config.data.num_workers),
        max_bad_fraction=config.data.max_bad_fraction,
        device=device,
        frames=config.frames,
    )
    return Reader(options)


@dataclass(frozen=True)
class _Prepared:
    """A run before its first step, or at the checkpoint that it continues."""

    identity: Identity
    reader: Reader
    model: Any  # Losa or Baseline
    state: State
    cache: Tensor | None  # room for frozen activations, None without --cache

    @property
    def num_trained(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in trained(self.model).values())


def _prepare(config: FinetuneConfig, compute: Compute, splits: Splits, backbone: Backbone, out: Path) -> _Prepared:
    if compute.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(compute.device)
    identity = identify(config, compute, splits.learn.source, backbone)
    settings = {name: value for name, value in identity.config.items() if name not in ("json", "cache", "adapter")}
    identity = replace(identity, config=settings, data=identity.data | {"labels": _labels(splits)})
    reader = make_reader(config, backbone, compute.device)
    model = finetuned.build(backbone, config, len(splits.learn.classes)).to(compute.device)
    if config.runtime.implementation != "reference":
        model.accelerate(compute.dtype or torch.float32, compute.fp8)
    state = finetune_state.fresh_state(model, config, compute)
    if config.output.resume:
        finetune_state.resume_from(state, out / output.CHECKPOINTS, identity, reader.skipped)
    cache = None
    if config.cache != "off":
        cache = feature_cache.reserve(model, [splits.learn, splits.choose], reader, compute, config.cache, out)
    return _Prepared(identity, reader, model, state, cache)


def _labels(splits: Splits) -> str:
    """Return the SHA-256 of the class names and train/'s labels, which no file's name or size need tell."""
    labels = [splits.learn.classes, splits.learn.y.tolist(), splits.choose.y.tolist()]
    return hashlib.sha256(json.dumps(labels).encode()).hexdigest()


def _run(
    config: FinetuneConfig, compute: Compute, splits: Splits, prepared: _Prepared, base: dict[str, Any], out: Path
) -> FinetuneResult:
    """Train, measure and write. base: identity of the base model."""
    state, flags = prepared.state, prepared.identity.config
    with Metrics(out / "metrics.jsonl", state.step, config.output.log_to, flags) as metrics:
        _train(config, compute, splits, prepared, out, metrics)
        predicted, truth = predict(prepared.model, _in_order(splits.test, prepared.reader), compute)
        figures = {
            "top1": top1(predicted, truth),
            "balanced": balanced(predicted, truth),
            "trainable_parameters": prepared.num_trained,
            "seconds": state.seconds,
            "peak_bytes": peak_bytes(compute.device),
        }
        learned = None if config.frames else _learned(splits, config)
        _write(prepared.model, config, splits, figures, out, base, learned)
        metrics.conclude(state.step, figures)
    return FinetuneResult(out / MODEL, figures, state.epoch, state.best_epoch)


def _train(
    config: FinetuneConfig, compute: Compute, splits: Splits, prepared: _Prepared, out: Path, metrics: Metrics
) -> None:
    """Train in place; at the end the model has the best epoch's weights."""
    state, reader = prepared.state, prepared.reader
    try:
        batches = _batches(prepared, splits, config, compute)
        train(state, *batches, config, compute, reader.skipped, out, prepared.identity, metrics)
    finally:
        with contextlib.suppress(OSError):
            if output.is_own(out):
                write_skipped(out / "skipped.csv", [*splits.learn.source.problems, *reader.skipped.items()])
    if state.best_tensors:
        with torch.no_grad():
            for name, parameter in trained(prepared.model).items():
                parameter.copy_(state.best_tensors[name])


def _learned(splits: Splits, config: FinetuneConfig) -> Tensor:
    """Return size and hash of the images that the run has learned from or chosen its epoch by, for `predict`."""
    parts, workers = (splits.learn, splits.choose), num_workers(config.data.num_workers)
    return torch.cat([fingerprints(part.source, range(len(part.y)), workers) for part in parts])


def _write(
    model: Any,
    config: FinetuneConfig,
    splits: Splits,
    metrics: dict[str, float],
    out: Path,
    identity: dict[str, Any],
    learned: Tensor | None,
) -> None:
    """Write OUT/model, OUT/result.json and --json. Raises RunFailedError or ConfigError if one cannot be written."""
    text = (json.dumps(metrics, indent=2) + "\n").encode()
    with output.writing(out):
        tensors: dict[str, Tensor] = dict(trained(model))
        finetuned.save(out / MODEL, tensors, config, splits.learn.classes, identity, learned)
        write_atomic(out / RESULT, text)
    if config.json is not None:
        try:
            write_atomic(Path(config.json), text)
        except OSError as error:
            raise ConfigError(f"json: cannot write {config.json}: {error.strerror}") from error


def _batches(prepared: _Prepared, splits: Splits, config: FinetuneConfig, compute: Compute) -> tuple[Batches, InOrder]:
    """Return the batches to learn from and those that choose the epoch: of images, or of cached frozen activations.

    Raises DataError if fewer images than a batch are readable.
    """
    reader, batch = prepared.reader, config.optimization.batch_size
    if prepared.cache is None:
        return lambda step: reader.training(splits.learn, step), lambda: _in_order(splits.choose, reader)
    parts = [splits.learn, splits.choose]
    learn, choose = feature_cache.fill(prepared.cache, prepared.model, parts, reader, compute)
    if len(learn.y) < batch:
        raise DataError(f"data: {len(learn.y)} readable images, fewer than --batch-size {batch}")
    return (
        lambda step: learn.training(batch, config.runtime.seed, step, compute.device),
        lambda: choose.in_order(batch, compute.device),
    )


def _in_order(data: Labeled, reader: Reader) -> Iterator[tuple[Tensor, Tensor]]:
    for indices, x in reader.in_order(data):
        yield x, data.y[indices]
