"""Configuration shared by explore, search and curate: the run, its images and their features."""

from __future__ import annotations

from dataclasses import dataclass

from upstep_fast.config.base import RuntimeConfig, at_least, fraction


@dataclass(frozen=True)
class RunFeaturesConfig:
    """A run and the features of images by its model."""

    run: str
    """Folder of a run (--out of adapt)."""
    data: tuple[str, ...] = ()
    """Images: folders, .tar files, text lists, hf:NAME, or addresses (s3://...). Default: the --data of the
    run, test images too."""
    features: str | None = None
    """Folder or file of features that embed wrote. Default: RUN/features, embedded first as far as they are missing."""
    moved: tuple[str, ...] = ()
    """OLD=NEW: a folder of images that the features name, as it was and as it is now."""
    max_bad_fraction: float = 0.01
    """Images that cannot be read are left out; above this fraction the command stops (exit 3)."""
    batch_size: int = 256
    """Images per forward pass."""
    runtime: RuntimeConfig = RuntimeConfig()

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        at_least(self, "batch_size", 1)
        fraction(self, "max_bad_fraction")
