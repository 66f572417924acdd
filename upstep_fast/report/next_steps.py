"""Suggestions after a run: commands to copy, and hints from its metrics."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from upstep_fast.config.finetune import FinetuneConfig
from upstep_fast.errors import printable
from upstep_fast.report.accuracy import within_error
from upstep_fast.report.run_record import Record, bad_steps, number, updates, waiting_share

MAX_WAITING = 0.2  # share of the time


def next_steps(record: Record) -> list[tuple[str, str]]:
    """Return what the user can do next, as (reason, command); the command is empty for a hint."""
    out, done, steps = record.folder, len(record.rows), record.steps
    if steps and done < steps:
        command = ["upstep-fast", "adapt", "--config", str(out / "config.toml"), "--resume"]
        return [
            (f"The run stopped after {done:,} of {steps:,} steps. Continue:", shell_command(command)),
            *_hints(record),
        ]
    scores = str(out / "eval.json")
    suggestions, (explore, search) = [], look_commands(out)
    if record.scores is None:
        reason = "Measure the accuracy, if you have labeled images as CLASS/…, or train/CLASS/… and test/CLASS/…:"
        command = ["upstep-fast", "eval", _place(out), "--data", "LABELED_FOLDER", "--json", scores]
        suggestions.append((reason, f"{shell_command(command)}\n{shell_command(['upstep-fast', 'report', str(out)])}"))
    export = ["upstep-fast", "export", _place(out), "--format", "timm", "--out", str(out / "exported")]
    suggestions.append(("Look through your images, before and after:", explore))
    suggestions.append(("Find the images most similar to one:", search))
    suggestions.append(("Write the features of your images:", embed_command(record.config, out)))
    suggestions.append(("Export the adapted model for timm:", shell_command(export)))
    return suggestions + _hints(record)


def shell_command(parts: Sequence[str]) -> str:
    """Return the parts as one line of a POSIX shell; a part with control characters in bash's and zsh's $'...'."""
    return " ".join(shlex.quote(part) if printable(part, len(part)) == part else _ansi_quoted(part) for part in parts)


def _ansi_quoted(text: str) -> str:
    return f"$'{''.join(map(_ansi_char, text))}'"


def _ansi_char(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # a byte of a path that is not UTF-8
        return f"\\x{ord(char) & 0xFF:02x}"
    return char if char not in "'\\" and printable(char) == char else f"\\U{ord(char):08x}"


def embed_command(config: Mapping[str, Any], out: Path) -> str:
    """Return the command that writes the features of a run's images. config: as read from out/config.toml."""
    data = config.get("data")
    images = [str(path) for path in data] if isinstance(data, (list, tuple)) else []
    column = ["--image-column", str(config["image_column"])] if config.get("image_column") else []
    arguments = ["--data", *images, *column, "--out", str(out / "features.npy")]
    return shell_command(["upstep-fast", "embed", _place(out), *arguments])


def look_commands(out: Path) -> tuple[str, str]:
    """Return the commands that look through a run's images, and that find the images most similar to one."""
    place = _place(out)
    return shell_command(["upstep-fast", "explore", place]), shell_command(["upstep-fast", "search", place, "IMAGE"])


def _place(out: Path) -> str:
    """Return the folder of a run as a command's first argument: it names the model, its options and the adapter."""
    return f"./{out}" if str(out).startswith("-") else str(out)


def predict_command(config: FinetuneConfig) -> str:
    """Return the command that classifies the images of a run of finetune."""
    out, data = Path(config.output.out), config.data
    columns = [("--image-column", data.image_column), ("--label-column", data.label_column)]
    named = [part for flag, name in columns if name is not None for part in (flag, name)]
    arguments = [_place(out), "--data", *data.paths, *named, "--out", str(out / "predictions.csv")]
    return shell_command(["upstep-fast", "predict", *arguments])


def _hints(record: Record) -> list[tuple[str, str]]:
    hints = []
    share = waiting_share(record)
    if share is not None and share > MAX_WAITING:
        hints.append(
            f"The device waited for images {100 * share:.0f} % of the time: raise --num-workers or use smaller files."
        )
    if record.rows and not updates(record):
        hints.append("No step made an update: the gate skipped every step. Try --gate none.")
    if bad_steps(record):
        hints.append("Some steps were not finite: lower --lr or use --precision fp32.")
    base, adapted = (_knn(record, kind) for kind in ("base", "adapted"))
    if base is not None and adapted is not None and adapted < base:
        error = ", within the error" if within_error(record.scores or {}, "adapted", "knn") else ""
        hints.append(
            f"The adapted features are worse than the base model's (k-NN accuracy {base:.1f} -> {adapted:.1f} %{error})"
            ": use the ensemble, a lower --lr or fewer --steps."
        )
    return [(hint, "") for hint in hints]


def _knn(record: Record, kind: str) -> float | None:
    part = (record.scores or {}).get(kind)
    return number(part.get("knn")) if isinstance(part, dict) else None
