"""The eval command: k-NN and linear-probe accuracy of base, adapted and ensemble features, and forgetting."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from upstep_fast.config.evaluate import EvalConfig
from upstep_fast.config.files import from_options
from upstep_fast.config.options import EvaluateOptions
from upstep_fast.config.signatures import with_keywords
from upstep_fast.data.labeled.splits import train_and_test
from upstep_fast.errors import ConfigError
from upstep_fast.evaluation import whitening
from upstep_fast.evaluation.classifiers import knn, linear_probe
from upstep_fast.evaluation.features import Extracted, Features, Form, append_whitened, extract, load_models, unwhitened
from upstep_fast.model.backbone import Backbone
from upstep_fast.runtime import distributed
from upstep_fast.runtime.device import Compute, resolve

log = logging.getLogger("upstep_fast")

Measure = Callable[[Features, Features], float]  # train, test -> percent


@with_keywords(EvalConfig)
def evaluate(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    **keywords: Unpack[EvaluateOptions],
) -> dict[str, Any]:
    """Measure k-NN and linear-probe accuracy of base, adapted and ensemble features.

    Keywords are the flags of `upstep-fast eval --help`. data, source: folders with train/CLASS/... and
    test/CLASS/... . Returns percentages,
    {"base": {"knn", "knn_whitened", "linear", "linear_whitened"}, "adapted": {...}, "ensemble": {...},
    "source": {"base", "adapted", "ensemble"}, "source_whitened": {...}, "n_train", "n_test", "k"}; "adapted" and
    "ensemble" only with an adapter, the "source" entries only with a source. whitened: whitened features are appended
    (whitening.py), fitted to train. Raises UpstepError.
    """
    return run(from_options(EvalConfig, {"model": model, "data": data, **keywords}, "evaluate"))


def run(config: EvalConfig) -> dict[str, Any]:
    """Run the eval command, see `evaluate`; write the file config.json if given. Raises UpstepError."""
    compute = resolve(config.runtime.device, config.runtime.precision)
    with distributed.joined(compute.device):
        return _run(config, compute)


def _run(config: EvalConfig, compute: Compute) -> dict[str, Any]:
    models = load_models(config)
    result: dict[str, Any] = {}
    train, test = _train_and_test(config.data.paths, models, config, compute)
    whitened = partial(append_whitened, fitted={name: whitening.fit(x) for name, x in train.x.items()})

    def accuracy(measure: Measure, form: Form, bank: Extracted, queries: Extracted) -> dict[str, float]:
        pairs = zip(bank.features(form).items(), queries.features(form).values(), strict=True)
        return {kind: measure(bank_features, query_features) for (kind, bank_features), query_features in pairs}

    measures: dict[str, Measure] = {"knn": partial(knn, k=config.k), "linear": linear_probe}
    for name, measure in measures.items():
        for form, key in ((unwhitened, name), (whitened, f"{name}_whitened")):
            for kind, percent in accuracy(measure, form, train, test).items():
                result.setdefault(kind, {})[key] = percent
    if config.source is not None:
        bank, queries = _train_and_test((config.source,), models, config, compute)
        result["source"] = accuracy(measures["knn"], unwhitened, bank, queries)
        result["source_whitened"] = accuracy(measures["knn"], whitened, bank, queries)
    result |= {"n_train": len(train.y), "n_test": len(test.y), "k": config.k}
    if config.json is not None and distributed.is_first():
        try:
            Path(config.json).write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"json: cannot write {config.json}: {error.strerror}") from error
    return result


def _train_and_test(
    paths: Sequence[str], models: dict[str, Backbone], config: EvalConfig, compute: Compute
) -> tuple[Extracted, Extracted]:
    parts = []
    for part in train_and_test(paths, "eval"):
        x, indices = extract(part.source, models, config, compute)
        parts.append(Extracted(x, part.y[indices], part.classes))
    return parts[0], parts[1]
