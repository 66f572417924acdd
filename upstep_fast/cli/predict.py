"""The lines that predict prints."""

from __future__ import annotations

from upstep_fast.config.predict import PredictConfig
from upstep_fast.runtime.terminal import print_line
from upstep_fast.train.finetune.predict import run as predict


def run(config: PredictConfig) -> None:
    """Run the command and print what it found. Raises UpstepError."""
    done = predict(config)
    print_line(f"predictions: {done.files[0]}  ({done.images:,} images, {done.classes:,} classes)")
    if (of := done.measured) is None:
        return
    low, high = of.interval
    print_line(
        f"accuracy: {of.top1:.1f} % (95 % interval {low:.1f} to {high:.1f}), balanced {of.balanced:.1f}, on "
        f"{len(of.truth):,} labeled images"
    )
    print_line(f"per class: {', '.join(map(str, done.files[1:]))}")
