"""What a run left in its folder, read back: nothing in it is trusted, and what is missing is missing."""

from __future__ import annotations

import csv
import json
import math
import statistics
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upstep_fast.errors import ConfigError
from upstep_fast.report.image_panels import Pictures
from upstep_fast.report.image_panels import read as read_pictures
from upstep_fast.runtime.checkpoint import MANIFEST
from upstep_fast.runtime.run_folder import CHECKPOINTS, CONFIG


@dataclass(frozen=True)
class Record:
    """One run. Every number in `rows` is finite or None."""

    folder: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]  # metrics.jsonl
    skipped: list[tuple[str, str]]  # name, reason
    scores: dict[str, Any] | None  # eval.json
    environment: dict[str, Any]  # versions and device, from the newest checkpoint
    messages: list[str]  # train.log's warnings and errors
    pictures: Pictures | None = None  # pictures.json

    @property
    def steps(self) -> int | None:
        """How many steps the run was to take."""
        value = self.config.get("steps")
        return value if isinstance(value, int) else None

    def column(self, name: str) -> list[float | None]:
        """A number of every step; None where there is none."""
        return [number(row.get(name)) for row in self.rows]

    def step_seconds(self) -> list[float | None]:
        """Seconds of every step, the wait for images included."""
        batch = number(self.config.get("batch_size"))
        return [batch / rate if batch and rate else None for rate in self.column("images_per_s")]


def read_record(folder: Path) -> Record:
    """The run in `folder`. Raises ConfigError if it holds none."""
    try:
        config = tomllib.loads((folder / CONFIG).read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise ConfigError(f"report: {folder} holds no run of upstep-fast ({CONFIG}: {error.strerror})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"report: {folder / CONFIG} is not valid TOML: {error}") from error
    rows = [row for line in _lines(folder / "metrics.jsonl") if isinstance(row := _json(line), dict)]
    scores = _json("\n".join(_lines(folder / "eval.json")))
    levels = ("WARNING", "ERROR", "CRITICAL")
    return Record(
        folder=folder,
        config=config,
        rows=[row for row in rows if number(row.get("step")) is not None],
        skipped=_skipped(folder / "skipped.csv"),
        scores=scores if isinstance(scores, dict) else None,
        environment=_environment(folder / CHECKPOINTS),
        pictures=read_pictures(folder),
        messages=[line for line in _lines(folder / "train.log") if any(f" {level} " in line[:40] for level in levels)],
    )


def summary(record: Record) -> dict[str, str]:
    """What a run came to, label -> text; the numbers are those of metrics.jsonl."""
    rows, batch = record.rows, number(record.config.get("batch_size"))
    losses = [v for v in record.column("loss") if v is not None]
    centres = [v for v in record.column("center") if v is not None]
    rates = [v for v in record.column("images_per_s") if v is not None]
    waits = [
        (wait, seconds)
        for wait, seconds in zip(record.column("data_wait"), record.step_seconds(), strict=True)
        if wait is not None and seconds is not None
    ]
    found = {"steps": f"{len(rows):,}" + (f" of {record.steps:,}" if record.steps else "")}
    found["steps with an update"] = f"{sum(row.get('open') is True for row in rows):,}"
    if batch:
        found["images seen"] = f"{len(rows) * batch:,.0f}"
    if losses:
        found["loss, first and last"] = f"{losses[0]:.4g} → {losses[-1]:.4g}"
    if centres:
        found["centre, first and last"] = f"{centres[0]:.4g} → {centres[-1]:.4g}"
    if rates:
        found["images/s, median"] = f"{statistics.median(rates):,.4g}"
    if waits and (total := sum(seconds for _, seconds in waits)):
        found["time waiting for images"] = f"{100 * sum(wait for wait, _ in waits) / total:.1f} %"
    bad = sum(row.get("bad") is not None for row in rows)
    return found | ({"steps not applied (not finite)": f"{bad:,}"} if bad else {})


def split(record: Record) -> dict[str, float]:
    """Where the steps' time went, as parts of 1: waiting for data, forward, backward, and what lies between them."""
    columns = {"data": "data_wait", "forward": "forward_s", "backward": "backward_s", "gaps": "other_s"}
    sums = {label: sum(max(0.0, v) for v in record.column(name) if v is not None) for label, name in columns.items()}
    total = sum(sums.values())
    measured = any(v is not None for v in record.column("forward_s"))
    return {label: value / total for label, value in sums.items()} if measured and 0 < total < math.inf else {}


def number(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer beyond every float
        return None


def _skipped(path: Path) -> list[tuple[str, str]]:
    try:
        return [(row[0], row[1]) for row in list(csv.reader(_lines(path)))[1:] if len(row) == 2]
    except csv.Error:
        return []


def _environment(checkpoints: Path) -> dict[str, Any]:
    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        manifest = _json("\n".join(_lines(folder / MANIFEST)))
        if isinstance(manifest, dict) and isinstance(manifest.get("environment"), dict):
            return manifest["environment"]
    return {}


def _lines(path: Path) -> list[str]:
    try:
        # not splitlines: a name may hold one of the odd characters that it takes for the end of a line
        return path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
