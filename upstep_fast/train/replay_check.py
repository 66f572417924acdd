"""--verify-resume: repeats the first steps after a checkpoint from that checkpoint and compares them bit for bit."""

from __future__ import annotations

import logging
from typing import Any

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.data.sources.source import Source
from upstep_fast.errors import RunFailedError
from upstep_fast.methods.gate import GateRule
from upstep_fast.model.backbone import Backbone
from upstep_fast.runtime.checkpoint import Checkpoint
from upstep_fast.runtime.device import Compute
from upstep_fast.train import resume
from upstep_fast.train.batches import make_loader
from upstep_fast.train.identity import Identity
from upstep_fast.train.run_writer import RunWriter
from upstep_fast.train.state import RunState, fresh_state
from upstep_fast.train.step import step
from upstep_fast.train.step_row import flush

CLOCK = ("forward_s", "backward_s")  # times differ between runs

log = logging.getLogger("upstep_fast")


class ReplayCheck:
    """Check of one resume, `config.checkpoints.verify` steps long; 0: off.

    base: the base model without adapters, None if off; it is copied and stays as it is.
    """

    def __init__(
        self,
        config: AdaptConfig,
        compute: Compute,
        source: Source,
        base: Backbone | None,
        rule: GateRule,
        identity: Identity,
        writer: RunWriter,
    ):
        self._config, self._compute, self._source, self._base = config, compute, source, base
        self._rule, self._identity, self._writer = rule, identity, writer
        self._num_steps = config.checkpoints.verify
        self._checkpoint: Checkpoint | None = None
        self._rows: list[dict[str, Any]] = []

    def after_step(self, row: dict[str, Any], state: RunState, *, is_last: bool) -> None:
        """Record the metrics of a step after the first checkpoint; after the last one to compare, repeat them all.

        Raises RunFailedError naming the first three numbers or tensors that differ.
        """
        if not self._num_steps or self._writer.saved_step is None:
            return
        if self._checkpoint is None:
            self._checkpoint = self._writer.read_back()
        flush(state)
        self._rows.append({name: value for name, value in row.items() if name not in CLOCK})
        if len(self._rows) == self._num_steps or is_last:
            self._compare(state, self._checkpoint)
            self._num_steps = 0

    def _compare(self, state: RunState, checkpoint: Checkpoint) -> None:
        rows, repeated = self._repeat(checkpoint)
        wrong = [
            f"step {old['step']}: {key} was {old[key]}, is {new.get(key)}"
            for old, new in zip(self._rows, rows, strict=True)
            for key in old
            if repr(old[key]) != repr(new.get(key))
        ]
        wrong += resume.differences(state, repeated)
        if wrong:
            raise RunFailedError(
                f"verify_resume: {len(rows)} steps repeated from {checkpoint.path} are not the same: "
                f"{'; '.join(wrong[:3])}{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}"
            )
        log.info("verify_resume: %d steps repeated from %s are bit for bit the same", len(rows), checkpoint.path)

    def _repeat(self, checkpoint: Checkpoint) -> tuple[list[dict[str, Any]], RunState]:
        """Take as many steps from the checkpoint as were recorded. Returns their metrics and the state after them."""
        assert self._base is not None
        config, compute = self._config, self._compute
        state = fresh_state(config, compute, self._base.copy())
        resume.restore(state, checkpoint, self._identity)
        with make_loader(config, self._source, state, compute) as loader:
            rows = [step(state, next(loader).views, self._rule, config, compute) for _ in self._rows]
        flush(state)
        return rows, state
