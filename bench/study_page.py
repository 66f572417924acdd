"""The study's rows as tables and plots in a page, between its markers."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import study_plot
import study_predictor
from study_plot import Row, grouped

from upstep_fast.judgement import predicted_gain

BEGIN, END = "<!-- study: written by bench/study.py -->", "<!-- end of study -->"
SOURCE_IMAGES = 1000  # of source_64.tar's test part, for rows that do not say


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
        plot = f"images/{page.stem}_frontier.svg"
        parts += ["### Gain against forgetting", f"![gain against forgetting]({plot})"]
        parts += [source_error(selected)] * any("source" in row["base"] for row in selected)
        if whitened := [row for row in selected if "whitened" in row["base"]]:
            parts += ["### Whitening alone", whitening_table(whitened)]
        parts += ["### Label-free scores", study_predictor.report(selected)]
        (page.parent / plot).parent.mkdir(exist_ok=True)
        (page.parent / plot).write_text(study_plot.plot(selected))
        if looked := [row for row in selected if row.get("clusters")]:
            parts += ["### Clusters over the run", clusters_table(looked)]
        if any("dense" in row["base"] for row in selected):
            parts += ["### Patches", dense_table(selected)]
    if weakened := [row for row in good if row["split"] == "depth"]:
        parts += ["### Strength by depth", depth_table(weakened)]
    if missing:
        parts += ["### Not measured", f"Of the grid: {', '.join(missing)}."]
    page.write_text(before + BEGIN + "\n" + "\n\n".join(parts) + "\n" + END + after)


def gains_table(rows: Sequence[Row]) -> str:
    """One line a configuration, data set and strength: changes against the base model in points, means over seeds."""
    columns = ("base", "adapted", "ensemble", "adapted w.", "ensemble w.", "linear", "linear ens.")
    columns += ("source", "source ens.", "source w.", "source ens. w.")
    more = ("skipped", "backward", "learnt", "centre", "CPU s")
    lines = [_line("configuration", "data", "seeds", *columns, *more), "|---|---|--:|" + "--:|" * 16]
    for (data, name, strength), group in grouped(rows).items():
        first, plus = group[0], [(row, row["at"][strength]) for row in group]

        def change(kind: str, measure: str, plus: list[tuple[Row, Row]] = plus) -> str:
            return mean_change([at[kind][measure] - row["base"][measure] for row, at in plus if kind in at])

        def forgot(kind: str, plus: list[tuple[Row, Row]] = plus) -> str:
            return source_change(kind, [(row, at) for row, at in plus if kind in at.get("source", {})])

        scale = "" if strength == "1.0" else f" x {float(strength):g}"
        lines.append(
            _line(
                name + scale,
                data,
                len(group),
                f"{statistics.mean(row['base']['knn'] for row in group):.1f}",
                change("adapted", "knn"),
                change("ensemble", "knn"),
                change("adapted_whitened", "knn"),
                change("ensemble_whitened", "knn"),
                change("adapted", "linear"),
                change("ensemble", "linear"),
                forgot("adapted"),
                forgot("ensemble"),
                forgot("adapted_whitened"),
                forgot("ensemble_whitened"),
                f"{100 * statistics.mean(row['skip_rate'] for row in group):.0f} %",
                f"{statistics.mean(row['backward_passes'] for row in group):.0f}",
                f"{statistics.mean(row['images_learnt'] for row in group):,.0f}",
                f"{first['centre_first']:.2f} to {first['centre_last']:.2f}",
                f"{statistics.mean(row['cpu_seconds'] for row in group):.0f}",
            )
        )
    return "\n".join(lines)


def whitening_table(rows: Sequence[Row]) -> str:
    """What whitened features beside the base model's own do, without any training; one line a data set."""
    lines = [_line("data", "base", "whitened beside it", "source"), "|---|--:|--:|--:|"]
    for row in {row["data"]: row for row in rows}.values():
        base = row["base"]
        source = f"{base['source_whitened'] - base['source']:+.1f}" if "source_whitened" in base else ""
        lines.append(_line(row["data"], f"{base['knn']:.1f}", f"{base['whitened'] - base['knn']:+.1f}", source))
    return "\n".join(lines)


