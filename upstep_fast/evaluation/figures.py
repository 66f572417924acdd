"""The figures of eval: accuracies and gains with their 95 % intervals, and notes on what limits them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upstep_fast.data.labeled.splits import Labeled
from upstep_fast.evaluation.classifiers import PROBE_WEIGHTS, Probe
from upstep_fast.evaluation.intervals import Values, gain_interval, percent, score_interval

NEARLY_EQUAL = 1e-4  # 1 - cosine below which the images themselves are compared


def with_intervals(values: Mapping[str, Mapping[str, Values]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ({model: {measure: percent}}, {"intervals": ..., "gains": ...}) of scores of the same images.

    values: {model: {measure: ...}} with "base". A gain is against the base model's unwhitened features; it is within
    the error if its interval holds 0.
    """
    percents, intervals, gains = {}, {}, {}
    for model, of_measure in values.items():
        percents[model] = {name: percent(x) for name, x in sorted(of_measure.items())}
        intervals[model] = {name: score_interval(x) for name, x in of_measure.items()}
        gains[model] = {
            name: _gain(values["base"][name.removesuffix("_whitened")], x)
            for name, x in of_measure.items()
            if model != "base" or name.endswith("_whitened")
        }
    return percents, {"intervals": intervals, "gains": {model: of for model, of in gains.items() if of}}


def _gain(before: Values, after: Values) -> dict[str, Any]:
    low, high = gain_interval(before, after)
    return {"points": percent(after) - percent(before), "interval": [low, high], "within_error": low <= 0 <= high}


def probe_facts(probe: Probe) -> dict[str, Any]:
    """Return what a reader of a linear probe's accuracy must know, as JSON values."""
    return {"l2": probe.l2, "at_edge": probe.at_edge, "converged": probe.converged}


def probe_notes(probes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """Yield one line a shortcoming of the probes. probes: {model: {measure: probe_facts}}."""
    named = [(f"{model} {name.replace('_', ' ')}", facts) for model, of in probes.items() for name, facts in of.items()]
    if unfinished := [name for name, facts in named if not facts["converged"]]:
        yield f"the linear probe has not converged: {', '.join(unfinished)}"
    for l2, side in ((PROBE_WEIGHTS[-1], "smallest"), (PROBE_WEIGHTS[0], "largest")):
        if at_edge := [name for name, facts in named if facts["at_edge"] and facts["l2"] == l2]:
            yield f"the {side} L2 weight tried, {l2:g}, was the best; one beyond may be better: {', '.join(at_edge)}"


def data_notes(train: Labeled, test: Labeled, x_train: Tensor, x_test: Tensor, k: int) -> Iterator[str]:
    """Yield one line for each way in which labeled images make the figures mean little.

    x_train, x_test: [N, D] unit features of the images that were read, in the order of `train` and `test`. k: neighbors
    asked for.
    """
    if k > len(x_train):
        yield f"k: {k} neighbors were asked for, there are {len(x_train)} training images; k is {len(x_train)}"
    yield from shared_files_note(test.source)
    if equal := count_equal(train.source, test.source, x_train, x_test):
        yield (
            f"{equal} of {len(x_test)} test images are training images too, byte for byte: the figures are too high; "
            "leave them out of one part"
        )


def shared_files_note(source: Any) -> Iterator[str]:
    """Yield a line if images of a `Source` are pictures of one file, which are alike."""
    groups = source.groups()
    if groups is not None and (files := len(np.unique(groups))) < len(groups):
        yield (
            f"the {len(groups):,} measured images are pictures of {files:,} files or series: the 95 % intervals count "
            "them as independent, so they are too narrow"
        )


def count_equal(train: Any, test: Any, x_train: Tensor, x_test: Tensor) -> int:
    """Return how many images of `test` are in `train` byte for byte.

    train, test: sources, with the features of their images in order. Only images with nearly equal features are
    compared, so that files are read again only where there is something to find.
    """
    nearest = [(part @ x_train.T).max(1) for part in x_test.split(1024)]
    similarity, index = (torch.cat([getattr(part, name) for part in nearest]) for name in ("values", "indices"))
    near = (similarity > 1 - NEARLY_EQUAL).nonzero().flatten().tolist()
    return sum(test.digest(i) == train.digest(int(index[i])) for i in near)
