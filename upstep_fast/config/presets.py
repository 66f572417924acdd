"""Points on the line of gain against forgetting, by --preset; single flags override them.

Change of 20-NN in points, adapted / ensemble, and on the model's own domain, adapted / ensemble; "w." with whitened
features beside the others (whitening.py):

    gentle     half the steps, written at half strength     +2.8 / +2.6    +0.4 / +0.7
               w.                                           +9.5 / +8.4    -0.1 / +0.3
    balanced   plain, written at 3/4 strength               +5.0 / +4.2    -2.7 / +0.1
    strong     plain, three times the learning rate         +7.1 / +6.5    -12.4 / -0.9
    fast       VICReg, last three blocks, 80 steps of 64    +5.3 / +3.6    -1.3 / +1.2
               w.                                           +9.0 / +7.5

gentle: five sets, the held-out third, 300 steps of 128 images, one seed (the test part too is in
bench/results/quality_five_sets.md; without training w. has +6.7, +0.2).
balanced, strong: METHODS section 6, eight sets, 400 ungated steps of 256 images, one seed; not measured w. They are not
gated, since the rows are not, and no gate has beaten skipping at random yet.
fast: two sets (hand signs, cartoons), three seeds, in 73 s of one thread each (bench/results/preset_fast.json).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upstep_fast.errors import ConfigError

_PLAIN = {"gate": "none", "cvr": "off"}

PRESETS: dict[str, dict[str, Any]] = {
    "gentle": {"lr": 3e-3, "cvr": "off", "crop_min": 0.5, "strength": 0.5},
    "balanced": _PLAIN | {"lr": 1e-3, "strength": 0.75},
    "strong": _PLAIN | {"lr": 3e-3},
    "fast": _PLAIN
    | {"objective": "vicreg", "lora_blocks": 3, "steps": 80, "batch_size": 64, "lr": 6e-3, "crop_min": 0.5},
}


def with_preset(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` over the values of the preset they name, if they name one. Raises ConfigError for an unknown name."""
    name = options.get("preset")
    if name is None:
        return dict(options)
    if name not in PRESETS:
        raise ConfigError(f"preset: got {name!r}, choose from {', '.join(PRESETS)}")
    values = dict(PRESETS[name])
    if options.get("epochs") is not None or options.get("budget") is not None:
        values.pop("steps", None)
    return values | dict(options)
