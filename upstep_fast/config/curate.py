"""Configuration of curate."""

from __future__ import annotations

from dataclasses import dataclass

from upstep_fast.config.run_features import RunFeaturesConfig
from upstep_fast.errors import ConfigError

DROPS = ("exact", "near", "leak", "outlier", "mislabeled")


@dataclass(frozen=True)
class CurateConfig(RunFeaturesConfig):
    """Find copies, odd images, wrong classes and copies across train and test: a report, a CSV and a list to keep."""

    out: str = "curation"
    """Folder for curation.html and curation.csv."""
    against: tuple[str, ...] = ()
    """Images for testing: copies of them in --data are leaks. Default: the test part of --data, if it has one."""
    apply: str | None = None
    """List (.txt) to write of the images that are kept; --data reads it."""
    drop: tuple[str, ...] = ("exact", "near", "leak")
    """What --apply leaves out: exact, near, leak, outlier, mislabeled."""
    overwrite: bool = False
    """Replace earlier results in --out and the list."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        super().__post_init__()
        if unknown := next((kind for kind in self.drop if kind not in DROPS), None):
            raise ConfigError(f"drop: got {unknown!r}, must be some of {', '.join(DROPS)}")
        if self.apply is not None and not self.apply.endswith(".txt"):
            raise ConfigError(f"apply: got {self.apply}, must end in .txt: --data reads such a list")
