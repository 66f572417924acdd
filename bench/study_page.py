"""The study's rows as tables and plots in a page, between its markers."""

from __future__ import annotations

import html
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from upstep_fast.charts import ticks
from upstep_fast.judgement import predicted_gain

BEGIN, END = "<!-- study: written by bench/study.py -->", "<!-- end of study -->"
PLOT = Path("images") / "quality_frontier.svg"
WORSE = 0.5  # points: less is noise
Row = dict[str, Any]


def fill(page: Path, rows: Sequence[Row], source: Path, missing: Sequence[str] = ()) -> None:
    """Writes tables between the page's markers and the plot beside it; says what is missing.

    Raises ValueError without markers.
    """
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page}: no lines {BEGIN!r} and {END!r} to write between")
    good = [row for row in rows if "error" not in row]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    devices = sorted({row["device"] for row in good})
    commits = ", ".join(sorted({row["commit"] for row in good}))
    parts = [f"{len(good)} rows of `{source.name}`, commits {commits}; {'; '.join(devices)}."]
    for split, what in (("select", "the held-out third of each train part"), ("test", "the test part")):
        if chosen := [row for row in good if row["split"] == split]:
            parts += [f"### On {what}", gains_table(chosen)]
    if selected := [row for row in good if row["split"] == "select"]:
        parts += ["### Gain against forgetting", f"![gain against forgetting]({PLOT})"]
        parts += ["### Label-free scores", scores_table(selected)]
        (page.parent / PLOT).parent.mkdir(exist_ok=True)
        (page.parent / PLOT).write_text(frontier(selected))
        if any("dense" in row["base"] for row in selected):
            parts += ["### Patches", dense_table(selected)]
    if missing:
        parts += ["### Not measured", f"Of the grid: {', '.join(missing)}."]
    page.write_text(before + BEGIN + "\n" + "\n\n".join(parts) + "\n" + END + after)


def gains_table(rows: Sequence[Row]) -> str:
    """One line a configuration, data set and strength: changes against the base model in points, means over seeds."""
    columns = ("base", "adapted", "ensemble", "linear", "linear ens.", "source", "source ens.")
    more = ("skipped", "backward", "learnt", "centre", "CPU s")
    lines = [_line("configuration", "data", "seeds", *columns, *more), "|---|---|--:|" + "--:|" * 12]
    for (data, name, strength), group in grouped(rows).items():
        first, plus = group[0], [(row, row["at"][strength]) for row in group]

        def change(kind: str, measure: str, plus: list[tuple[Row, Row]] = plus) -> str:
            return mean_change([at[kind][measure] - row["base"][measure] for row, at in plus])

        def forgot(kind: str, plus: list[tuple[Row, Row]] = plus) -> str:
            found = [at["source"][kind] - row["base"]["source"] for row, at in plus if "source" in at]
            return mean_change(found) if found else ""

        scale = "" if strength == "1.0" else f" x {float(strength):g}"
        lines.append(
            _line(
                name + scale,
                data,
                len(group),
                f"{statistics.mean(row['base']['knn'] for row in group):.1f}",
                change("adapted", "knn"),
                change("ensemble", "knn"),
                change("adapted", "linear"),
                change("ensemble", "linear"),
                forgot("adapted"),
                forgot("ensemble"),
                f"{100 * statistics.mean(row['skip_rate'] for row in group):.0f} %",
                f"{statistics.mean(row['backward_passes'] for row in group):.0f}",
                f"{statistics.mean(row['images_learnt'] for row in group):,.0f}",
                f"{first['centre_first']:.2f} to {first['centre_last']:.2f}",
                f"{statistics.mean(row['cpu_seconds'] for row in group):.0f}",
            )
        )
    return "\n".join(lines)


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows of all seeds by data set, configuration and strength; probes (no ensemble) are left out."""
    groups = defaultdict(list)
    for row in rows:
        for strength, at in row["at"].items():
            if "ensemble" in at:
                groups[row["data"], row["name"], strength].append(row)
    return dict(sorted(groups.items(), key=lambda item: item[0][0]))


def mean_change(values: Sequence[float]) -> str:
    """+1.2, or +1.2 ± 0.3 (one standard error) over several seeds."""
    mean = f"{statistics.mean(values):+.1f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.1f}"


def points(rows: Iterable[Row]) -> list[tuple[str, float, dict[str, float]]]:
    """(data, true k-NN gain of the adapted features, label-free scores) of every adapter at every strength."""
    return [
        (
            row["data"],
            at["adapted"]["knn"] - row["base"]["knn"],
            at["judgement"] | {"predicted_gain": predicted_gain(at["judgement"])},
        )
        for row in rows
        for at in row["at"].values()
    ]


def correlations(found: Sequence[tuple[str, float, dict[str, float]]]) -> dict[str, float]:
    """Spearman's rank correlation of each score with the true gain; 0 where one of them never changes."""
    gains = [gain for _, gain, _ in found]
    result = {}
    for name in found[0][2]:
        values = [scores[name] for _, _, scores in found]
        varies = len(set(values)) > 1 and len(set(gains)) > 1
        result[name] = float(spearmanr(values, gains).statistic) if varies else 0.0
    return result


