"""Files of a running adaptation: metrics rows, progress line, checkpoints and the adapter. Only rank 0 writes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.data.loading.loader import Batch, Loader
from upstep_fast.data.sources.source import Source
from upstep_fast.evaluation.verdict import Verdict
from upstep_fast.model import model_card, peft_format
from upstep_fast.report.metrics import Metrics
from upstep_fast.report.progress import Progress
from upstep_fast.runtime import checkpoint, distributed
from upstep_fast.runtime import run_folder as output
from upstep_fast.runtime.atomic_file import write_atomic
from upstep_fast.train import resume
from upstep_fast.train.failures import stop_if_bad, stop_if_collapsed
from upstep_fast.train.identity import Identity
from upstep_fast.train.state import RunState
from upstep_fast.train.step_row import flush
from upstep_fast.train.strength import at_given_strength, is_chosen_at_end

log = logging.getLogger("upstep_fast")


class RunWriter:
    """Writer of a run's files in `out`, from `state.step` on, as a context.

    A row whose step the device has not finished yet waits in a queue, together with its images' indices.
    """

    def __init__(
        self, config: AdaptConfig, state: RunState, source: Source, loader: Loader, out: Path, identity: Identity
    ):
        self._config, self._state, self._source, self._loader = config, state, source, loader
        self._out, self._identity = out, identity
        self._rows: deque[tuple[dict[str, Any], Tensor]] = deque()
        self.saved_step: int | None = None  # of the newest checkpoint of this process
        self._stack = contextlib.ExitStack()
        self._metrics: Metrics | None = None
        if distributed.is_first():
            trackers, device = config.output.trackers, next(state.method.vit.parameters()).device.type
            metrics = Metrics(out / "metrics.jsonl", state.step, trackers, identity.config)
            self._metrics = self._stack.enter_context(metrics)
            self._progress = self._stack.enter_context(Progress(config, state.gate, device))
            self._writer = self._stack.enter_context(checkpoint.Writer(config.checkpoints.keep))

    def after_step(self, row: dict[str, Any], batch: Batch, began: float, *, save: bool, wait: bool) -> None:
        """Write the rows that are complete, and a checkpoint if `save`; if `wait`, return once it is on disk.

        row: metrics of the step, completed later by `step.flush` or the next step. began: `time.monotonic()` in seconds
        before the batch was loaded. Raises RunFailedError if the disk refuses, or after too many bad steps.
        """
        if save:
            flush(self._state)
        seconds = max(1e-9, time.monotonic() - began)
        row |= {
            "images_per_s": self._config.optimization.batch_size / seconds,
            "data_wait": self._loader.data_wait,
            "other_s": seconds - self._loader.data_wait,  # forward_s and backward_s are subtracted once they are known
            "epoch": batch.epoch,
            "replaced": batch.replaced,
            **distributed.traffic(seconds),
        }
        self._rows.append((row, batch.indices))
        with output.writing(self._out):
            while len(self._rows) > (self._state.pending is not None):
                row, indices = self._rows.popleft()
                self._write(row)
                stop_if_bad(self._state, row, self._source, indices, self._out)
                stop_if_collapsed(self._state, row, self._out)
            if save:
                self.save()
            if wait:
                self.wait()

    def set_end(self, num_steps: int) -> None:
        """Show the progress of a run of so many steps."""
        if self._metrics:
            self._progress.set_end(num_steps)

    def _write(self, row: dict[str, Any]) -> None:
        row["other_s"] = max(0.0, row["other_s"] - row["forward_s"] - row["backward_s"])
        if self._metrics:
            self._progress.update(row, self._state.gate)
            self._metrics.write(row)

    def conclude(self, verdicts: Iterable[Verdict | None]) -> None:
        """Send the verdicts and the final figures to the trackers."""
        if self._metrics is None:
            return
        values: dict[str, float | str] = {"updates": self._state.gate.num_updates, "final_loss": self._state.loss}
        for v in verdicts:
            if v is not None:
                name = "measured" if v.kind == "measured" else "verdict"
                figures = {"gain": v.gain, "low": v.low, "high": v.high, "images": v.images}
                values |= {name: v.text} | {f"{name}_{key}": value for key, value in figures.items()}
        self._metrics.conclude(self._state.step, values)

    def save(self) -> None:
        """Start writing a checkpoint in the background. Collective: each rank has skipped images of its own."""
        state = self._state
        for skipped in distributed.gather(state.skipped):
            state.skipped.update(skipped)
        if self._config.runtime.debug:
            digest = hashlib.sha256(resume.copied(state)()[resume.STATE]).hexdigest()
            # 13 hexadecimal digits are an integer that a float64 holds exactly
            distributed.check_same(f"step {state.step}: the state's digests", [int(digest[:13], 16)])
        if self._metrics:
            self._metrics.sync()
            resume.save(state, self._out / output.CHECKPOINTS, self._identity, self._writer)
        self.saved_step = state.step

    def wait(self) -> None:
        """Wait until the checkpoint is on disk. Raises OSError if it could not be written."""
        if self._metrics:
            self._writer.wait()

    def read_back(self) -> checkpoint.Checkpoint:
        """Return the newest checkpoint, read from disk on every rank. Raises DamagedError."""
        with output.writing(self._out):
            self.wait()
        distributed.gather(None)  # the other ranks read what rank 0 has written
        return checkpoint.load(self._out / output.CHECKPOINTS / f"step-{self.saved_step:08d}")

    @contextlib.contextmanager
    def saves_on_exit(self) -> Iterator[None]:
        """Write the remaining rows and skipped.csv at the end of this context; after an exception the adapter, too."""
        with self.adapter_on_failure():
            yield
        with output.writing(self._out):
            self._write_remaining()

    @contextlib.contextmanager
    def adapter_on_failure(self) -> Iterator[None]:
        """Write what there is, with the adapter so far, after an exception; at the end the loop writes the adapter."""
        try:
            yield
        except BaseException:
            # the user must see the first cause, not a full disk or a failed device met afterwards
            with contextlib.suppress(OSError, RuntimeError):
                if output.is_own(self._out):
                    self._write_remaining()
                    self._write_adapter()
            raise

    def _write_remaining(self) -> None:
        if not distributed.is_first():
            return
        with contextlib.suppress(RuntimeError):  # of a device that has failed
            flush(self._state)
            while self._rows:
                self._write(self._rows.popleft()[0])
        self._loader.write_skipped(self._out / "skipped.csv")

    def _write_adapter(self) -> None:
        if not distributed.is_first() or not self._state.gate.num_updates:
            return
        method = self._state.method
        files = at_given_strength(method.result_files(), self._config, len(method.vit.blocks))
        peft_format.write_files(self._out / "adapter", files)
        name, planned = self._config.model.name, self._state.end(self._config.optimization.num_steps)
        card = model_card.adapter_card(
            name, images=len(self._source), steps=self._state.step, verdicts=(), planned=planned
        )
        write_atomic(self._out / "adapter" / model_card.NAME, card)
        if is_chosen_at_end(self._config):
            log.warning("strength: auto is chosen at the end; %s is at full strength", self._out / "adapter")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)
