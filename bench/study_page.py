"""The study's rows as tables and plots in a page, between its markers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import study_plot
import study_predictor
from study_plot import Row, grouped

BEGIN, END = "<!-- study: written by bench/study.py -->", "<!-- end of study -->"
PLOT = Path("images") / "quality_frontier.svg"


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
        parts += ["### Label-free scores", study_predictor.report(selected)]
        (page.parent / PLOT).parent.mkdir(exist_ok=True)
        (page.parent / PLOT).write_text(study_plot.plot(selected))
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


def mean_change(values: Sequence[float]) -> str:
    """+1.2, or +1.2 ± 0.3 (one standard error) over several seeds."""
    mean = f"{statistics.mean(values):+.1f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.1f}"


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


def _line(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
