"""One adaptation of the quality study: its options and its identity."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One adaptation and how it is measured."""

    name: str
    options: dict[str, Any]  # adapt's, without model, data, out and seed
    model: str
    data: str
    source: str | None
    seed: int
    k: int
    strengths: tuple[float, ...]
    probes: tuple[float, ...]

    @property
    def key(self) -> str:
        """Hash of configuration x data x seed; a name may change without a new run."""
        identity = [self.options, self.model.rpartition("/")[2], fingerprint(self.data), self.seed]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def label(data: str) -> str:
    """Return the short name of a data set."""
    return Path(data).name.removesuffix(".tar")


@functools.cache
def fingerprint(data: str) -> str:
    """Return the fingerprint of the images in `data`; independent of the folder they lie in."""
    from upstep_fast.data.sources.source import open_source

    return open_source(data, split="train").fingerprint()
