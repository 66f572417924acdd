"""How well label-free scores tell the true gain: rank correlations, refusals, and weights fitted leaving one set out.

    gain ~ w . x                                          x: TERMS, the changes of scores against the base model
    w = argmin mean (gain - w . x)^2 + RIDGE |w|^2        each x over its root mean square in the fit

There is no intercept: a model that has not changed is predicted to gain nothing, so "at most 0" is a refusal. Seeds and
configurations are independent runs; strengths of one adapter are not, so they are reported apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from upstep_fast.judgement import predicted_gain

TERMS = ("view_agreement", "uniformity", "effective_rank", "drift")
RIDGE = 0.1
WORSE = 0.5  # points: less is noise
FEW_SETS = 3  # below this the weights were fitted on one set alone
TRAINED = "1.0"  # the strength that was trained


@dataclass(frozen=True)
class Point:
    """An adapter at one strength: what its label-free scores were, and what it truly gained."""

    data: str
    strength: str
    gain: float  # of k-NN of the adapted features, points
    scores: dict[str, float]  # `judge`'s, and predicted_gain


def points(rows: Iterable[dict[str, Any]]) -> list[Point]:
    """Every adapter at every strength."""
    return [
        Point(
            row["data"],
            strength,
            at["adapted"]["knn"] - row["base"]["knn"],
            at["judgement"] | {"predicted_gain": predicted_gain(at["judgement"])},
        )
        for row in rows
        for strength, at in row["at"].items()
    ]


def rank_correlation(values: Sequence[float], gains: Sequence[float]) -> float | None:
    """Spearman's; None for fewer than three, or where one of them never changes."""
    if len(values) < 3 or len(set(values)) < 2 or len(set(gains)) < 2:
        return None
    return float(spearmanr(values, gains).statistic)


def correlations(found: Sequence[Point]) -> dict[str, float | None]:
    """Spearman's rank correlation of each score with the true gain."""
    gains = [point.gain for point in found]
    return {name: rank_correlation([p.scores[name] for p in found], gains) for name in found[0].scores}


def terms(scores: dict[str, float]) -> list[float]:
    """TERMS of `judge`'s scores; drift is how far the features went from the base model's, 1 - CKA."""
    drift = {"drift": 1 - scores["base_cka"]}
    return [(scores | drift)[name] for name in TERMS]


def fit(x: np.ndarray, gains: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """Ridge regression through the origin. x: [N, T]; gains: [N] -> weights [T] of the terms as they are."""
    size = np.sqrt((x**2).mean(0))
    size = np.where(size > 0, size, 1)
    scaled = x / size
    return np.linalg.solve(scaled.T @ scaled / len(x) + ridge * np.eye(x.shape[1]), scaled.T @ gains / len(x)) / size


def leave_one_out(found: Sequence[Point]) -> list[float]:
    """Each point's gain as predicted by weights that were fitted on the other data sets alone; two sets at least."""
    x = np.array([terms(point.scores) for point in found])
    gains, sets = np.array([point.gain for point in found]), np.array([point.data for point in found])
    predicted = np.empty(len(found))
    for data in np.unique(sets):
        out = sets == data
        predicted[out] = x[out] @ fit(x[~out], gains[~out])
    return predicted.tolist()


def refused(predicted: Sequence[float], gains: Sequence[float]) -> tuple[int, int, int, int]:
    """Adapters that truly lost more than WORSE points, those of them refused; the others, those of them refused."""
    no = [p <= 0 for p, gain in zip(predicted, gains, strict=True) if gain < -WORSE]
    wrongly = [p <= 0 for p, gain in zip(predicted, gains, strict=True) if gain >= -WORSE]
    return len(no), sum(no), len(wrongly), sum(wrongly)


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Rank correlations of every score, and of the predictor on sets that its weights were not fitted on."""
    every = points(rows)
    trained = [point for point in every if point.strength == TRAINED]
    sets = sorted({point.data for point in every})
    columns = {"all": every, "as trained": trained} | {s: [p for p in every if p.data == s] for s in sets}
    found = {name: correlations(group) for name, group in columns.items()}
    head = _line("score (change against base)", *(f"{name} (n = {len(group)})" for name, group in columns.items()))
    lines = [head, "|---|" + "--:|" * len(columns)]
    lines += [_line(score, *(_signed(found[c][score]) for c in columns)) for score in every[0].scores]
    parts = [
        "Spearman's rank correlation with the true change of k-NN of the adapted features. As trained: strength 1, one "
        "point a run; all: several strengths of one adapter, which are not independent runs.",
        "\n".join(lines),
        "#### Leaving one data set out",
    ]
    if len(sets) < 2:
        return "\n\n".join([*parts, f"Needs two data sets or more; there is one ({sets[0]})."])
    if len(sets) < FEW_SETS:
        parts.append(f"Only {len(sets)} data sets: each fit saw one, so these figures say little.")
    what = ", ".join(TERMS)
    parts.append(
        f"Fitted: weights of {what} (ridge, no intercept) from the other sets; fixed: `predicted_gain` as it ships. "
        f"Worse: lost more than {WORSE} points; refused: predicted at most 0."
    )
    for title, group in (("As trained, one point a run", trained), ("All strengths, not independent", every)):
        parts += [f"{title}:", left_out_table(group)]
    x = np.array([terms(point.scores) for point in trained])
    weights = fit(x, np.array([point.gain for point in trained]))
    fitted = ", ".join(f"{name} {weight:+.3g}" for name, weight in zip(TERMS, weights, strict=True))
    parts.append(f"Weights fitted on all {len(sets)} sets as trained, in points of gain: {fitted}.")
    return "\n\n".join(parts)


def left_out_table(group: Sequence[Point]) -> str:
    """One line a data set and one for all: rank correlation and refusals of the fitted and the fixed weights."""
    columns = ("left out", "n", "rank, fitted", "rank, fixed", "worse", "refused, fitted", "refused, fixed")
    head = _line(*columns, "others", "refused wrongly, fitted", "fixed")
    lines = [head, "|---|" + "--:|" * 9]
    fitted = leave_one_out(group)
    for data in [*sorted({point.data for point in group}), None]:
        of_set = [(p, f) for p, f in zip(group, fitted, strict=True) if data in (p.data, None)]
        gains = [point.gain for point, _ in of_set]
        both = ([f for _, f in of_set], [point.scores["predicted_gain"] for point, _ in of_set])
        ranks = [_signed(rank_correlation(values, gains)) for values in both]
        (worse, right, others, wrong), (_, right_fixed, _, wrong_fixed) = (refused(v, gains) for v in both)
        name = "all together" if data is None else data
        lines.append(_line(name, len(of_set), *ranks, worse, right, right_fixed, others, wrong, wrong_fixed))
    return "\n".join(lines)


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def _line(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
