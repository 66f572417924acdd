"""Configuration of eval and embed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from upstep_fast.config.base import ModelConfig, RuntimeConfig, at_least, below
from upstep_fast.errors import ConfigError

MEASURES = ("knn", "linear", "retrieval", "few-shot", "clusters", "per-class")


@dataclass(frozen=True)
class EvalConfig(ModelConfig):
    """Measure a model, or a model with an adapter, on labeled images: k-NN, linear probe and more, in percent."""

    adapter: str | None = None
    """Folder of a run of adapt, or of an adapter; names --model and its options. Default: the base model only."""
    any_base: bool = False
    """Use the adapter on another base model than the one that it was trained on."""
    source: str | None = None
    """Labeled images of the model's original domain, to measure forgetting."""
    test_fraction: float = 0.2
    """Fraction of each class held out for testing, by --seed, of data without a test part; 0: such data is refused."""
    k: int = 20
    """Neighbors of the k-NN classifier."""
    measures: tuple[str, ...] = ("knn", "linear")
    """Measures, joined by commas: knn, linear, retrieval, few-shot, clusters, per-class; all: every one."""
    masks: str | None = None
    """Masks of class numbers, gray or palette PNGs named and placed as the images: measures segmentation by the nearest
    patch tokens instead, for images without classes."""
    json: str | None = None
    """File for the results."""
    batch_size: int = 256
    """Images per forward pass."""
    runtime: RuntimeConfig = RuntimeConfig()

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        at_least(self, "k", 1)
        object.__setattr__(self, "measures", checked_measures(self.measures))
        below(self, "test_fraction", 1)
        if self.masks is not None and self.source is not None:
            raise ConfigError("source: forgetting is not measured with --masks; leave out one of them")
        at_least(self, "batch_size", 1)


def checked_measures(given: Iterable[str]) -> tuple[str, ...]:
    """Return the measures in the order of MEASURES; a,b,c is one value to the command line. Raises ConfigError.

    The table per class is one of k-NN accuracy, so it brings k-NN along.
    """
    names = {name for text in given for name in text.split(",") if name}
    if unknown := sorted(names - {*MEASURES, "all"}):
        raise ConfigError(f"measures: got {unknown[0]!r}, choose from {', '.join(MEASURES)} or all")
    if not names:
        raise ConfigError(f"measures: none given, choose from {', '.join(MEASURES)} or all")
    names |= {"knn"} if "per-class" in names else set()
    return tuple(name for name in MEASURES if name in names or "all" in names)


@dataclass(frozen=True)
class EmbedConfig(ModelConfig):
    """Write the features of images, with their paths, to a file."""

    out: str = field(kw_only=True)
    """File to write: .npy (paths beside it in .txt), .safetensors or .parquet; or a folder, FOLDER/, of Parquet shards:
    constant memory, resumed and extended by repeating the command; of --tokens .zarr or .safetensors."""
    adapter: str | None = None
    """Folder of a run of adapt, or of an adapter; names --model and its options."""
    any_base: bool = False
    """Use the adapter on another base model than the one that it was trained on."""
    ensemble: bool = False
    """Concatenate the base model's and the adapted features, each of unit length."""
    form: Literal["auto", "plain"] = "auto"
    """auto: append whitened features if the run's folder holds their whitening; plain: the model's features alone."""
    fit_whitening: str | None = None
    """Fit whitening on these images, save it here, and append whitened features."""
    whitening: str | None = None
    """Append features whitened by this file of --fit-whitening, for images to compare with the fitted ones."""
    with_base: bool = False
    """Write the base model's plain features too, as the column `base`, in one pass over the images."""
    shard_size: int | None = None
    """Images in each shard of a folder. Default: as many as make 32 MB."""
    moved: tuple[str, ...] = ()
    """OLD=NEW: a folder of images that a folder of features names, as it was and as it is now."""
    tokens: bool = False
    """Write the patch tokens on their grid, [N, H, W, D], each of unit length, instead of one vector an image."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Number type of --tokens in the file."""
    batch_size: int = 256
    """Images per forward pass."""
    overwrite: bool = False
    """Replace --out if it exists."""
    runtime: RuntimeConfig = RuntimeConfig()

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        at_least(self, "batch_size", 1)
        at_least(self, "shard_size", 1)
        if self.ensemble and self.adapter is None:
            raise ConfigError("ensemble: needs --adapter; without one there is nothing to join the base features with")
        if self.fit_whitening is not None and self.whitening is not None:
            raise ConfigError("whitening and fit_whitening: give one of them, not both")
        if self.form == "plain" and (self.fit_whitening or self.whitening) is not None:
            raise ConfigError("form: plain features have no whitening; leave out --form, or the whitening")
        of_images = [name for name in ("ensemble", "with_base", "shard_size", "moved") if getattr(self, name)]
        if self.tokens and of_images:
            raise ConfigError(f"{of_images[0]}: is of features of whole images, not of --tokens; leave it out")
        if self.dtype != "fp32" and not self.tokens:
            raise ConfigError("dtype: is of --tokens; features of whole images are written in fp32")
