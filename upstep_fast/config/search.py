"""Configuration of search."""

from __future__ import annotations

from dataclasses import dataclass, field

from upstep_fast.config.base import at_least
from upstep_fast.config.run_features import RunFeaturesConfig
from upstep_fast.errors import ConfigError


@dataclass(frozen=True)
class SearchConfig(RunFeaturesConfig):
    """Find the images of a run that are most similar to an image, by its features."""

    query: tuple[str, ...] = field(kw_only=True)
    """Image files to search for, or names of images that are searched."""
    k: int = 20
    """Number of similar images to return for each query."""
    distinct: bool = False
    """Leave out images that equal the query (similarity 0.9999 or more), itself included."""
    exact: bool = False
    """Compare the query with every image, also where there are 100,000 or more."""
    csv: bool = False
    """Print query, rank, similarity and path as CSV."""
    json: str | None = None
    """File for the results."""
    out: str | None = None
    """File for a page with the images found: .html."""
    overwrite: bool = False
    """Replace --out if it exists."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        super().__post_init__()
        at_least(self, "k", 1)
        if not self.query:
            raise ConfigError("query: name at least one image")
        if self.out is not None and not self.out.endswith((".html", ".htm")):
            raise ConfigError(f"out: got {self.out}, must end in .html")
