"""The files of a run, read from its folder.

Their content is not trusted: missing, damaged and endless files are left out, with a warning where one is there but is
no regular file of bounded size; numbers that are not finite count as missing.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upstep_fast import input_files
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.files import flatten_tables
from upstep_fast.errors import ConfigError, printable
from upstep_fast.evaluation import verdict
from upstep_fast.report.image_panels import ImagePanels, read_panels
from upstep_fast.runtime.checkpoint import MANIFEST
from upstep_fast.runtime.run_folder import CHECKPOINTS, CONFIG

log = logging.getLogger("upstep_fast")

MAX_METRICS_BYTES = 1 << 30  # about three million steps
# the start of train.log's lines
_MESSAGE = re.compile(r"\d{4}-\d\d-\d\d [\d:,]{8,16} (WARNING|ERROR|CRITICAL) ")


@dataclass(frozen=True)
class Record:
    """One run. Every number in `rows` is finite or None."""

    folder: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]  # metrics.jsonl
    skipped: list[tuple[str, str]]  # name, reason
    scores: dict[str, Any] | None  # eval.json
    environment: dict[str, Any]  # versions and device, from the newest checkpoint
    plan: tuple[int, int] | None  # of --budget, from there too: steps of the configuration, and those of the run
    messages: list[str]  # train.log's warnings and errors
    panels: ImagePanels | None = None  # pictures.json
    verdicts: dict[str, str] = field(default_factory=dict)  # verdict.json: "verdict", "measured" -> sentence

    @property
    def steps(self) -> int | None:
        """The number of steps that the run is configured for, or at which its --budget ends."""
        value = self.config.get("steps")
        if self.plan is not None and self.plan[0] == value:  # else it was resumed with another number
            return self.plan[1]
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def column(self, name: str) -> list[float | None]:
        """Return the values of a metric, one per step; None where a row has no finite number."""
        return [number(row.get(name)) for row in self.rows]

    def step_seconds(self) -> list[float | None]:
        """Return the seconds of each step, including the wait for images; None where unknown."""
        batch = number(self.config.get("batch_size"))
        return [batch / rate if batch and rate else None for rate in self.column("images_per_s")]


def read_record(folder: Path) -> Record:
    """Return the run in `folder`. Raises ConfigError if the folder holds no run."""
    config = read_config(folder)
    lines = _lines(folder / "metrics.jsonl", MAX_METRICS_BYTES)
    rows = [row for line in lines if isinstance(row := _json(line), dict)]
    scores, manifest = _json("\n".join(_lines(folder / "eval.json"))), _manifest(folder / CHECKPOINTS)
    return Record(
        folder=folder,
        config=config,
        rows=[row for row in rows if number(row.get("step")) is not None],
        skipped=_skipped(folder / "skipped.csv"),
        scores=scores if isinstance(scores, dict) else None,
        environment=manifest.get("environment", {}),
        plan=_plan(manifest),
        panels=read_panels(folder),
        verdicts=_verdicts(folder),
        messages=[line for line in _lines(folder / "train.log") if _MESSAGE.match(line)],
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Return folder/config.toml as {flag: value}. Raises ConfigError if the folder holds no run."""
    if not os.path.lexists(folder / CONFIG):
        raise ConfigError(f"report: {folder} holds no run of upstep-fast (no {CONFIG}); give the --out of adapt")
    values = input_files.read_toml(folder / CONFIG, "report")
    return flatten_tables(values, AdaptConfig)


