"""Configuration of eval and embed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from upstep_fast.config.base import ModelConfig, _at_least, _fraction
from upstep_fast.errors import ConfigError


@dataclass(frozen=True)
class EvalConfig(ModelConfig):
    """Measure a model, or a model with an adapter, on labelled images: k-NN and linear probe, in percent."""

    adapter: str | None = None
    """Folder of an adapter (out/adapter); without it only the base model is measured."""
    source: str | None = None
    """Labelled images of the domain the model came from, to measure forgetting."""
    k: int = 20
    """Neighbours of the k-NN classifier."""
    json: str | None = None
    """File for the figures."""
    batch_size: int = 256
    """Images a forward pass."""

    def __post_init__(self) -> None:
        """Check every field; raises ConfigError."""
        super().__post_init__()
        _at_least(self, "k", 1)
        _at_least(self, "batch_size", 1)
        _fraction(self, "max_bad_fraction")


@dataclass(frozen=True)
class EmbedConfig(ModelConfig):
    """Write the features of images, with their paths, to a file."""

    out: str = dataclasses.field(kw_only=True)
    """File to write: .npy (paths beside it in .txt), .safetensors or .parquet."""
    adapter: str | None = None
    """Folder of an adapter (out/adapter)."""
    ensemble: bool = False
    """Concatenate the base model's and the adapted features, each of unit length."""
    fit_whitening: str | None = None
    """Put whitened features beside the others, which tells images of a new domain better apart; fitted to these images
    and written to this file, for --whitening."""
    whitening: str | None = None
    """The same with the whitening in this file, as --fit-whitening wrote it: for images to be compared with those."""
    batch_size: int = 256
    """Images a forward pass."""
    overwrite: bool = False
    """Replace --out if it exists."""

    def __post_init__(self) -> None:
        """Check every field; raises ConfigError."""
        super().__post_init__()
        _at_least(self, "batch_size", 1)
        _fraction(self, "max_bad_fraction")
        if self.ensemble and self.adapter is None:
            raise ConfigError("ensemble: needs --adapter; without one there is nothing to join the base features with")
        if self.fit_whitening is not None and self.whitening is not None:
            raise ConfigError("whitening and fit_whitening: give one of them, not both")
