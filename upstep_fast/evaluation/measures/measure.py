"""The measures of eval on the features of a training and a test part: each from one function, in every form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upstep_fast.evaluation.classifiers import knn_right, probe
from upstep_fast.evaluation.features import Extracted, Features, Form
from upstep_fast.evaluation.figures import probe_facts, with_intervals
from upstep_fast.evaluation.intervals import Values
from upstep_fast.evaluation.measures.clusters import cluster_scores
from upstep_fast.evaluation.measures.few_shot import SHOTS, few_shot_right
from upstep_fast.evaluation.measures.retrieval import RECALL_AT, retrieval
from upstep_fast.runtime.progress import track

NEAREST = "recall_at_1"  # of a query: its nearest neighbor is right
NAMED = 5  # classes of a note


@dataclass(frozen=True)
class Measured:
    """Scores by model and measure, and what their reader must know."""

    values: dict[str, dict[str, Values]] = field(default_factory=dict)  # {model: {measure: per image}}
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)  # {model: {measure: probe_facts}}
    per_class: list[dict[str, Any]] = field(default_factory=list)  # the worst class first


def measure(
    train: Extracted,
    test: Extracted,
    forms: Mapping[str, Form],
    measures: tuple[str, ...],
    k: int,
    groups: np.ndarray | None,
) -> Measured:
    """Measure every model in every form. forms: by the suffix of the measures' names.

    measures: of `config.evaluate.MEASURES`. k, groups: see `knn_right`, `probe`.
    """
    measured = Measured()
    for suffix, form in forms.items():
        queries = test.features(form)
        for model, bank in train.features(form).items():
            values = measured.values.setdefault(model, {})
            for name in measures:
                with track(f"eval: {name}, {model}{suffix.replace('_', ' ')}"):
                    scores = _scores(name, bank, queries[model], k)
                    if name == "linear":
                        probed = probe(bank, queries[model], groups=groups)
                        scores = {name: probed.right}
                        measured.probes.setdefault(model, {})[f"linear{suffix}"] = probe_facts(probed)
                values |= {f"{key}{suffix}": x for key, x in scores.items()}
    if "per-class" in measures:
        measured.per_class.extend(per_class(measured.values, train, test))
    return measured


def _scores(name: str, train: Features, test: Features, k: int) -> dict[str, Values]:
    """Return the scores of one measure by their names. linear, per-class: none."""
    if name == "knn":
        return {name: knn_right(train, test, k)}
    if name == "retrieval":
        found = retrieval(train, test)
        return dict(found.values) if len(found.queries) else {}
    if name == "few-shot":
        return {f"few_shot_{shots}": few_shot_right(train, test, shots) for shots in SHOTS}
    if name == "clusters" and len(test.y.unique()) > 1:
        return cluster_scores(test.x, test.y)
    return {}


def per_class(values: Mapping[str, Mapping[str, Values]], train: Extracted, test: Extracted) -> list[dict[str, Any]]:
    """Return one row a class that has test images: k-NN accuracy and precision of the nearest neighbor, worst first.

    Each row has the entries of `with_intervals` of the images of that class, and "class", "n_train", "n_test".
    """
    n_train = torch.bincount(train.y, minlength=len(train.classes)).tolist()
    rows = []
    for number in test.y.unique().tolist():
        of_class = test.y == number
        own: dict[str, dict[str, Values]] = {model: dict(_of_class(of, of_class)) for model, of in values.items()}
        percents, details = with_intervals(own)
        facts = {"class": test.classes[number], "n_train": n_train[number], "n_test": int(of_class.sum())}
        rows.append(facts | percents | details)
    last = "adapted" if "adapted" in values else "base"
    return sorted(rows, key=lambda row: (*sorted(row[last].items())[:1], row["class"]))


def _of_class(values: Mapping[str, Values], of_class: Tensor) -> Iterator[tuple[str, Values]]:
    for name, x in values.items():
        if name.removesuffix("_whitened") in ("knn", NEAREST) and isinstance(x, Tensor) and len(x) == len(of_class):
            yield name, x[of_class]


def measure_notes(measures: tuple[str, ...], train: Extracted, test: Extracted) -> Iterator[str]:
    """Yield one line for each thing that a measure could not do with these images."""
    n_train, n_test = (torch.bincount(part.y, minlength=len(train.classes)) for part in (train, test))
    absent = [name for name, n in zip(train.classes, n_test.tolist(), strict=True) if not n]
    if absent and "per-class" in measures:
        yield f"per-class: no test images of {_named(absent)}"
    if "retrieval" in measures and len(train.y) < max(RECALL_AT):
        yield f"retrieval: there are {len(train.y)} training images; recall at more of them is 100 %"
    if "few-shot" in measures:
        for shots in SHOTS:
            few = [name for name, n in zip(train.classes, n_train.tolist(), strict=True) if n < shots]
            if few:
                yield f"few-shot: fewer than {shots} training images, all are used: {_named(few)}"
    if "clusters" in measures and int((n_test > 0).sum()) < 2:
        yield "clusters: all test images are of one class, so there is nothing to compare with; not measured"


def _named(classes: list[str]) -> str:
    more = len(classes) - NAMED
    return ", ".join(classes[:NAMED]) + (f" and {more:,} more classes" if more > 0 else "")
