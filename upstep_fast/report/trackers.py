"""TensorBoard, Weights & Biases and MLflow: the numbers of metrics.jsonl, sent while a run goes on.

Each tracker has a thread of its own, so that a slow or missing network never holds up a step. Its first failure is one
warning; the run continues, and metrics.jsonl holds every number. accelerate.tracking offers the same libraries, but its
trackers log through a logger that raises unless a PartialState exists, which joins torchrun's process group by itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from upstep_fast import input_files
from upstep_fast.errors import ConfigError, Interrupted, first_line, printable
from upstep_fast.runtime.atomic_file import write_atomic
from upstep_fast.runtime.run_folder import is_own

log = logging.getLogger("upstep_fast")

PROJECT = "upstep_fast"  # of Weights & Biases; MLflow's experiment
CLOSE_SECONDS = 30.0  # for what is still to be sent when the run ends
ID_FILE = "{}-run-id.txt"  # in the folder of a run, for --resume
_MAX_WAITING = 100_000  # rows that wait for a tracker
_MAX_ROWS = 50  # sent at once
_FINISHED, _FAILED, _KILLED = "FINISHED", "FAILED", "KILLED"


Values = Mapping[str, float | str]  # the result of a run


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run. step: of the first row that it gets, above 0 in a resumed run."""

    out: Path
    step: int
    config: Mapping[str, Any]  # by flag


class Tracker(Protocol):
    """A run in a tracking library; its constructor opens it. Every method may raise what the library raises."""

    def log(self, rows: Sequence[tuple[int, dict[str, float]]]) -> None:
        """Send rows: step and {name: number}."""

    def conclude(self, step: int, values: Values) -> None:
        """Send the result of the run, numbers and texts, after `step` steps."""

    def finish(self, status: str) -> None:
        """Close the run. status: FINISHED, FAILED or KILLED."""


class TensorBoard:
    """An event file in the run's folder."""

    def __init__(self, run: TrackedRun):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.out), purge_step=run.step)  # hides a killed run's later steps

    def log(self, rows: Sequence[tuple[int, dict[str, float]]]) -> None:
        """Write rows."""
        for step, numbers in rows:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)

    def conclude(self, step: int, values: Values) -> None:
        """Write numbers as scalars, texts as texts."""
        for name, value in values.items():
            add = self._writer.add_text if isinstance(value, str) else self._writer.add_scalar
            add(name, value, step)

    def finish(self, status: str) -> None:
        """Close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which reads WANDB_PROJECT, WANDB_MODE, WANDB_DIR and the other variables of its own.

    A resumed run continues the run of the same id.
    """

    def __init__(self, run: TrackedRun):
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or wandb.setup().settings.mode  # read again: setup reads it only once
        # init would ask for a key on the terminal, behind the progress bar
        if mode in ("online", "shared") and wandb.run is None and not wandb.login(prompt=False):
            raise ConfigError("no API key; run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline")
        identifier = _run_id(run, "wandb") or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run.out.resolve().name),
            dir=os.environ.get("WANDB_DIR", str(run.out)),
            mode=mode,
            id=identifier,
            resume="allow",
            reinit="create_new",  # a run that the calling program has open is not ours to write to or to finish
            config=dict(run.config),
            # the console is this program's own: captured, its progress bar breaks
            settings=wandb.Settings(console="off", silent=True, finish_timeout=CLOSE_SECONDS),
        )
        _write_run_id(run, "wandb", identifier)
        log.info("wandb: run %s at %s", identifier, self._run.dir if self._run.offline else self._run.url)

    def log(self, rows: Sequence[tuple[int, dict[str, float]]]) -> None:
        """Send rows; the library ignores steps that it has already."""
        for step, numbers in rows:
            self._run.log(numbers, step=step)

    def conclude(self, step: int, values: Values) -> None:
        """Put the values into the run's summary."""
        self._run.summary.update(dict(values))

    def finish(self, status: str) -> None:
        """Close the run; a status other than FINISHED shows as failed."""
        self._run.finish(exit_code=int(status != _FINISHED))