def scores_table(rows: Sequence[Row]) -> str:
    """Rank correlations over all adapters, over those as trained, by data set; and the best, leaving one set out."""
    every = points(rows)
    trained = points([row | {"at": {s: a for s, a in row["at"].items() if "ensemble" in a}} for row in rows])
    sets = {data: [p for p in every if p[0] == data] for data in sorted({p[0] for p in every})}
    columns = {"all": every, "strength up to 1": trained, **sets}
    found = {name: correlations(group) if len(group) > 2 else {} for name, group in columns.items()}
    head = _line("score (change against base)", *(f"{name} (n = {len(group)})" for name, group in columns.items()))
    lines = [head, "|---|" + "--:|" * len(columns)]
    for score in every[0][2]:
        lines.append(_line(score, *(f"{found[c][score]:+.2f}" if score in found[c] else "" for c in columns)))
    left_out = []
    for data, group in sets.items():
        others = [p for p in every if p[0] != data]
        if len(others) > 2 and len(group) > 2:
            others_rho = correlations(others)
            best = max(others_rho, key=lambda name: abs(others_rho[name]))
            left_out.append(f"{data}: {best}, {found[data][best]:+.2f}")
    text = "Spearman's rank correlation with the true change of k-NN of the adapted features.\n\n" + "\n".join(lines)
    text += "\n\n" + refusals(every)
    if left_out:
        text += "\n\nThe best score on the other sets, and its correlation on the one left out: " + "; ".join(left_out)
    return text


def refusals(found: Sequence[tuple[str, float, dict[str, float]]]) -> str:
    """How often a prediction of at most 0 met an adapter that truly got worse, by more than WORSE points."""
    worse = [scores["predicted_gain"] <= 0 for _, gain, scores in found if gain < -WORSE]
    others = [scores["predicted_gain"] <= 0 for _, gain, scores in found if gain >= -WORSE]
    return (
        f"Of {len(worse)} adapters that lost more than {WORSE} points, {sum(worse)} would have been refused "
        f"(predicted_gain at most 0); of the {len(others)} others, {sum(others)} would have been refused wrongly."
    )


def dense_table(rows: Sequence[Row]) -> str:
    """Mean IoU of hand and background by patch-token k-NN."""
    lines = [_line("configuration", "strength", "base", "adapted", "change"), "|---|--:|--:|--:|--:|"]
    for row in rows:
        for strength, at in row["at"].items():
            if "dense" in at:
                base, adapted = row["base"]["dense"], at["dense"]
                change = f"{adapted - base:+.1f}"
                lines.append(_line(row["name"], f"{float(strength):g}", f"{base:.1f}", f"{adapted:.1f}", change))
    return "\n".join(lines)


def frontier(rows: Sequence[Row]) -> str:
    """An SVG: change on the source across, k-NN gain upward; filled adapted, hollow ensemble; a colour a data set."""
    dots = []
    for (data, name, strength), group in grouped(rows).items():
        for kind in ("adapted", "ensemble"):
            with_source = [(row, row["at"][strength]) for row in group if "source" in row["at"][strength]]
            if with_source:
                x = statistics.mean(at["source"][kind] - row["base"]["source"] for row, at in with_source)
                y = statistics.mean(at[kind]["knn"] - row["base"]["knn"] for row, at in with_source)
                dots.append((x, y, data, kind, f"{name} x {float(strength):g}, {kind}, {data}"))
    return scatter(dots, "change of 20-NN on the source, points", "gain of k-NN on the target, points")


def scatter(dots: Sequence[tuple[float, float, str, str, str]], across: str, upward: str) -> str:
    """A standalone SVG of (x, y, colour group, "adapted" or "ensemble", tooltip)."""
    width, height, left, bottom, top = 640, 400, 56, 60, 34
    colours = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")
    groups = sorted({dot[2] for dot in dots})
    spans = []
    for axis in (0, 1):
        values = [0.0, *(dot[axis] for dot in dots)]
        pad = 0.08 * (max(values) - min(values)) or 1.0
        spans.append((min(values) - pad, max(values) + pad))

    def at(x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = spans
        px = left + (x - x0) / (x1 - x0) * (width - left - 14)
        return round(px, 1), round(height - bottom - (y - y0) / (y1 - y0) * (height - bottom - top), 1)

    parts = [f'<rect width="{width}" height="{height}" fill="white"/>']
    for tick in ticks(*spans[0]):
        x = at(tick, 0)[0]
        parts.append(f'<path d="M{x},{top}V{height - bottom}" stroke="{"#888" if tick == 0 else "#e4e4e4"}"/>')
        parts.append(f'<text x="{x}" y="{height - bottom + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in ticks(*spans[1]):
        y = at(0, tick)[1]
        parts.append(f'<path d="M{left},{y}H{width - 14}" stroke="{"#888" if tick == 0 else "#e4e4e4"}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for x, y, group, kind, tip in dots:
        colour = colours[groups.index(group) % len(colours)]
        fill = colour if kind == "adapted" else "white"
        px, py = at(x, y)
        mark = f'<circle cx="{px}" cy="{py}" r="5" fill="{fill}" stroke="{colour}" stroke-width="2">'
        parts.append(f"{mark}<title>{html.escape(tip)}: {x:+.1f}, {y:+.1f}</title></circle>")
    for i, group in enumerate(groups):
        x = left + 150 * i
        parts.append(f'<circle cx="{x + 6}" cy="16" r="5" fill="{colours[i % len(colours)]}"/>')
        parts.append(f'<text x="{x + 16}" y="20">{html.escape(group)}</text>')
    parts.append(f'<text x="{width - 14}" y="20" text-anchor="end">filled: adapted, hollow: ensemble</text>')
    parts.append(f'<text x="{(left + width) / 2}" y="{height - 14}" text-anchor="middle">{across}</text>')
    turn = f'transform="translate(14 {(height - bottom + top) / 2}) rotate(-90)"'
    parts.append(f'<text {turn} text-anchor="middle">{upward}</text>')
    style = 'font-family="sans-serif" font-size="12" role="img"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {style} aria-label="{upward} over '
        f'{across}">{"".join(parts)}</svg>\n'
    )


def _line(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
