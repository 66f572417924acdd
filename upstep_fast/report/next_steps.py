"""What a user may do after a run: commands to copy, and what its figures suggest."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upstep_fast.config.base import BackboneConfig
from upstep_fast.report.run_record import Record, number, summary


def next_steps(record: Record) -> list[tuple[str, str]]:
    """What may be done now: (why, command or nothing)."""
    out, done, steps = record.folder, len(record.rows), record.steps
    if steps and done < steps:
        command = ["upstep-fast", "adapt", "--config", str(out / "config.toml"), "--resume"]
        return [(f"The run stopped after {done:,} of {steps:,} steps. Go on:", shlex.join(command)), *_hints(record)]
    model, adapter, scores = _model(record.config), ["--adapter", str(out / "adapter")], str(out / "eval.json")
    found = []
    if record.scores is None:
        why = "Measure it, if you have labelled images as train/CLASS/… and test/CLASS/…:"
        command = ["upstep-fast", "eval", *model, "--data", "LABELLED_FOLDER", *adapter, "--json", scores]
        found.append((why, f"{shlex.join(command)}\n{shlex.join(['upstep-fast', 'report', str(out)])}"))
    export = ["upstep-fast", "export", *model, *adapter, "--format", "timm", "--out", str(out / "exported")]
    found.append(("Features of your images:", embed_command(record.config, out)))
    found.append(("The adapted model for timm:", shlex.join(export)))
    return found + _hints(record)


def embed_command(config: Mapping[str, Any], out: Path) -> str:
    """The command that writes the features of a run's images; config: that run's, `out`: its folder."""
    data = config.get("data")
    paths = [str(path) for path in data] if isinstance(data, (list, tuple)) else []
    where = ["--data", *paths, "--adapter", str(out / "adapter"), "--out", str(out / "features.npy")]
    return shlex.join(["upstep-fast", "embed", *_model(config), *where])


def _model(config: Mapping[str, Any]) -> list[str]:
    # the flags that name the same model to another command
    flags: list[str] = []
    for field in dataclasses.fields(BackboneConfig):
        value = config.get(field.name)
        if value is not None and value != field.default:
            parts = value if isinstance(value, (list, tuple)) else [value]
            flags += [f"--{field.name.replace('_', '-')}", *map(str, parts)]
    return flags


def _hints(record: Record) -> list[tuple[str, str]]:
    found = []
    values = summary(record)
    waiting = float(values.get("time waiting for images", "0").split()[0])
    if waiting > 20:
        why = f"The device waited for images {waiting:.0f} % of the time: raise --num-workers, or store smaller images."
        found.append((why, ""))
    if record.rows and values["steps with an update"] == "0":
        found.append(("No step made an update: the gate was never open. Try --gate none.", ""))
    if "steps not applied (not finite)" in values:
        found.append(("Some steps were not finite: lower --lr or use --precision fp32.", ""))
    base, adapted = (_knn(record, kind) for kind in ("base", "adapted"))
    if base is not None and adapted is not None and adapted < base:
        why = (
            f"The adapted features are worse ({adapted:.1f} against {base:.1f} % k-NN): use the ensemble, a lower --lr"
        )
        found.append((f"{why} or fewer --steps.", ""))
    return found


def _knn(record: Record, kind: str) -> float | None:
    part = (record.scores or {}).get(kind)
    return number(part.get("knn")) if isinstance(part, dict) else None