def summary(record: Record) -> dict[str, str]:
    """Return the outcome of a run as label -> text; the numbers are those of metrics.jsonl."""
    rows, batch = record.rows, number(record.config.get("batch_size"))
    tiles = {
        "steps": f"{len(rows):,}" + (f" of {record.steps:,}" if record.steps else ""),
        "steps with an update": f"{updates(record):,}",
    }
    if batch:
        tiles["images seen"] = f"{len(rows) * batch:,.0f}"
    for label, name in (("loss", "loss"), ("center length", "center")):
        if values := [v for v in record.column(name) if v is not None]:
            tiles[f"{label}, first and last"] = f"{values[0]:.4g} → {values[-1]:.4g}"
    if rates := [v for v in record.column("images_per_s") if v is not None]:
        rate = statistics.median(rates)
        tiles["images/s, median"] = f"{rate:,.0f}" if rate >= 1000 else f"{rate:.4g}"
    if (share := waiting_share(record)) is not None:
        tiles["time waiting for images"] = f"{100 * share:.1f} %"
    bad = bad_steps(record)
    return tiles | ({"steps not applied (not finite)": f"{bad:,}"} if bad else {})


def updates(record: Record) -> int:
    """Return the number of steps that the gate let update the adapter."""
    return sum(row.get("open") is True for row in record.rows)


def bad_steps(record: Record) -> int:
    """Return the number of steps whose update was not applied because a value was not finite."""
    return sum(row.get("bad") is not None for row in record.rows)


def waiting_share(record: Record) -> float | None:
    """Return the share of the steps' time spent waiting for images; None if it was not measured."""
    waits = zip(record.column("data_wait"), record.step_seconds(), strict=True)
    measured = [(wait, seconds) for wait, seconds in waits if wait is not None and seconds is not None]
    total, waits_total = sum(seconds for _, seconds in measured), sum(wait for wait, _ in measured)
    return waits_total / total if 0 < total < math.inf and abs(waits_total) < math.inf else None


def time_shares(record: Record) -> dict[str, float]:
    """Return the shares of the steps' time: data (waiting), forward, backward, gaps; {} if they were not measured."""
    columns = {"data": "data_wait", "forward": "forward_s", "backward": "backward_s", "gaps": "other_s"}
    sums = {label: sum(max(0.0, v) for v in record.column(name) if v is not None) for label, name in columns.items()}
    total = sum(sums.values())
    measured = any(v is not None for v in record.column("forward_s"))
    return {label: value / total for label, value in sums.items()} if measured and 0 < total < math.inf else {}


def number(value: Any) -> float | None:
    """Return `value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer beyond every float
        return None


def _verdicts(folder: Path) -> dict[str, str]:
    entries = _json("\n".join(_lines(folder / verdict.FILE)))
    texts = {name: entries.get(name) for name in ("verdict", "measured")} if isinstance(entries, dict) else {}
    texts = {name: entry.get("text") for name, entry in texts.items() if isinstance(entry, dict)}
    return {name: printable(text) for name, text in texts.items() if isinstance(text, str)}


def _skipped(path: Path) -> list[tuple[str, str]]:
    try:
        return [(row[0], row[1]) for row in list(csv.reader(_lines(path)))[1:] if len(row) == 2]
    except csv.Error:
        return []


def _manifest(checkpoints: Path) -> dict[str, Any]:
    """Return the manifest of the newest checkpoint that can be read, {} if there is none."""
    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        manifest = _json("\n".join(_lines(folder / MANIFEST)))
        if isinstance(manifest, dict) and isinstance(manifest.get("environment"), dict):
            return manifest
    return {}


def _plan(manifest: dict[str, Any]) -> tuple[int, int] | None:
    """Return the steps that --budget planned and those at which it ends, None without them."""
    state = manifest.get("state")
    match state.get("plan") if isinstance(state, dict) else None:
        case [int(planned), _, _, int(end)] if end > 0:
            return planned, end
    return None


def _lines(path: Path, limit: int = input_files.MAX_TEXT_BYTES) -> list[str]:
    if not os.path.lexists(path):
        return []
    try:
        text = input_files.read_bytes(path, "report", limit).decode(errors="replace")
    except ConfigError as error:
        log.warning("%s; left out", error)
        return []
    # not splitlines: a file name may contain one of the other characters that it splits at
    return text.replace("\r\n", "\n").split("\n")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
