"""The verdict of a run: whether the adapter is better than the base model, on images that were not trained on.

    label-free   d_i = change, -1 to 1, of the share of image i's two views whose nearest other view is of image i
                 score = 100 mean(d) - DRIFT (1 - CKA with the base model)           `label_free.predicted_gain`
                 interval: of mean(d) over N images with half an image more in each cell, m = sum(d) / (N + 2),
                 m -+ z sqrt(sum(d^2) + 1 - (N + 2) m^2) / (N + 2)                   as `intervals.gain_interval`
    measured     k-NN accuracy by the images' own classes, each image against the others; `intervals.gain_interval`

    better, worse             the interval lies above, below 0; label-free, worse is only a score below CLEARLY_WORSE,
                              and with VICReg, on MANY images, better is a score above 0
    no measurable change      neither

"worse" of a run means that its adapter is refused and the base model kept. A measured change goes before the score.

The label-free score is not in points of accuracy, and its "better" is an estimate. How often its words were right:
STORED, counted by bench/quality/verdict_counts.py into bench/results/verdict.md.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.evaluation.classifiers import knn_right_among
from upstep_fast.evaluation.intervals import change_interval, gain_interval
from upstep_fast.evaluation.label_free import CLEARLY_WORSE, DRIFT, linear_cka, views_found

# by objective, outcome: (gained k-NN accuracy, lost more than half a point, all) of stored adapters
STORED = {
    "clustering": {"better": (11, 0, 14), "no measurable change": (12, 10, 26), "worse": (0, 21, 21)},
    "vicreg": {"better": (39, 1, 41), "no measurable change": (9, 4, 13)},
}
MANY = 64  # images; the runs of STORED had as many at least
NEIGHBORS = 10  # of the measured verdict
FEWEST = 16  # images of a measured verdict
FILE = "verdict.json"  # in the folder of the run

Outcome = Literal["better", "no measurable change", "worse"]


@dataclass(frozen=True)
class Verdict:
    """Comparison of the written adapter with the base model.

    gain, low, high: the gain and its 95 % interval, points of k-NN accuracy if measured, else of the label-free score.
    """

    text: str  # one sentence, which starts with the outcome, after "probably" for a label-free "better"
    gain: float
    low: float
    high: float
    kind: Literal["label-free", "measured"]
    outcome: Outcome
    images: int  # that it was computed on


def label_free_verdict(base: Tensor, adapted: Tensor, objective: str = "clustering") -> Verdict:
    """Return the label-free verdict. base, adapted: [2, N, D], features of the same two views of N >= 8 images.

    objective: that the adapter was trained by, a key of STORED; others count as clustering. Adapted features that are
    not finite have the lowest score there is.
    """
    if not adapted.isfinite().all():
        lowest, text = -100 - DRIFT, "worse: the adapted model's features of held-out images are not finite"
        return Verdict(text, lowest, lowest, lowest, "label-free", "worse", adapted.shape[1])
    before, after = (F.normalize(views.float(), dim=-1) for views in (base, adapted))
    d = 0.5 * (views_found(*after).double() - views_found(*before).double()).sum(0)
    n, drift = len(d), DRIFT * (1 - linear_cka(before[0], after[0]))
    low, high = (value - drift for value in change_interval(float(d.sum()), float(d.square().sum()), n))
    gain = 100 * float(d.mean()) - drift
    kind = objective if objective in STORED else "clustering"
    outcome = score_outcome(gain, low, n, kind)
    interval = f"95 % interval {_signed(low)} to {_signed(high)}"
    word = f"probably {outcome}" if outcome == "better" else outcome
    text = (
        f"{word}: label-free score {_signed(gain)} ({interval}) on {n} held-out images; {_sureness(outcome, n, kind)}"
    )
    return Verdict(text, gain, low, high, "label-free", outcome, n)


def score_outcome(score: float, low: float, images: int, objective: str = "clustering") -> Outcome:
    """Return the outcome of a label-free score with the lower end of its interval."""
    if score < CLEARLY_WORSE:
        return "worse"
    enough = score if objective == "vicreg" and images >= MANY else low
    return "better" if enough > 0 else "no measurable change"


def measured_verdict(
    base: Tensor, adapted: Tensor, labels: Sequence[str], files: np.ndarray | None = None
) -> Verdict | None:
    """Return the verdict by labels: k-NN accuracy of each image among those of other files.

    k: as many as the other images of a class on average, at most NEIGHBORS. base, adapted: [N, D] unit features. files:
    number of each image's file, [N]; None: each image is one. Images of a class with one file are left out; None with
    fewer than FEWEST others or fewer than two classes.
    """
    of_files = range(len(labels)) if files is None else files.tolist()
    counts = Counter(label for label, _ in set(zip(labels, of_files, strict=True)))
    kept = [i for i, label in enumerate(labels) if counts[label] > 1]
    classes = sorted({labels[i] for i in kept})
    if len(kept) < FEWEST or len(classes) < 2:
        return None
    y = torch.tensor([classes.index(labels[i]) for i in kept])
    k = max(1, min(NEIGHBORS, len(kept) // len(classes) - 1))  # more would be of other classes
    among = torch.tensor([of_files[i] for i in kept])
    before, after = (knn_right_among(x[kept], y, k, among) for x in (base, adapted))
    percents = [100 * float(right.double().mean()) for right in (before, after)]
    where = f"{len(kept)} held-out images of {len(classes)} classes, each among the others"
    if (num_files := len(among.unique())) < len(kept):
        where += f" of other files; {num_files} files, whose pictures the interval counts as independent"
    return _measured(percents[0], percents[1], gain_interval(before, after), len(kept), where)


def eval_verdict(scores: Mapping[str, Any]) -> Verdict:
    """Return the verdict by the k-NN accuracy of the adapted features that `evaluate` measured with an adapter."""
    (low, high), count = scores["gains"]["adapted"]["knn"]["interval"], scores["n_test"]
    before, after = scores["base"]["knn"], scores["adapted"]["knn"]
    return _measured(before, after, (low, high), count, f"{count} test images")


def _measured(before: float, after: float, interval: Sequence[float], count: int, where: str) -> Verdict:
    gain, (low, high) = after - before, interval
    outcome: Outcome = "better" if low > 0 else "worse" if high < 0 else "no measurable change"
    text = (
        f"{outcome}: k-NN accuracy {before:.1f} -> {after:.1f} % ({_signed(gain)} points, 95 % interval "
        f"{_signed(low)} to {_signed(high)}) on {where}"
    )
    return Verdict(text, gain, low, high, "measured", outcome, count)


def decisive(label_free: Verdict, measured: Verdict | None) -> Verdict:
    """Return the verdict that counts: the measured one if it found a change, else the label-free one."""
    return measured if measured is not None and measured.outcome != "no measurable change" else label_free


def with_base_kept(verdict: Verdict) -> Verdict:
    """Return a verdict "worse" that says what follows from it."""
    return replace(verdict, text=verdict.text.replace("worse: ", "worse: base kept; ", 1))


def to_json(label_free: Verdict, measured: Verdict | None) -> bytes:
    """Return the content of OUT/verdict.json."""
    entries = {"verdict": asdict(label_free), "measured": None if measured is None else asdict(measured)}
    return (json.dumps(entries, indent=2) + "\n").encode()


def _sureness(outcome: Outcome, images: int, objective: str) -> str:
    gained, lost, of = STORED[objective].get(outcome) or STORED["clustering"][outcome]
    if outcome == "worse":
        return f"{lost} of {of} stored adapters with a score below {CLEARLY_WORSE:g} lost k-NN accuracy"
    if objective == "vicreg" and images < MANY:
        return f"too few images for an estimate, which takes {MANY}"
    return f"an estimate: of {of} stored runs like this, {gained} gained k-NN accuracy and {lost} lost"


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # + 0.0: never -0.0
