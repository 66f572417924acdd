"""Gain over processor time and over forgetting, means over the sets and seeds, as an SVG."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

Means = Mapping[tuple[str, int], list[list[float]]]
# of a seed's means: seconds, whitening alone, adapted, ensemble, adapted w., ensemble w., own domain of both models
SECONDS, WHITENING = 0, 1
FORMS = {"adapted, whitened": (4, 6, "o-"), "ensemble, whitened": (5, 7, "s--")}  # gain, own domain, line
NAMES = {"engine": "UpStep's objective, all blocks", "fast": "default recipe", "plain": "script of PEFT and timm"}
NAMES |= {"diet": "DIET, lr 1e-3", "diet --lr 6e-3": "DIET, lr 6e-3"}
mpl.rcParams["svg.hashsalt"] = "upstep_fast"  # the same names of elements in each file


def draw(means: Means, path: Path) -> None:
    """Write the plot, by arm of NAMES, with the range of the seeds. means: as of `time_to_gain_table.means`."""
    arms: dict[str, list[list[list[float]]]] = defaultdict(list)
    for (arm, _), seeds in sorted(means.items()):
        if arm in NAMES:
            arms[arm].append(seeds)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True, layout="constrained")
    for index, (arm, points) in enumerate(arms.items()):
        for form, (gain, own, style) in FORMS.items():
            x, y, change = ([statistics.mean(s[i] for s in seeds) for seeds in points] for i in (SECONDS, gain, own))
            low, high = ([pick(s[gain] for s in seeds) for seeds in points] for pick in (min, max))
            left.plot(x, y, style, label=f"{NAMES[arm]}: {form}", color=f"C{index}")
            left.fill_between(x, low, high, alpha=0.2, color=f"C{index}")
            right.plot(change, y, style, color=f"C{index}")
    alone = statistics.mean(s[WHITENING] for points in arms.values() for seeds in points for s in seeds)
    left.axhline(alone, linestyle=":", color="gray", label="whitening alone")
    right.axhline(alone, linestyle=":", color="gray")
    left.set(xlabel="processor time, s", ylabel="gain of k-NN, points", xlim=(0, None))
    right.set(xlabel="change on the model's own domain, points")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
