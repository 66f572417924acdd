"""The predict command: classes of images by a fine-tuned model, and its accuracy where they have labels.

    OUT.csv             path,class,probability, and with --top the column top
    OUT-classes.csv     with labels: class,images,predicted,precision,recall
    OUT-confusion.csv   with labels: a row for each true class, a column for each predicted one

All images get a row. Measured are those with a label that is a class of the model, without the images that it has
learned from (learned.py).
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upstep_fast.config.flat import replace_flat
from upstep_fast.config.predict import PredictConfig
from upstep_fast.config.reading import merged
from upstep_fast.config.run_reading import log_taken
from upstep_fast.data.curation.intensity import measure_intensity
from upstep_fast.data.loading.skipped_images import csv_cell
from upstep_fast.data.sources.source import Source, open_configured
from upstep_fast.data.sources.subset import subset
from upstep_fast.errors import ConfigError
from upstep_fast.evaluation.confusion import class_figures, confusion_matrix
from upstep_fast.evaluation.figures import shared_files_note
from upstep_fast.evaluation.intervals import accuracy_interval
from upstep_fast.runtime import distributed
from upstep_fast.runtime.atomic_file import require_writable, write_errors
from upstep_fast.runtime.commit import commit_together, settle
from upstep_fast.runtime.device import resolve
from upstep_fast.runtime.machine import num_workers
from upstep_fast.runtime.progress import track
from upstep_fast.train.finetune import classifier as finetuned
from upstep_fast.train.finetune.classify import Predicted, classify
from upstep_fast.train.finetune.learned import are_among
from upstep_fast.train.finetune.step import balanced, top1

log = logging.getLogger("upstep_fast")

CURE = "make room, or give another --out"
MAX_MATRIX = 1000  # classes, of a confusion matrix


@dataclass(frozen=True)
class Measured:
    """Predicted and true classes of the images that count."""

    predicted: Tensor  # [n] int64
    truth: Tensor  # [n] int64
    learned: int  # labeled images left out, as the model has learned from them

    @property
    def top1(self) -> float:
        """Accuracy in percent."""
        return top1(self.predicted, self.truth)

    @property
    def balanced(self) -> float:
        """Mean accuracy of the classes that occur, in percent."""
        return balanced(self.predicted, self.truth)

    @property
    def interval(self) -> list[float]:
        """95 % interval of `top1`."""
        return accuracy_interval(self.predicted == self.truth)


@dataclass(frozen=True)
class PredictResult:
    """Result of the command."""

    files: tuple[Path, ...]  # written, OUT.csv first
    images: int
    classes: int
    measured: Measured | None


def run(config: PredictConfig) -> PredictResult:
    """Run the predict command. Raises UpstepError."""
    if distributed.local_size() > 1:
        raise ConfigError("predict: runs on one device; start it without torchrun")
    out = Path(config.out)
    _check_files(out, config.overwrite)
    compute = resolve(config.runtime.device, config.runtime.precision, config.runtime.implementation)
    with track("predict"):
        recorded = finetuned.read_reading(config.run)
        config = replace_flat(config, **merged(recorded, vars(config.data)))
        log_taken(recorded, config.data, config.run)
        source = open_configured(config.data)
        log.info("data: %s", source.summary)
        net, backbone = finetuned.load(config.run, model=config.model)
        source = measure_intensity(source, channels=len(backbone.mean), workers=config.data.num_workers)
        if net.frames > 1:
            raise ConfigError(f"run: {config.run} classifies clips; call the model of upstep_fast.load_finetuned")
        net.to(compute.device)
        if config.runtime.implementation != "reference":
            net.accelerate(compute.dtype or torch.float32, compute.fp8)
        found = classify(net, backbone, source, compute, config.batch_size, config.data, config.top or 1)
        measured = _measure(found, source, net.classes, config)
        contents = {out: _predictions(found, source, net.classes, config.top)}
        if measured is not None:
            contents |= _tables(out, measured, net.classes)
        _write(out, contents)
    return PredictResult(tuple(contents), len(found.indices), len(net.classes), measured)


def _measure(found: Predicted, source: Source, classes: tuple[str, ...], config: PredictConfig) -> Measured | None:
    """Return predicted and true classes of the labeled images that the model has not learned from; None if none."""
    labels = source.labels
    if labels is None:
        return None
    index = {name: i for i, name in enumerate(classes)}
    truth = torch.tensor([index.get(labels[i], -1) for i in found.indices])
    if unknown := sorted({labels[i] for i in found.indices} - set(index)):
        what = "are measured" if (truth >= 0).any() else "are measured, as no image has a class of the model"
        log.warning("data: no images of %s %s", ", ".join(unknown[:5]), what)
    keep = (truth >= 0).nonzero()[:, 0]
    learned = torch.zeros(len(keep), dtype=torch.bool)
    known = finetuned.read_learned(config.run)
    if known is None:
        if len(keep):
            log.warning(
                "run: %s does not tell which images it has learned from; on those the accuracy is too high", config.run
            )
    else:
        learned = are_among(source, [found.indices[i] for i in keep], known, num_workers(config.data.num_workers))
    if learned.any():
        text = "data: %d of %d labeled images are left out of the accuracy, as the model has learned from them"
        log.warning(text, int(learned.sum()), len(keep))
    keep = keep[~learned]
    for note in shared_files_note(subset(source, np.array([found.indices[i] for i in keep], np.int64))):
        log.info("data: %s", note)
    return Measured(found.likeliest[keep, 0], truth[keep], int(learned.sum())) if len(keep) else None


def files_of(out: Path) -> tuple[Path, Path]:
    """Return the names of the tables beside the predictions: per class, and the confusion matrix."""
    return out.with_name(f"{out.stem}-classes.csv"), out.with_name(f"{out.stem}-confusion.csv")


def _predictions(found: Predicted, source: Source, classes: Sequence[str], top: int | None) -> bytes:
    def rows() -> Iterator[list[str]]:
        likeliest, probability = found.likeliest.tolist(), found.probability.tolist()
        for index, of, p in zip(found.indices, likeliest, probability, strict=True):
            row = [csv_cell(source.name(index)), csv_cell(classes[of[0]]), f"{p[0]:.6g}"]
            if top is not None:
                named = {classes[c]: float(f"{value:.6g}") for c, value in zip(of, p, strict=True)}
                row.append(json.dumps(named))
            yield row

    return _csv(["path", "class", "probability", *(["top"] if top is not None else [])], rows())


def _tables(out: Path, measured: Measured, classes: Sequence[str]) -> dict[Path, bytes]:
    """Return {file: content} of the table per class and of the confusion matrix."""
    per_class, matrix = files_of(out)
    cells = [csv_cell(name) for name in classes]
    by = class_figures(measured.predicted, measured.truth, len(classes))
    columns = (
        by.images.tolist(),
        by.predicted.tolist(),
        map(_share, by.precision.tolist()),
        map(_share, by.recall.tolist()),
    )
    header = ["class", "images", "predicted", "precision", "recall"]
    tables = {per_class: _csv(header, zip(cells, *columns, strict=True))}
    if len(classes) > MAX_MATRIX:
        log.warning("out: no confusion matrix of %d classes is written, only up to %d", len(classes), MAX_MATRIX)
        return tables
    counts = confusion_matrix(measured.predicted, measured.truth, len(classes)).tolist()
    rows = ([name, *row] for name, row in zip(cells, counts, strict=True))
    return tables | {matrix: _csv(["true class", *cells], rows)}


def _share(value: float) -> str:
    return "" if value != value else f"{value:.6g}"


def _csv(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode()


def _check_files(out: Path, overwrite: bool) -> None:
    """Raise ConfigError, before slow work, if `out` or a table beside it cannot be written."""
    files = (*files_of(out), out)
    with write_errors("the predictions", CURE):
        settle(list(files), "out")
    for path in files:
        if os.path.lexists(path) and not overwrite:
            raise ConfigError(f"out: {path} exists; choose another name or add --overwrite")
        require_writable(path, "out")


def _write(out: Path, contents: dict[Path, bytes]) -> None:
    """Write the files together, the predictions last; tables of an earlier command do not stay beside new ones."""
    with write_errors("the predictions", CURE):
        for path in files_of(out):
            if path not in contents:
                path.unlink(missing_ok=True)
        others = {path: data for path, data in contents.items() if path != out}
        commit_together(others | {out: contents[out]})
