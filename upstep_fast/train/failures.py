"""Steps that end a run: several in a row that were not applied, or many with collapsed features."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from upstep_fast.data.sources.source import Source
from upstep_fast.errors import RunFailedError
from upstep_fast.runtime import distributed
from upstep_fast.runtime.run_folder import CHECKPOINTS
from upstep_fast.train.state import RunState

log = logging.getLogger("upstep_fast")

MAX_BAD_STEPS = 3  # non-finite steps in a row
MAX_COLLAPSED_STEPS = 50  # steps in a row with collapsed features


def stop_if_bad(state: RunState, row: dict[str, Any], source: Source, indices: Tensor, out: Path) -> None:
    """Record a step that was not applied; raise at the third in a row, after writing out/bad_batches.json.

    row: completed metrics of the step. indices: this rank's images of it. Raises RunFailedError, or OSError if the file
    cannot be written.
    """
    if row["bad"] is None:
        if row["open"]:
            state.bad.clear()
        return
    log.warning("step %d: %s; not applied", row["step"], row["bad"])
    names = [source.name(index) for rank in distributed.gather(indices.tolist()) for index in rank]
    state.bad.append({"step": row["step"], "reason": row["bad"], "images": names})
    if len(state.bad) >= MAX_BAD_STEPS:
        path = out / "bad_batches.json"
        if distributed.is_first():
            path.write_text(json.dumps(state.bad, indent=1) + "\n")
        raise RunFailedError(
            f"step {row['step']}: {row['bad']}, {len(state.bad)} steps in a row; the images are listed in {path}, the "
            f"adapter before them is in {out / 'adapter'}; lower --lr or use --precision fp32"
        )


def stop_if_collapsed(state: RunState, row: dict[str, Any], out: Path) -> None:
    """Raise RunFailedError once features have been collapsed for many steps in a row.

    Training can pass through a collapse and leave it, so single steps do not count. row: completed metrics of a step,
    which may be one step older than `state.collapsed`.
    """
    if "collapsed" in row and state.collapsed >= MAX_COLLAPSED_STEPS:
        raise RunFailedError(
            f"step {row['step']}: collapse: {row['collapsed']}, {state.collapsed} steps in a row; "
            f"lower --lr, or go back to an earlier checkpoint in {out / CHECKPOINTS}"
        )
