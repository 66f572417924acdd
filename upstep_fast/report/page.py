"""report.html: one run, or several side by side, as a single file that needs no network and no script.

Everything on the page is read from the run's folder, so the page can be rendered again at any time. File and class
names are untrusted: the templates escape every value (rendering.py), and the page's Content-Security-Policy allows
nothing to be loaded or run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from upstep_fast.config.adapter_folder import run_folder
from upstep_fast.config.tools import ReportConfig
from upstep_fast.errors import ConfigError
from upstep_fast.report import accuracy, measures
from upstep_fast.report.charts import COLORS, Line, bar_chart, line_chart, share_bar
from upstep_fast.report.image_panels import ImagePanels
from upstep_fast.report.neighbors import neighbor_table
from upstep_fast.report.next_steps import next_steps
from upstep_fast.report.pca_plot import plot, thumbnail_definitions
from upstep_fast.report.rendering import render
from upstep_fast.report.run_record import Record, read_record, summary, time_shares
from upstep_fast.runtime.atomic_file import write_atomic
from upstep_fast.runtime.progress import track
from upstep_fast.runtime.run_folder import is_own

log = logging.getLogger("upstep_fast")

NAME = "report.html"
MAX_SKIPPED, MAX_MESSAGES, MAX_CLASSES = 200, 20, 200  # rows of tables, lines of train.log
STYLE = Path(__file__).parent.parent / "assets" / "report.css"


@contextlib.contextmanager
def written_after(out: Path) -> Iterator[None]:
    """Write out/report.html when the context ends, also after an exception; a failure to write is only a warning."""
    try:
        yield
    finally:
        try:
            if is_own(out):
                log.info("report: %s", write(out))
        except Exception as error:  # the outcome of the run matters more than that of its report
            log.warning("report: not written (%s: %s)", type(error).__name__, error)


def run(config: ReportConfig) -> Path:
    """Write DIR/report.html of one run, or a comparison of several to `config.out`; return it. Raises ConfigError."""
    folders = [run_folder(folder) for folder in config.dirs]
    try:
        with track("report", len(folders), "runs") as task:
            if len(folders) == 1:
                return write(folders[0])
            records = []
            for folder in folders:
                records.append(read_record(folder))
                task.advance()
            return write_atomic(Path(config.out), comparison_page(records).encode())
    except OSError as error:
        raise ConfigError(f"report: cannot write {error.filename}: {error.strerror}") from error


@track("report")
def write(folder: Path) -> Path:
    """Write folder/report.html from the run's files and return its path. Raises ConfigError (no run) or OSError."""
    return write_atomic(folder / NAME, run_page(read_record(folder)).encode())


def run_page(record: Record) -> str:
    """Return the HTML page of one run."""
    steps, skipped = record.steps, record.skipped
    thumbs = record.panels.odd if record.panels else {}
    return page(
        "run.html",
        Path(os.path.realpath(record.folder)).name,
        is_finished=bool(steps and len(record.rows) >= steps),
        model=_value(record.config.get("model")),
        data=_value(record.config.get("data")),
        verdicts=record.verdicts,
        summary=summary(record),
        accuracy=_accuracy(record.scores),
        charts=_charts([record], ["this run"]),
        time_shares=_time_shares(record),
        panels=_panels(record.panels),
        next_steps=[(reason, command.splitlines()) for reason, command in next_steps(record)],
        skipped=skipped[:MAX_SKIPPED],
        num_skipped=f"{len(skipped):,}",
        num_more_skipped=f"{len(skipped) - MAX_SKIPPED:,}" if len(skipped) > MAX_SKIPPED else "",
        skipped_thumbs=[(thumbs[name], reason) for name, reason in dict(skipped).items() if name in thumbs],
        messages=record.messages[-MAX_MESSAGES:],
        environment=[(name, _value(value)) for name, value in record.environment.items()],
        config=[(name, _value(value)) for name, value in record.config.items()],
    )


