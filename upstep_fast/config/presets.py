"""Recipes of `adapt`, by --preset; single flags override them. Without one: the recipe that gained most.

Change of 20-NN in points, adapted / ensemble, and on the model's own domain, adapted / ensemble; "w." with whitened
features beside the others (whitening.py):

    none       VICReg, last third of the blocks, 320 steps  +8.9 / +7.3    -3.7 / +0.1
               w.                                           +12.9 / +11.3
    fast       the same in 80 steps                         +5.3 / +3.6    -1.3 / +1.2
               w.                                           +9.0 / +7.5
    upstep     clustering as in METHODS, all blocks         +6.5 / +4.9    -0.1 (ensemble, w.)
               w.                                           +11.1 / +10.3
    gentle     half the steps, written at half strength     +2.8 / +2.6    +0.4 / +0.7
               w.                                           +9.5 / +8.4    -0.1 / +0.3
    balanced   plain, written at 3/4 strength               +5.0 / +4.2    -2.7 / +0.1
    strong     plain, three times the learning rate         +7.1 / +6.5    -12.4 / -0.9

none: five sets, test part, three seeds, 244 s of one thread (bench/results/gain_and_time.md).
fast: two sets (hand signs, cartoons), three seeds, in 73 s of one thread each (bench/results/preset_fast.json).
upstep: five sets, test part, 300 gated steps of 128 images, one seed; gentle: the same on the held-out third
(bench/results/quality_five_sets.md; without training w. has +6.7, +0.2).
balanced, strong: METHODS section 6, eight sets, 400 ungated steps of 256 images, one seed; not measured w. They are not
gated, since the rows are not, and no gate has beaten skipping at random yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upstep_fast.config.adapt import CLUSTERING, is_upstep
from upstep_fast.errors import ConfigError

_UPSTEP = {"objective": "clustering", "cvr": "sq", "gate": "quantile", "batch_size": 256, "lr": 1e-3, "crop_min": None}
_PLAIN = _UPSTEP | {"gate": "none", "cvr": "off"}

PRESETS: dict[str, dict[str, Any]] = {
    "upstep": _UPSTEP,
    "gentle": _UPSTEP | {"lr": 3e-3, "cvr": "off", "crop_min": 0.5, "strength": 0.5},
    "balanced": _PLAIN | {"strength": 0.75},
    "strong": _PLAIN | {"lr": 3e-3},
    "fast": {"steps": 80},
}
_OTHERS = {"batch_size": 256}  # of ExPLoRA and DIET, for `plan`, whose own defaults are those of UpStep


def with_preset(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` over the values of the preset they name, or of upstep if they name none and ask for clustering.

    Raises ConfigError for an unknown name.
    """
    name = options.get("preset")
    if not is_upstep(options):
        return _OTHERS | dict(options)
    if name is None:
        return (_UPSTEP if _asks_for_clustering(options) else {}) | dict(options)
    if name not in PRESETS:
        raise ConfigError(f"preset: got {name!r}, choose from {', '.join(PRESETS)}")
    values = dict(PRESETS[name])
    if options.get("epochs") is not None or options.get("budget") is not None:
        values.pop("steps", None)
    return values | dict(options)


def _asks_for_clustering(options: Mapping[str, Any]) -> bool:
    objective = options.get("objective")
    return objective == "clustering" or (objective is None and any(name in options for name in CLUSTERING))
