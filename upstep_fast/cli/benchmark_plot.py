"""Plot of `upstep-fast bench`: medians with quartiles, of the forward pass and of forward and backward."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upstep_fast.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_plot(path: str | None) -> None:
    """Raise ConfigError if no plot can be written to `path`, before minutes are spent on the timing."""
    if path is None:
        return
    if Path(path).suffix not in (".svg", ".png", ".pdf"):
        raise ConfigError(f"plot: {path} must end in .svg, .png or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plot: matplotlib is not installed; pip install 'upstep_fast[report]'")


def write_plot(result: dict[str, Any], path: str) -> None:
    """Write the plot of `benchmark.run`'s result. Raises OSError."""
    draw(result).savefig(path)


def draw(result: dict[str, Any]) -> Figure:
    """Return the plot of `benchmark.run`'s result."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    for axes, (kind, title) in zip(
        figure.subplots(1, 2), (("backward", "forward and backward"), ("forward", "forward")), strict=True
    ):
        rows = result[kind]
        medians = [row["median_ms"] for row in rows]
        low = [row["median_ms"] - row["low_ms"] for row in rows]
        high = [row["high_ms"] - row["median_ms"] for row in rows]
        bars = axes.barh([row["name"] for row in rows], medians, xerr=[low, high], capsize=3, color="#4878a8")
        axes.bar_label(bars, [f" {medians[0] / median:.2f}x" for median in medians], padding=4)
        axes.invert_yaxis()
        axes.set(title=title, xlabel="ms, median and quartiles", xlim=(0, 1.25 * max(row["high_ms"] for row in rows)))
    card, config = result["device"], result["config"]
    where = card.get("gpu") or f"{card['processor']}, {card['threads']} threads"
    figure.suptitle(f"{config['model']}, {config['batch_size']} views, {where}, torch {card['torch']}", fontsize=9)
    return figure
