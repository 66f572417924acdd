"""report.html: one run, or several side by side, as a single file that needs no network and no script.

Everything on the page is read back from the run's folder, so it can be made again at any time. Names of files and
classes come from strangers: every text passes `text`, and the page's own policy lets nothing be loaded or run.
"""

from __future__ import annotations

import contextlib
import html
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from upstep_fast.config.tools import ReportConfig
from upstep_fast.errors import ConfigError
from upstep_fast.report.charts import COLOURS, Bar, Line, bar_chart, line_chart, share_bar
from upstep_fast.report.neighbors import sheet
from upstep_fast.report.next_steps import next_steps
from upstep_fast.report.pca_plot import definitions, plot
from upstep_fast.report.run_record import Record, number, read_record, split, summary
from upstep_fast.runtime.atomic_file import write_atomic

log = logging.getLogger("upstep_fast")

NAME = "report.html"
MAX_ROWS = 200  # of a table of skipped images
KINDS = ("base", "adapted", "ensemble")
MEASURES = {
    "knn": "k-NN",
    "knn_whitened": "k-NN, whitened",
    "linear": "linear probe",
    "linear_whitened": "linear probe, whitened",
}
STYLE = Path(__file__).parent.parent / "assets" / "report.css"


@contextlib.contextmanager
def written_after(out: Path) -> Iterator[None]:
    """Write out/report.html when the run within ends, however it ends; a page that fails is a warning, no error."""
    try:
        yield
    finally:
        try:
            log.info("report: %s", write(out))
        except Exception as error:  # the run's own outcome is what counts
            log.warning("report: not written (%s: %s)", type(error).__name__, error)


def run(config: ReportConfig) -> Path:
    """As the command: DIR/report.html of one run, or a comparison of several in `config.out`. Raises ConfigError."""
    folders = [Path(folder) for folder in config.dirs]
    try:
        if len(folders) == 1:
            return write(folders[0])
        return write_atomic(Path(config.out), comparison_page([read_record(folder) for folder in folders]).encode())
    except OSError as error:
        raise ConfigError(f"report: cannot write {error.filename}: {error.strerror}") from error


def write(folder: Path) -> Path:
    """Write folder/report.html from what the run left there. Raises ConfigError if that is no run, or OSError."""
    return write_atomic(folder / NAME, run_page(read_record(folder)).encode())


def run_page(record: Record) -> str:
    """The page of one run."""
    return _page(
        record.folder.resolve().name,
        f"<p>{_state(record)}</p>" + _tiles(summary(record)),
        _section("Accuracy", _scores(record)),
        _section("Curves", _curves([record])),
        _section("Where the time went", _split(record)),
        _section("The images in the features", _clouds(record)),
        _section("Nearest neighbours", _neighbours(record)),
        _section("What to do next", _next(record)),
        _section(f"Skipped and odd images ({len(record.skipped):,})", _skipped(record)),
        _section("Warnings", "".join(f"<pre>{text(line)}</pre>" for line in record.messages[-20:])),
        _section("Versions and device", _pairs(record.environment)),
        _section("Configuration", _pairs(record.config)),
    )


def comparison_page(records: Sequence[Record]) -> str:
    """The page of several runs: curves over each other, final values, and the settings in which they differ."""
    names = _names(records)
    columns = list(dict.fromkeys(label for record in records for label in summary(record) | _measured(record)))
    values = [summary(record) | _measured(record) for record in records]
    rows = [[name, *(v.get(label, "") for label in columns)] for name, v in zip(names, values, strict=True)]
    fields = list(dict.fromkeys(name for record in records for name in record.config))
    settings = [[name, *(_value(record.config.get(name)) for record in records)] for name in fields if name != "out"]
    differing = [row for row in settings if len(set(row[1:])) > 1]
    return _page(
        f"{len(records)} runs",
        _section("At the end", _table(["run", *columns], rows, "figures")),
        _section("Curves", _legend(names) + _curves(records, names)),
        _section("Settings that differ", _table(["setting", *names], differing) if differing else "<p>none</p>"),
    )


