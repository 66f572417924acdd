"""How good features are: k-NN, linear probe, the ensemble with the base model, forgetting."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from upstep_fast.config.evaluate import EvalConfig
from upstep_fast.config.flat import from_flat
from upstep_fast.data.labelled.splits import train_and_test
from upstep_fast.evaluation import whitening
from upstep_fast.evaluation.classifiers import knn, linear_probe
from upstep_fast.evaluation.embeddings import _write_text
from upstep_fast.evaluation.features import Extracted, Features, Form, append_whitened, extract, load_models, unwhitened
from upstep_fast.model.backbone import Backbone
from upstep_fast.runtime import distributed
from upstep_fast.runtime.device import Compute, resolve

log = logging.getLogger("upstep_fast")


Measure = Callable[[Features, Features], float]  # train, test -> percent


def evaluate(
    model: str,
    data: str | Path | Sequence[str | Path],
    *,
    adapter: str | Path | None = None,
    source: str | Path | None = None,
    k: int = 20,
    **options: Any,
) -> dict[str, Any]:
    """k-NN and linear-probe accuracy in percent of base, adapted and ensemble features; keywords are EvalConfig's.

    data and source hold train/CLASS/... and test/CLASS/... . Returns
    {"base": {"knn", "knn_whitened", "linear", "linear_whitened"}, "adapted": {...}, "ensemble": {...},
    "source": {"base", "adapted", "ensemble"}, "source_whitened": {...}, "n_train", "n_test", "k"}, without the parts
    that were not asked for. whitened: with whitened features beside the others (whitening.py), fitted to train.
    """
    paths = (data,) if isinstance(data, (str, Path)) else data
    return run(
        from_flat(
            EvalConfig,
            model=model,
            data=tuple(str(p) for p in paths),
            adapter=None if adapter is None else str(adapter),
            source=None if source is None else str(source),
            k=k,
            **options,
        )
    )


def run(config: EvalConfig) -> dict[str, Any]:
    """As `evaluate`; writes config.json if given. Raises UpstepError."""
    compute = resolve(config.runtime.device, config.runtime.precision)
    with distributed.joined(compute.device):
        return _run(config, compute)


def _run(config: EvalConfig, compute: Compute) -> dict[str, Any]:
    models = load_models(config)
    result: dict[str, Any] = {}
    train, test = _train_and_test(config.data.paths, models, config, compute)
    whitened = partial(append_whitened, fitted={name: whitening.fit(x) for name, x in train.x.items()})

    def accuracy(of: Measure, form: Form, bank: Extracted, queries: Extracted) -> dict[str, float]:
        pairs = zip(bank.features(form).items(), queries.features(form).values(), strict=True)
        return {kind: of(of_bank, of_queries) for (kind, of_bank), of_queries in pairs}

    measures: dict[str, Measure] = {"knn": partial(knn, k=config.k), "linear": linear_probe}
    for measure, of in measures.items():
        for form, name in ((unwhitened, measure), (whitened, f"{measure}_whitened")):
            for kind, percent in accuracy(of, form, train, test).items():
                result.setdefault(kind, {})[name] = percent
    if config.source is not None:
        bank, queries = _train_and_test((config.source,), models, config, compute)
        result["source"] = accuracy(measures["knn"], unwhitened, bank, queries)
        result["source_whitened"] = accuracy(measures["knn"], whitened, bank, queries)
    result |= {"n_train": len(train.y), "n_test": len(test.y), "k": config.k}
    if config.json is not None and distributed.is_first():
        _write_text(Path(config.json), json.dumps(result, indent=2) + "\n", "json")
    return result


def _train_and_test(
    paths: Sequence[str], models: dict[str, Backbone], config: EvalConfig, compute: Compute
) -> tuple[Extracted, Extracted]:
    found = []
    for part in train_and_test(paths, "eval"):
        x, read = extract(part.source, models, config, compute)
        found.append(Extracted(x, part.y[read], part.classes))
    return found[0], found[1]