class MLflow:
    """A run of MLflow, which reads MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME.

    A resumed run continues the run of the same id. The client is used, not MLflow's active run, which belongs to the
    program that calls `adapt`.
    """

    def __init__(self, run: TrackedRun):
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        self._id: Any = _run_id(run, "mlflow")
        self._sent = -1  # last step that the run has
        if self._id is not None:
            self._client.update_run(self._id, status="RUNNING")
            self._sent = max((m.step for m in self._client.get_metric_history(self._id, "images_per_s")), default=-1)
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        identifier = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = self._client.create_run(identifier, run_name=run.out.resolve().name).info.run_id
        _write_run_id(run, "mlflow", self._id)
        parameters = [Param(flag, str(value)[:500]) for flag, value in run.config.items()]  # 500: of older servers
        for part in _parts(parameters, 100):
            self._client.log_batch(self._id, params=part)

    def log(self, rows: Sequence[tuple[int, dict[str, float]]]) -> None:
        """Send rows of steps that the run does not have yet."""
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [Metric(k, v, now, step) for step, numbers in rows if step > self._sent for k, v in numbers.items()]
        for part in _parts(metrics, 1000):
            self._client.log_batch(self._id, metrics=part)

    def conclude(self, step: int, values: Values) -> None:
        """Send numbers as metrics, texts as tags."""
        from mlflow.entities import Metric, RunTag

        now = time.time_ns() // 1_000_000
        metrics = [Metric(k, v, now, step) for k, v in values.items() if not isinstance(v, str)]
        tags = [RunTag(k, v[:500]) for k, v in values.items() if isinstance(v, str)]
        self._client.log_batch(self._id, metrics=metrics, tags=tags)

    def finish(self, status: str) -> None:
        """Set the run's status."""
        self._client.set_terminated(self._id, status)


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


@dataclass(frozen=True)
class _Result:
    step: int
    values: Values


class Sender:
    """Thread that opens a tracker and sends it rows."""

    def __init__(self, name: str, run: TrackedRun):
        self._name, self._run = name, run
        self._rows: queue.SimpleQueue[tuple[int, dict[str, float]] | _Result | str] = queue.SimpleQueue()
        self._failed = False
        # a daemon: a request that never ends must not keep the program
        self._thread = threading.Thread(target=self._work, name=f"upstep_fast-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Queue a row; returns at once."""
        if self._rows.qsize() >= _MAX_WAITING:
            self._fail(f"{_MAX_WAITING:,} steps are not sent yet")
        if not self._failed:
            self._rows.put((step, numbers))

    def conclude(self, step: int, values: Values) -> None:
        """Queue the result of the run; returns at once."""
        self._rows.put(_Result(step, values))

    def close(self, error: BaseException | None) -> None:
        """Send the remaining rows and close the tracker, within CLOSE_SECONDS. error: what ended the run, or None."""
        killed = isinstance(error, (Interrupted, KeyboardInterrupt))
        self._rows.put(_KILLED if killed else _FINISHED if error is None else _FAILED)
        self._thread.join(1)
        if self._thread.is_alive():
            log.info("%s: sending what is left, at most %.0f s", self._name, CLOSE_SECONDS)
            self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._fail(f"no answer within {CLOSE_SECONDS:.0f} s")

    def _work(self) -> None:
        try:
            tracker = TRACKERS[self._name](self._run)
            while not self._failed:
                rows = [self._rows.get()]
                while len(rows) < _MAX_ROWS and not self._rows.empty():
                    rows.append(self._rows.get())
                if numbers := [row for row in rows if isinstance(row, tuple)]:
                    tracker.log(numbers)
                for result in (row for row in rows if isinstance(row, _Result)):
                    tracker.conclude(result.step, result.values)
                if isinstance(rows[-1], str):
                    return tracker.finish(rows[-1])
        except Exception as error:  # libraries raise classes of their own, and those of their transport
            self._fail(first_line(error))

    def _fail(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            cure = "the run continues without it; metrics.jsonl holds every number"
            log.warning("%s: %s; %s", self._name, printable(reason, 300), cure)


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _run_id(run: TrackedRun, name: str) -> str | None:
    """Return the id of the run to continue; None for a new one."""
    path = run.out / ID_FILE.format(name)
    if not run.step or not os.path.lexists(path):
        return None
    with contextlib.suppress(ConfigError):
        if re.fullmatch(r"[\w-]{1,128}", text := input_files.read_text(path, name, 1000).strip(), re.ASCII):
            return text
    log.warning("%s: %s holds no id of a run; a new run begins there", name, path)
    return None


def _write_run_id(run: TrackedRun, name: str, identifier: str) -> None:
    if is_own(run.out):
        write_atomic(run.out / ID_FILE.format(name), f"{identifier}\n".encode())