def standard_error(percent: float, count: float) -> float:
    """Of an accuracy in percent over `count` images, were they drawn independently: sqrt(p (1 - p) / n)."""
    p = percent / 100
    return 100 * math.sqrt(max(0.0, p * (1 - p)) / count)


def text(value: Any) -> str:
    """`value` for HTML: escaped, and what cannot be seen or would turn the line around is written as its code."""
    shown = "".join(c if c.isprintable() else f"\\u{{{ord(c):x}}}" for c in str(value))
    return html.escape(shown, quote=True)


def _measured(record: Record) -> dict[str, str]:
    found = {}
    for kind in KINDS[1:] if record.scores else ():
        for measure in MEASURES:
            if cell := _accuracy(record.scores or {}, kind, measure):
                found[f"{measure}, {kind}"] = cell
    return found


def _accuracy(scores: dict[str, Any], kind: str, measure: str) -> str:
    part = scores.get(kind)
    percent = number(part.get(measure)) if isinstance(part, dict) else None
    count = number(scores.get("n_test"))
    if percent is None:
        return ""
    return f"{percent:.1f} ± {standard_error(percent, count):.1f}" if count and count > 0 else f"{percent:.1f}"


def _scores(record: Record) -> str:
    scores = record.scores
    if scores is None:
        return ""
    rows = []
    for kind in KINDS:
        cells = [_accuracy(scores, kind, measure) for measure in MEASURES]
        rows.append([kind, *cells, *(_kept(scores.get(where), kind) for where in ("source", "source_whitened"))])
    count, k = _value(scores.get("n_test")), _value(scores.get("k"))
    note = (
        f"Percent right of {count} test images, k = {k}; ± one binomial standard error. All rows use the same images, "
    )
    note += "so their differences are surer than these errors suggest."
    header = ["features", *MEASURES.values(), "k-NN on the source domain", "the same, whitened"]
    table = _table(header, [row for row in rows if any(row[1:])], "figures")
    return _figure("Percent right", "± one standard error", _bars(scores)) + table + f"<p>{text(note)}</p>"


def _kept(source: Any, kind: str) -> str:
    percent = number(source.get(kind)) if isinstance(source, dict) else None
    return "" if percent is None else f"{percent:.1f}"


def _bars(scores: dict[str, Any]) -> str:
    count = number(scores.get("n_test"))
    bars = []
    for measure, group in MEASURES.items():
        for kind in KINDS:
            part = scores.get(kind)
            percent = number(part.get(measure)) if isinstance(part, dict) else None
            if percent is not None and 0 <= percent <= 100:
                error = standard_error(percent, count) if count and count > 0 else None
                bars.append(Bar(group, kind, percent, error))
    return bar_chart("percent right", bars) + _legend([kind for kind in KINDS if any(b.label == kind for b in bars)])


def _figure(title: str, unit: str, body: str) -> str:
    return f'<div class="charts one"><figure><figcaption><b>{title}</b> {unit}</figcaption>{body}</figure></div>'


def _split(record: Record) -> str:
    shares = split(record)
    if not shares:
        return ""
    names = {"data": "waiting for images", "gaps": "between these"}
    keys = [f"{names.get(label, label)} {100 * share:.1f} %" for label, share in shares.items()]
    return share_bar(list(shares.items())) + _legend(keys)


def _clouds(record: Record) -> str:
    if (found := record.pictures) is None:
        return ""
    figures = "".join(
        f"<figure><figcaption><b>{title}</b> {of}</figcaption>{plot(points, found.points['before'], found.names, text)}"
        "</figure>"
        for title, of, points in (
            ("Before", "base model", found.points["before"]),
            ("After", "with the adapter", found.points["after"]),
        )
    )
    note = (
        f"{len(found.names)} images, spread evenly over the data; the first two principal components of each model's "
        "features. Point at a dot to see its image. A colour is an image's place from left to right before."
    )
    return f'{definitions(found.thumbs)}<div class="charts">{figures}</div><p>{note}</p>'


def _neighbours(record: Record) -> str:
    if (found := record.pictures) is None or not found.queries:
        return ""
    near = found.neighbours
    changed = sum(len(set(new) - set(old)) for old, new in zip(near["before"], near["after"], strict=True))
    note = f"By cosine, among the images above. Framed: not among the nearest before ({changed} in all)."
    return sheet(found.queries, near["before"], near["after"], found.names, text) + f"<p>{note}</p>"


