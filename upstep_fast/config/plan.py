"""The configuration of `upstep-fast plan`: a run's own, so that a run's config.toml can be planned, and a few more."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.files import of_method
from upstep_fast.errors import ConfigError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class PlanConfig(AdaptConfig):
    """Say before a run how much memory it takes, part by part, and how long a step takes; no weights are downloaded."""

    data: tuple[str, ...] = ()
    """Images, if the number of steps is to follow from how many there are."""
    out: str = dataclasses.field(default="", kw_only=True)
    """Not used; here so that a run's config.toml can be planned."""
    world_size: int = 1
    """Devices that share each batch."""
    fit: str | None = None
    """Memory of a device, such as 24GB: picks the memory level, the batch a device and the accumulation for it."""
    calibrate: bool = False
    """Take real steps on the device that is here, with random weights, and put what they took beside the plan."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def __post_init__(self) -> None:
        """Check every field; raises ConfigError."""
        super().__post_init__()
        if self.world_size < 1 or self.batch_size % self.world_size:
            raise ConfigError(f"world_size: got {self.world_size}, must divide the batch of {self.batch_size}")
        if self.fit is not None:
            to_bytes(self.fit)

    def to_adapt(self) -> AdaptConfig:
        """The run that is planned, one device's share of its batch; defaults are the method's own."""
        kind = of_method(AdaptConfig, self.method)
        given: dict[str, Any] = {}
        for field in dataclasses.fields(AdaptConfig):
            value = getattr(self, field.name)
            if field.name in ("model", "data", "out") or value != field.default:
                given[field.name] = value
        given["batch_size"] = max(2, self.batch_size // self.world_size)
        return kind(**given)


def to_bytes(text: str) -> int:
    """ "24GB" is 24 times 10^9 bytes, "24GiB" 24 times 2^30, a bare number bytes. Raises ConfigError."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?I?)B?\s*", text.upper())
    if not match or match[2] not in _UNITS:
        raise ConfigError(f"fit: got {text!r}, must be a size of memory such as 24GB or 800MiB")
    return int(float(match[1]) * _UNITS[match[2]])
