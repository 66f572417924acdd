"""Configuration of explore."""

from __future__ import annotations

from dataclasses import dataclass

from upstep_fast.config.run_features import RunFeaturesConfig
from upstep_fast.errors import ConfigError


@dataclass(frozen=True)
class ExploreConfig(RunFeaturesConfig):
    """Look through the images of a run in a local web page: maps before and after, neighbors, search by an image."""

    columns: str | None = None
    """CSV with a column of paths; the others color the maps."""
    clusters: int = 10
    """Number of k-means clusters of the adapted features to color by."""
    port: int = 0
    """Port to listen at, on this machine only (from another one: ssh -L PORT:127.0.0.1:PORT); 0: any free one."""
    browser: bool = True
    """Open the page in a browser, where there is a display."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        super().__post_init__()
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port: got {self.port}, must be 0 to 65535")
        if not 2 <= self.clusters <= 256:
            raise ConfigError(f"clusters: got {self.clusters}, must be 2 to 256")
