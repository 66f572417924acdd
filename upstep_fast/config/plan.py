"""The configuration of `upstep-fast plan`: a run's own, so that a run's config.toml can be planned, and a few more."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.files import of_method
from upstep_fast.config.flat import defaults, flat, from_flat, paths
from upstep_fast.config.training import AdaptDataConfig, AdaptOutputConfig
from upstep_fast.errors import ConfigError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class PlanConfig(AdaptConfig):
    """Estimate a run's memory, part by part, and the time of a step before the run; no weights are downloaded."""

    data: AdaptDataConfig = AdaptDataConfig(paths=())
    output: AdaptOutputConfig = field(default=AdaptOutputConfig(out=""), kw_only=True)
    world_size: int = 1
    """Number of devices that share each batch."""
    fit: str | None = None
    """Memory of a device with its unit, such as 24GB: choose memory level, batch per device and accumulation to fit."""
    calibrate: bool = False
    """Run real steps on this machine's device, with random weights, and show their memory and time beside the plan."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        super().__post_init__()
        if self.optimization.budget is not None:
            raise ConfigError("budget: only adapt measures what fits; leave it out")
        batch = self.optimization.batch_size
        if self.world_size < 1 or batch % self.world_size:
            raise ConfigError(f"world_size: got {self.world_size}, must divide the batch of {batch}")
        if self.fit is not None and to_bytes(self.fit) < 10**6:
            raise ConfigError(f"fit: got {self.fit!r}, needs a unit: {self.fit.strip()}GB")

    def to_adapt(self) -> AdaptConfig:
        """Return the planned run, one device's share of its batch; defaults are the method's own."""
        own, initial = flat(self), defaults(AdaptConfig)
        # without a default: model, data, out
        given = {k: v for k, v in own.items() if k in paths(AdaptConfig) and (k not in initial or v != initial[k])}
        given["batch_size"] = max(2, self.optimization.batch_size // self.world_size)
        config: AdaptConfig = from_flat(of_method(AdaptConfig, self.method), **given)
        return config


def to_bytes(text: str) -> int:
    """Return bytes: "24GB" is 24 times 10^9, "24GiB" 24 times 2^30, a bare number bytes. Raises ConfigError."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?I?)B?\s*", text.upper())
    if not match or match[2] not in _UNITS:
        raise ConfigError(f"fit: got {text!r}, must be a size of memory such as 24GB or 800MiB")
    return int(float(match[1]) * _UNITS[match[2]])