def comparison_page(records: Sequence[Record]) -> str:
    """Return the HTML page of several runs: curves in one plot, final values, and the settings that differ."""
    names = _names(records)
    values = [summary(record) | _accuracies(record) for record in records]
    columns = list(dict.fromkeys(label for row in values for label in row))
    fields = list(dict.fromkeys(name for record in records for name in record.config))
    settings = [[name, *(_value(record.config.get(name)) for record in records)] for name in fields if name != "out"]
    return page(
        "comparison.html",
        f"{len(records)} runs",
        columns=columns,
        rows=[[name, *(row.get(label, "") for label in columns)] for name, row in zip(names, values, strict=True)],
        names=names,
        charts=_charts(records, names),
        settings=[row for row in settings if len(set(row[1:])) > 1],
    )


def page(template: str, title: str, **values: Any) -> str:
    """Return a page from its template, with the house's style."""
    style = Markup(STYLE.read_text(encoding="utf-8"))
    return render(template, title=title, style=style, colors=COLORS, **values)


def _accuracy(scores: dict[str, Any] | None) -> dict[str, Any] | None:
    if scores is None:
        return None
    bars = list(accuracy.accuracy_bars(scores))
    return {
        "chart": Markup(bar_chart("top-1 accuracy, %", bars)),
        "kinds": [kind for kind in accuracy.KINDS if any(bar.label == kind for bar in bars)],
        "header": accuracy.HEADER,
        "rows": accuracy.accuracy_rows(scores),
        "notes": accuracy.accuracy_notes(scores),
        "measures": list(measures.tables(scores, MAX_CLASSES)),
        "count": _value(scores.get("n_test")),
        "k": _value(scores.get("k")),
    }


def _accuracies(record: Record) -> dict[str, str]:
    cells = {
        f"{measure}, {kind}": accuracy.accuracy_text(record.scores or {}, kind, measure)
        for kind in accuracy.KINDS[1:]
        for measure in accuracy.MEASURES
    }
    return {label: cell for label, cell in cells.items() if cell}


def _time_shares(record: Record) -> dict[str, Any] | None:
    shares = time_shares(record)
    names = {"data": "waiting for images", "gaps": "other"}
    labels = [f"{names.get(label, label)} {100 * share:.1f} %" for label, share in shares.items()]
    return {"chart": Markup(share_bar(list(shares.items()))), "labels": labels} if shares else None


def _panels(panels: ImagePanels | None) -> dict[str, Any] | None:
    if panels is None:
        return None
    before, after = panels.neighbours["before"], panels.neighbours["after"]
    return {
        "thumbnails": thumbnail_definitions(panels.thumbs),
        "before": plot(panels.points["before"], panels.points["before"], panels.names),
        "after": plot(panels.points["after"], panels.points["before"], panels.names),
        "count": len(panels.names),
        "neighbors": neighbor_table(panels.queries, before, after, panels.names) if panels.queries else "",
        "num_new": sum(len(set(new) - set(old)) for old, new in zip(before, after, strict=True)),
        "names": panels.names,
        "tokens": list(zip(panels.colored, *(panels.tokens[when] for when in ("before", "after")), strict=True))
        if panels.colored
        else [],
    }


def _charts(records: Sequence[Record], names: Sequence[str]) -> list[tuple[str, str, Markup]]:
    """Return (title, unit, chart) of the metrics over steps, one line per run."""

    def lines(column: str, factor: float = 1.0) -> list[Line]:
        curves = []
        for name, record in zip(names, records, strict=True):
            steps = [float(row["step"]) for row in record.rows]
            curves.append(Line(name, steps, [None if v is None else factor * v for v in record.column(column)]))
        return curves

    skipped = [(float(row["step"]), row.get("open") is False) for row in records[0].rows] if len(records) == 1 else []
    strip = " Strip: steps skipped by the gate." if any(is_skipped for _, is_skipped in skipped) else ""
    charts = (
        ("Loss", "of steps with an update", line_chart("loss", lines("loss"))),
        ("Center length", f"|mean embedding|, 0 to 1.{strip}", line_chart("|s|", lines("center"), marked=skipped)),
        ("Speed", "images/s", line_chart("images/s", lines("images_per_s"), from_zero=True)),
        ("Waiting for images", "ms per step", line_chart("ms", lines("data_wait", 1e3), from_zero=True)),
    )
    return [(title, unit, Markup(chart)) for title, unit, chart in charts]


def _names(records: Sequence[Record]) -> list[str]:
    names = [Path(os.path.realpath(record.folder)).name for record in records]
    return names if len(set(names)) == len(names) else [str(record.folder) for record in records]


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else json.dumps(value) if isinstance(value, bool) else str(value)
