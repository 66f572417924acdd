"""Three points on the line of gain against forgetting, by --preset; single flags override them.

Each is a row of METHODS section 6 (base_tiny, eight real domains, 400 ungated steps of 256 images, one seed): change of
20-NN in points, adapted / ensemble, and on the model's own domain, adapted / ensemble.

    gentle     relational distillation, weight .3      +3.7 / +2.1    -0.3 / -0.2
    balanced   plain, written at 3/4 strength          +5.0 / +4.2    -2.7 / +0.1
    strong     plain, three times the learning rate    +7.1 / +6.5    -12.4 / -0.9

None is gated: the rows are not, and no gate has beaten skipping at random yet. docs/quality.md has what was measured
since.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import ConfigError

_PLAIN = {"gate": "none", "cvr": "off"}

PRESETS: dict[str, dict[str, Any]] = {
    "gentle": _PLAIN | {"lr": 1e-3, "distil": "relational", "distil_weight": 0.3},
    "balanced": _PLAIN | {"lr": 1e-3, "strength": 0.75},
    "strong": _PLAIN | {"lr": 3e-3},
}


def with_preset(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` over the values of the preset they name, if they name one. Raises ConfigError for an unknown name."""
    name = options.get("preset")
    if name is None:
        return dict(options)
    if name not in PRESETS:
        raise ConfigError(f"preset: got {name!r}, choose from {', '.join(PRESETS)}")
    return PRESETS[name] | dict(options)