def _curves(records: Sequence[Record], names: Sequence[str] = ("this run",)) -> str:
    def lines(column: str, factor: float = 1.0) -> list[Line]:
        found = []
        for name, record in zip(names, records, strict=True):
            steps = [float(row["step"]) for row in record.rows]
            found.append(Line(name, steps, [None if v is None else factor * v for v in record.column(column)]))
        return found

    closed = [(float(row["step"]), row.get("open") is False) for row in records[0].rows] if len(records) == 1 else []
    strip = " Strip: steps skipped by the gate." if any(skipped for _, skipped in closed) else ""
    figures = (
        ("Loss", "of steps with an update", line_chart("loss", lines("loss"))),
        ("Centre magnitude", f"|mean embedding|, 0 to 1.{strip}", line_chart("|s|", lines("center"), marked=closed)),
        ("Speed", "images/s", line_chart("images/s", lines("images_per_s"), from_zero=True)),
        ("Waiting for images", "ms a step", line_chart("ms", lines("data_wait", 1e3), from_zero=True)),
    )
    return "".join(
        f"<figure><figcaption><b>{title}</b> {unit}</figcaption>{chart}</figure>" for title, unit, chart in figures
    ).join(('<div class="charts">', "</div>"))


def _state(record: Record) -> str:
    done, steps = len(record.rows), record.steps
    model, data = _value(record.config.get("model")), _value(record.config.get("data"))
    ended = "finished" if steps and done >= steps else "not finished"
    return f"<b class='{ended.replace(' ', '-')}'>{ended}</b> {text(model)} adapted to {text(data)}"


def _next(record: Record) -> str:
    return "".join(
        f"<p>{text(why)}</p>" + (f"<pre>{'<br>'.join(map(text, command.splitlines()))}</pre>" if command else "")
        for why, command in next_steps(record)
    )


def _skipped(record: Record) -> str:
    if not record.skipped:
        return "<p>none</p>"
    rest = len(record.skipped) - MAX_ROWS
    more = f"<p>and {rest:,} more in skipped.csv</p>" if rest > 0 else ""
    thumbs = record.pictures.odd if record.pictures else {}
    gallery = "".join(
        f'<figure class="odd"><svg class="thumb" viewBox="0 0 96 96" role="img"><image width="96" height="96" '
        f'href="data:image/webp;base64,{thumbs[name]}"/></svg><figcaption>{text(why)}</figcaption></figure>'
        for name, why in dict(record.skipped).items()
        if name in thumbs
    )
    shown = f'<div class="gallery">{gallery}</div>' if gallery else ""
    return shown + _table(["image", "why"], [list(row) for row in record.skipped[:MAX_ROWS]]) + more


def _names(records: Sequence[Record]) -> list[str]:
    names = [record.folder.resolve().name for record in records]
    return names if len(set(names)) == len(names) else [str(record.folder) for record in records]


def _legend(names: Sequence[str]) -> str:
    def key(i: int) -> str:
        dashed = " dashed" * (i >= COLOURS)
        return f'<svg class="key" viewBox="0 0 24 8"><path class="line c{i % COLOURS}{dashed}" d="M0,4H24"/></svg>'

    return f'<p class="legend">{"".join(f"<span>{key(i)} {text(name)}</span>" for i, name in enumerate(names))}</p>'


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else json.dumps(value) if isinstance(value, bool) else str(value)


def _pairs(values: dict[str, Any]) -> str:
    return _table(["", ""], [[name, _value(value)] for name, value in values.items()]) if values else ""


def _tiles(values: dict[str, str]) -> str:
    return "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in values.items()).join(
        ("<dl>", "</dl>")
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{text(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{text(title)}</h2>{body}</section>" if body else ""


def _page(title: str, *parts: str) -> str:
    style, body = STYLE.read_text(encoding="utf-8"), "\n".join(part for part in parts if part)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)} · upstep-fast</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>\n{style}</style></head>\n'
        f"<body><main><h1>{text(title)}</h1>\n{body}\n</main></body></html>\n"
    )
