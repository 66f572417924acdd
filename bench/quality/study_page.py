"""The study's rows as tables and plots in a page, between its markers."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import study_plot
import study_predictor
from study_plot import KINDS, Row, at_strength, changes, grouped

from upstep_fast.evaluation.label_free import predicted_gain

# k-NN, linear probe, k-NN on the source: adapted, ensemble, and both with whitened features beside the others
FORMS = ("adapted", "ens.", "adapted w.", "ens. w.")
GAINS = [f"{what} {form}".strip() for what in ("", "linear", "source") for form in FORMS]
BEGIN, END = "<!-- study: written by bench/quality/study.py -->", "<!-- end of study -->"
SOURCE_IMAGES = 1000  # of source_64.tar's test part, for rows that do not say


def fill(page: Path, rows: Sequence[Row], source: Path, missing: Sequence[str] = ()) -> None:
    """Write tables between the page's markers and the plot beside it; says what is missing.

    Raises ValueError without markers.
    """
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page}: no lines {BEGIN!r} and {END!r} to write between")
    good = [row for row in rows if "error" not in row]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    devices = sorted({row["device"] for row in good})
    commits = ", ".join(sorted({row["commit"] for row in good}))
    trained = ", ".join(sorted({row["trained"] for row in good if "trained" in row}))
    trained = f"; adapters of commits {trained}" if trained else ""
    parts = [f"{len(good)} rows of `{source.name}`, commits {commits}{trained}; {'; '.join(devices)}."]
    for split, what in (("select", "the held-out third of each train part"), ("test", "the test part")):
        if chosen := [row for row in good if row["split"] == split]:
            parts += [f"### On {what}", gains_table(chosen)]
            parts += ["Means over the sets:", means] if (means := means_table(chosen)) else []
            whitened = [row for row in chosen if "base_whitened" in row]
            parts += ["Whitening alone, without an adapter:", whitening_table(whitened)] if whitened else []
    if selected := [row for row in good if row["split"] == "select"]:
        plot = f"images/{page.stem}_frontier.svg"
        parts += ["### Gain against forgetting", f"![gain against forgetting]({plot})"]
        parts += [source_error(selected)] * any("source" in row["base"] for row in selected)
        parts += ["### The runs", runs_table(selected)]
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
    lines = [_line("configuration", "data", "seeds", "base", *GAINS), "|---|---|--:|--:|" + "--:|" * len(GAINS)]
    for (data, name, strength), group in grouped(rows).items():
        base = f"{statistics.mean(row['base']['knn'] for row in group):.1f}"
        gains = [mean_change(changes(group, strength, kind, m)) for m in ("knn", "linear") for kind in KINDS]
        kept = [source_change(group, strength, kind) for kind in KINDS]
        lines.append(_line(at_strength(name, strength), data, len(group), base, *gains, *kept))
    return "\n".join(lines)


def means_table(rows: Sequence[Row]) -> str:
    """Return the table of means over the data sets, for configurations measured on all of them; empty for one set."""
    sets = {row["data"] for row in rows}
    by_name: dict[tuple[str, str], list[list[Row]]] = defaultdict(list)
    for (_, name, strength), group in grouped(rows).items():
        by_name[name, strength].append(group)
    lines = [_line("configuration", *GAINS, "skipped"), "|---|" + "--:|" * (len(GAINS) + 1)]
    for (name, strength), groups in by_name.items():
        if len(groups) < max(2, len(sets)):
            continue
        cells = []
        for measure, kind in itertools.product(("knn", "linear", "source"), KINDS):
            of_sets = [changes(group, strength, kind, measure) for group in groups]
            cells.append(f"{statistics.mean(map(statistics.mean, of_sets)):+.1f}" if all(of_sets) else "")
        skipped = [statistics.mean(row["skip_rate"] for row in group) for group in groups]
        cells.append(f"{100 * min(skipped):.0f} to {100 * max(skipped):.0f} %")
        lines.append(_line(at_strength(name, strength), *cells))
    return "\n".join(lines) if len(lines) > 2 else ""


def runs_table(rows: Sequence[Row]) -> str:
    """Return the table of costs of each configuration, means over seeds."""
    columns = ("configuration", "data", "seeds", "skipped", "backward", "images trained on", "center", "CPU s")
    lines = [_line(*columns), "|---|---|--:|" + "--:|" * 5]
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["data"], row["name"]].append(row)
    for (data, name), group in groups.items():
        lines.append(
            _line(
                name,
                data,
                len(group),
                f"{100 * statistics.mean(row['skip_rate'] for row in group):.0f} %",
                f"{statistics.mean(row['backward_passes'] for row in group):.0f}",
                f"{statistics.mean(row['images_learnt'] for row in group):,.0f}",
                f"{group[0]['centre_first']:.2f} to {group[0]['centre_last']:.2f}",
                f"{statistics.mean(row['cpu_seconds'] for row in group):.0f}",
            )
        )
    return "\n".join(lines)


def whitening_table(rows: Sequence[Row]) -> str:
    """Return the table of gains by whitening alone, without training: one line per data set, and the mean."""
    measures = ("knn", "linear", "source")
    lines = [_line("data", "base", "k-NN", "linear", "source"), "|---|--:|--:|--:|--:|"]
    every = []
    for row in {row["data"]: row for row in rows}.values():
        base, whitened = row["base"], row["base_whitened"]
        every.append([whitened[m] - base[m] if m in whitened else math.nan for m in measures])
        lines.append(_line(row["data"], f"{base['knn']:.1f}", *map(_change, every[-1])))
    return "\n".join([*lines, _line("mean", "", *(_change(statistics.mean(of)) for of in zip(*every, strict=True)))])


def _change(points: float) -> str:
    return "" if math.isnan(points) else f"{points:+.1f}"


def mean_change(values: Sequence[float]) -> str:
    """+1.2, or +1.2 ± 0.3 (one standard error) over several seeds; nothing of no values."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):+.1f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.1f}"


def source_change(rows: Sequence[Row], strength: str, kind: str) -> str:
    """-1.5 ± 1.1: the paired standard error over the source's images, which seeds share, so they do not lessen it."""
    found = changes(rows, strength, kind, "source")
    errors = [row["at"][strength].get("source", {}).get(f"{kind}_se") for row in rows]
    if not found or None in errors:  # rows of before the error was measured
        return mean_change(found)
    return f"{statistics.mean(found):+.1f} ± {statistics.mean(errors):.1f}"


def source_error(rows: Sequence[Row]) -> str:
    """Return the sentence on the standard error on the source: paired where measured, else the unpaired bound."""
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
                    source_change([row], name, "adapted"),
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