def mean_change(values: Sequence[float]) -> str:
    """+1.2, or +1.2 ± 0.3 (one standard error) over several seeds; nothing of no values."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):+.1f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.1f}"


def source_change(kind: str, found: Sequence[tuple[Row, Row]]) -> str:
    """-1.5 ± 1.1: the paired standard error over the source's images, which seeds share, so they do not lessen it."""
    if not found:
        return ""
    changes = [at["source"][kind] - row["base"]["source"] for row, at in found]
    if any(f"{kind}_se" not in at["source"] for _, at in found):  # rows of before it was measured
        return mean_change(changes)
    error = statistics.mean(at["source"][f"{kind}_se"] for _, at in found)
    return f"{statistics.mean(changes):+.1f} ± {error:.1f}"


def source_error(rows: Sequence[Row]) -> str:
    """What the standard error of a change on the source is: paired where it was measured, else the unpaired bound."""
    every = [(row, at["source"]) for row in rows for at in row["at"].values() if "source" in at]
    paired = [source["adapted_se"] for _, source in every if "adapted_se" in source]
    rest = [
        100 * sum(p / 100 * (1 - p / 100) / SOURCE_IMAGES for p in (row["base"]["source"], source["adapted"])) ** 0.5
        for row, source in every
        if "adapted_se" not in source
    ]
    parts = []
    if paired:
        parts.append(f"paired over its images, {statistics.mean(paired):.1f} points on average")
    if rest:
        parts.append(
            f"in {len(rest)} of {len(every)} measurements not paired: as of independent samples of {SOURCE_IMAGES:,} "
            f"images, {max(rest):.1f} points, which is too large for two models on the same images"
        )
    return f"Standard error of the adapted features' change on the source: {'; '.join(parts)}."


def clusters_table(rows: Sequence[Row]) -> str:
    """Purity, NMI and stability at each look, of held-out images by the run's own prototypes; means over seeds."""
    lines = [_line("configuration", "data", "seeds", "step", "purity", "NMI", "stability"), "|---|---|" + "--:|" * 5]
    groups: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
    for row in rows:
        for look in row["clusters"]:
            groups[row["data"], row["name"], look["step"]].append(look)
    for (data, name, step), looks in groups.items():
        stable = [look["stability"] for look in looks if look["stability"] is not None]
        purity, nmi = (f"{statistics.mean(look[key] for look in looks):.2f}" for key in ("purity", "nmi"))
        lines.append(
            _line(name, data, len(looks), step, purity, nmi, f"{statistics.mean(stable):.2f}" if stable else "")
        )
    return "\n".join(lines)


def depth_table(rows: Sequence[Row]) -> str:
    """One third of the blocks weakened at a time; which one `predicted_gain` would have chosen, and which was best."""
    columns = ("configuration", "data", "seed", "blocks x strength", "adapted", "source", "predicted", "")
    lines = [_line(*columns), "|---|---|--:|---|" + "--:|" * 3 + "---|"]
    for row in rows:
        predicted = {name: predicted_gain(at["judgement"]) for name, at in row["at"].items()}
        chosen = max(predicted, key=lambda name: predicted[name])
        best = max(row["at"], key=lambda name: row["at"][name]["adapted"]["knn"])
        for name, at in row["at"].items():
            lines.append(
                _line(
                    row["name"],
                    row["data"],
                    row["seed"],
                    "all x 1" if name == "1.0" else name,
                    f"{at['adapted']['knn'] - row['base']['knn']:+.1f}",
                    source_change("adapted", [(row, at)] if "source" in at else []),
                    f"{predicted[name]:+.1f}",
                    ", ".join(["chosen"] * (name == chosen) + ["best"] * (name == best)),
                )
            )
    return "\n".join(lines)


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
