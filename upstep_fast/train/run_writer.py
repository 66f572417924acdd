"""What a run writes while it goes on: rows, the progress line, checkpoints. Rank 0 writes, the others keep still."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.methods.gate import GateState
from upstep_fast.report.metrics import Metrics
from upstep_fast.report.progress import Progress
from upstep_fast.runtime import checkpoint, distributed
from upstep_fast.runtime import run_folder as output
from upstep_fast.train import resume
from upstep_fast.train.resume import Identity
from upstep_fast.train.state import RunState


class RunWriter:
    """The files of a run that goes on in `out`, from `state` on. A context; its methods raise OSError."""

    def __init__(self, config: AdaptConfig, state: RunState, out: Path, identity: Identity):
        self._config, self._folder, self._identity = config, out / output.CHECKPOINTS, identity
        self._stack = contextlib.ExitStack()
        self._metrics: Metrics | None = None
        if distributed.is_first():
            self._metrics = self._stack.enter_context(
                Metrics(out / "metrics.jsonl", state.step, config.output.tensorboard)
            )
            self._progress = self._stack.enter_context(Progress(config, state.gate))
            self._writer = self._stack.enter_context(checkpoint.Writer(config.checkpoints.keep))

    def write(self, row: dict[str, Any], gate: GateState) -> None:
        """Append a row to metrics.jsonl and moves the progress line. `other_s` loses what the step's halves took."""
        row["other_s"] = max(0.0, row["other_s"] - row["forward_s"] - row["backward_s"])
        if self._metrics:
            self._progress.update(row, gate)
            self._metrics.write(row)

    def save(self, state: RunState) -> None:
        """Begins a checkpoint; to be called on every rank, since each has met bad images of its own."""
        for skipped in distributed.gather(state.skipped):
            state.skipped.update(skipped)
        if self._config.runtime.debug:
            digest = hashlib.sha256(resume.copied(state)()[resume.STATE]).hexdigest()
            # 13 hexadecimal digits are a whole number that a float64 holds
            distributed.check_same(f"step {state.step}: the state's digests", [int(digest[:13], 16)])
        if self._metrics:
            self._metrics.sync()
            resume.save(state, self._folder, self._identity, self._writer)

    def wait(self) -> None:
        """Until the checkpoint is on disk."""
        if self._metrics:
            self._writer.wait()

    def read_back(self, step: int) -> checkpoint.Checkpoint:
        """The checkpoint of `step`, once it is on disk, on every rank. Raises DamagedError."""
        self.wait()
        distributed.gather(None)  # the others read what rank 0 has written
        return checkpoint.load(self._folder / f"step-{step:08d}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)
