"""The result of a run as a notebook shows it: HTML without scripts and style sheets, every value escaped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from upstep_fast.report.image_panels import ImagePanels
from upstep_fast.report.rendering import render
from upstep_fast.report.run_record import Record, read_record, summary

QUERIES, NEIGHBORS = 3, 4  # shown; report.html shows more


def result_html(out: Path, verdicts: Sequence[str] = ()) -> str:
    """Return verdicts, outcome, neighbors before and after, and the next lines of the run in `out`, as HTML.

    Raises ConfigError if the folder holds no run.
    """
    record = read_record(out)
    page = render(
        "result.html",
        verdicts=verdicts,
        summary=summary(record),
        neighbors=_neighbors(record.panels) if record.panels else [],
        next_lines=_next_lines(record),
        report=str(out / "report.html"),
    )
    return str(page)  # Markup would escape what a notebook puts beside it


def _neighbors(panels: ImagePanels) -> list[tuple[str, list[str], list[str]]]:
    """Return (image, its neighbors before, its neighbors after) of the first queries, as base64 of WebP."""
    thumbs, before, after = panels.thumbs, panels.neighbours["before"], panels.neighbours["after"]
    return [
        (thumbs[query], [thumbs[i] for i in old[:NEIGHBORS]], [thumbs[i] for i in new[:NEIGHBORS]])
        for query, old, new in list(zip(panels.queries, before, after, strict=True))[:QUERIES]
    ]


def _next_lines(record: Record) -> list[str]:
    data = record.config.get("data")
    paths = data if isinstance(data, list) else []
    images = repr(paths[0]) if len(paths) == 1 else "images"
    return [f"m = upstep_fast.load({str(record.folder)!r})", f"features = m.embed({images})  # numpy [N, D]"]
