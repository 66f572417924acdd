"""The eval command: accuracy and other measures of base, adapted and ensemble features, and forgetting."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch

from upstep_fast.config.base import reading_of
from upstep_fast.config.evaluate import EvalConfig
from upstep_fast.config.files import from_options
from upstep_fast.config.options import EvaluateOptions
from upstep_fast.config.run_reading import log_of_adapter
from upstep_fast.config.signatures import with_keywords
from upstep_fast.data.curation.intensity import measure_intensity
from upstep_fast.data.labeled.splits import HeldOut, Labeled, train_and_test
from upstep_fast.data.sources.part import Columns
from upstep_fast.data.sources.source import columns_of
from upstep_fast.data.sources.splits import SPLITS
from upstep_fast.errors import RunFailedError
from upstep_fast.evaluation import whitening
from upstep_fast.evaluation.classifiers import knn_right
from upstep_fast.evaluation.dense.measure import measure_segmentation
from upstep_fast.evaluation.features import (
    Extracted,
    Features,
    Form,
    append_whitened,
    extract,
    load_models,
    log_time,
    unwhitened,
)
from upstep_fast.evaluation.figures import data_notes, probe_notes, with_intervals
from upstep_fast.evaluation.intervals import Values
from upstep_fast.evaluation.measures.measure import measure, measure_notes
from upstep_fast.model.backbone import Backbone
from upstep_fast.runtime import distributed
from upstep_fast.runtime.atomic_file import require_writable, write_atomic
from upstep_fast.runtime.device import Compute, resolve
from upstep_fast.runtime.progress import track

log = logging.getLogger("upstep_fast")


@with_keywords(EvalConfig)
def evaluate(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    **keywords: Unpack[EvaluateOptions],
) -> dict[str, Any]:
    """Measure k-NN and linear-probe accuracy, and more, of base, adapted and ensemble features.

    Keywords are the flags of `upstep-fast eval --help`. data, source: folders with train/CLASS/... and
    test/CLASS/..., or CLASS/... . Returns percentages,
    {"base": {"knn", "knn_whitened", "linear", "linear_whitened"}, "adapted": {...}, "ensemble": {...},
    "source": {"base", "adapted", "ensemble"}, "source_whitened": {...}, "n_train", "n_test", "k"}; "adapted" and
    "ensemble" only with an adapter, the "source" entries only with a source. whitened: whitened features are appended
    (whitening.py), fitted to train. k: neighbors used. Beside them "intervals", "gains" (figures.py), "probe": the L2
    weights of the linear probes and whether they converged, and "notes": what limits the figures, as sentences.
    More measures (config.evaluate.MEASURES) add keys by model: docs/adapt.md lists them.
    With masks: {"base": {"miou", "miou_whitened", "pixel_accuracy", ...}, ...} and "iou" by class (dense/measure.py).
    Raises UpstepError.
    """
    return run(from_options(EvalConfig, {"model": model, "data": data, **keywords}, "evaluate"))


def run(config: EvalConfig, report: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Run the eval command, see `evaluate`; write the file config.json if given. Raises UpstepError.

    report: called with the result on rank 0, before the file is written, so that a full disk does not lose it.
    """
    if config.json is not None and distributed.is_first():
        require_writable(Path(config.json), "json")
    compute = resolve(config.runtime.device, config.runtime.precision, config.runtime.implementation)
    with distributed.joined(compute.device, "repeat the command"):
        with track("eval"):
            result = _measure(config, compute) if config.masks is None else measure_segmentation(config, compute)
        if distributed.is_first():
            if report is not None:
                report(result)
            if config.json is not None:
                _write_json(Path(config.json), result)
    return result


def _write_json(path: Path, result: dict[str, Any]) -> None:
    try:
        write_atomic(path, (json.dumps(result, indent=2) + "\n").encode())
    except OSError as error:
        raise RunFailedError(f"json: cannot write {path}: {error.strerror or error}") from error


def _measure(config: EvalConfig, compute: Compute) -> dict[str, Any]:
    without_test = HeldOut(config.test_fraction, config.runtime.seed)
    log_of_adapter(config.adapter, config.data)
    reading = reading_of(config.data)
    parts = train_and_test(config.data.paths, "eval", columns_of(config.data), without_test, reading)
    sources = (
        None if config.source is None else train_and_test((config.source,), "eval", Columns(), without_test, reading)
    )
    models = load_models(config)  # after the data: weights may have to be fetched
    channels = len(models["base"].mean)
    reading = measure_intensity(parts[0].source, channels=channels, workers=config.data.num_workers).reading
    parts = parts[0].with_reading(reading), parts[1].with_reading(reading)
    sources = None if sources is None else (sources[0].with_reading(reading), sources[1].with_reading(reading))
    log_time(sum(len(part.y) for part in (*parts, *(sources or ()))), models, compute)
    train, test, labeled = _extract(parts, models, config, compute)
    whitened = partial(append_whitened, fitted={name: whitening.fit(x) for name, x in train.x.items()})
    k = min(config.k, len(train.y))
    forms: dict[str, Form] = {"": unwhitened, "_whitened": whitened}
    measured = measure(train, test, forms, config.measures, k, labeled[0].source.groups())
    result, details = with_intervals(measured.values)
    details |= {"per_class": measured.per_class} if measured.per_class else {}
    result |= {"n_train": len(train.y), "n_test": len(test.y), "k": k}
    if sources is not None:
        _add_source(result, details, config, forms, _extract(sources, models, config, compute, "source "))
    notes = list(data_notes(*labeled, unwhitened(train.x)["base"], unwhitened(test.x)["base"], config.k))
    notes = [*notes, *measure_notes(config.measures, train, test), *probe_notes(measured.probes)]
    return result | details | {"probe": measured.probes, "notes": notes}


def _add_source(
    result: dict[str, Any],
    details: dict[str, Any],
    config: EvalConfig,
    forms: dict[str, Form],
    source: tuple[Extracted, Extracted, object],
) -> None:
    """Add k-NN on the source domain: {"source": {model: percent}, ...}, with intervals and gains by the same keys."""
    bank, queries, _ = source
    right: dict[str, dict[str, Values]] = {}
    for suffix, form in forms.items():
        for kind, train, test in _pairs(form, bank, queries):
            right.setdefault(kind, {})[f"source{suffix}"] = knn_right(train, test, config.k)
    percents, of_source = with_intervals(right)
    result["n_source_test"] = len(queries.y)
    for key in (f"source{suffix}" for suffix in forms):
        result[key] = {kind: of[key] for kind, of in percents.items()}
        for name, values in of_source.items():
            details[name][key] = {kind: of[key] for kind, of in values.items() if key in of}


def _pairs(form: Form, train: Extracted, test: Extracted) -> Iterator[tuple[str, Features, Features]]:
    queries = test.features(form)
    yield from ((kind, bank, queries[kind]) for kind, bank in train.features(form).items())


def _extract(
    parts: tuple[Labeled, Labeled], models: dict[str, Backbone], config: EvalConfig, compute: Compute, name: str = ""
) -> tuple[Extracted, Extracted, tuple[Labeled, Labeled]]:
    extracted, read = [], []
    for split, part in zip(SPLITS, parts, strict=True):
        log.info("data: %s: %s", split, part.source.summary)
        x, indices = extract(part.source, models, config, compute, name=f"eval: {name}{split}")
        extracted.append(Extracted(x, part.y[indices], part.classes))
        read.append(part.subset(torch.tensor(indices)))
    return extracted[0], extracted[1], (read[0], read[1])
