"""How well label-free scores tell the true gain: rank correlations and refusals, leaving one data set out.

    prediction    100 (change of view agreement) - weight (1 - CKA with the base model)   judgement.predicted_gain
    weight        of WEIGHTS the one with the best rank correlation, the mean over the sets it is fitted on
    refused       prediction < floor; floor = MARGIN x the lowest prediction of an adapter there that lost nothing

An adapter that did not change is predicted to gain 0. Strengths of one adapter are no independent runs: weight and
floor need them, since pushed too far an adapter surely loses, but runs as trained are reported apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import spearmanr

from upstep_fast.evaluation.label_free import CLEARLY_WORSE, predicted_gain

WEIGHTS = (0.0, 5.0, 10.0, 15.0, 20.0, 30.0, 50.0)
MARGIN = 1.5
WORSE, MUCH_WORSE = 0.5, 3.0  # points: less is noise; about one and a half standard errors
FEW_SETS = 3  # below this the weights were fitted on one set alone
TRAINED = "1.0"  # the strength that was trained


@dataclass(frozen=True, eq=False)
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


def fit(found: Sequence[Point]) -> tuple[float, float]:
    """Fit the weight of the drift and the floor of refusals (at most 0) to these points."""
    by_set: dict[str, list[Point]] = defaultdict(list)
    for point in found:
        by_set[point.data].append(point)

    def rank(weight: float) -> float:
        each = [rank_correlation(_predictions(group, weight), [p.gain for p in group]) for group in by_set.values()]
        return sum(value or 0 for value in each) / len(each)

    weight = max(WEIGHTS, key=rank)
    return weight, MARGIN * min([0.0, *_predictions([p for p in found if p.gain >= -WORSE], weight)])


def leave_one_out(found: Sequence[Point]) -> list[tuple[float, bool]]:
    """Each point's prediction and refusal by what was fitted on the other data sets alone; two sets at least."""
    fitted = {data: fit([p for p in found if p.data != data]) for data in {p.data for p in found}}
    result = []
    for point in found:
        weight, floor = fitted[point.data]
        value = predicted_gain(point.scores, weight)
        result.append((value, value < floor))
    return result


def refused(flags: Sequence[bool], gains: Sequence[float]) -> list[tuple[int, int]]:
    """How many, and how many of them are refused: adapters that lost more than WORSE, than MUCH_WORSE; the others."""
    groups = [[f for f, gain in zip(flags, gains, strict=True) if gain < -limit] for limit in (WORSE, MUCH_WORSE)]
    groups.append([f for f, gain in zip(flags, gains, strict=True) if gain >= -WORSE])
    return [(len(group), sum(group)) for group in groups]


def _predictions(found: Sequence[Point], weight: float) -> list[float]:
    return [predicted_gain(point.scores, weight) for point in found]


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
    parts.append(
        "Left out: weight of the drift and floor of refusals fitted on the other sets, at all strengths; shipped: as "
        f"in `upstep_fast/evaluation/label_free.py`. Lost: more than {WORSE:g}, more than {MUCH_WORSE:g} points."
    )
    left_out = dict(zip(every, leave_one_out(every), strict=True))
    for title, group in (("As trained, one point a run", trained), ("All strengths, not independent", every)):
        parts += [f"{title}:", left_out_table(group, [left_out[point] for point in group])]
    of_set = [f"without {s} {weight:g} and {floor:.1f}" for s in sets for weight, floor in [_without(s, every)]]
    weight, floor = fit(every)
    parts.append(f"Weight and floor fitted: {'; '.join(of_set)}; on all sets {weight:g} and {floor:.1f}.")
    return "\n\n".join(parts)


def _without(data: str, every: Sequence[Point]) -> tuple[float, float]:
    return fit([point for point in every if point.data != data])


def left_out_table(group: Sequence[Point], left_out: Sequence[tuple[float, bool]]) -> str:
    """One line a data set and one for all: rank correlation and refusals, left out and as shipped."""
    columns = ("left out", "n", "rank", "rank, shipped", f"lost > {WORSE:g}", "refused", "shipped")
    more = (f"lost > {MUCH_WORSE:g}", "refused", "shipped", "others", "refused wrongly", "shipped")
    lines = [_line(*columns, *more), "|---|" + "--:|" * 12]
    for data in [*sorted({point.data for point in group}), None]:
        of_set = [(p, f) for p, f in zip(group, left_out, strict=True) if data in (p.data, None)]
        gains = [point.gain for point, _ in of_set]
        values = [value for _, (value, _) in of_set], [point.scores["predicted_gain"] for point, _ in of_set]
        flags = (
            [flag for _, (_, flag) in of_set],
            [point.scores["predicted_gain"] < CLEARLY_WORSE for point, _ in of_set],
        )
        ranks = [_signed(rank_correlation(v, gains)) for v in values]
        counts = [
            cell
            for (num, ours), (_, shipped) in zip(*(refused(f, gains) for f in flags), strict=True)
            for cell in (num, ours, shipped)
        ]
        lines.append(_line("all together" if data is None else data, len(of_set), *ranks, *counts))
    return "\n".join(lines)


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def _line(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
