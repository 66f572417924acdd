"""Features in memory: a model with its adapter and whitening as one object, for notebooks.

>>> m = upstep_fast.load("adapted/")
>>> features = m.embed("photos/")  # numpy [N, D]
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from upstep_fast.config.base import reading_of
from upstep_fast.config.evaluate import EmbedConfig
from upstep_fast.config.reading import AS_STORED, Reading
from upstep_fast.data.loading.eval_transform import EvalTransform
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import ConfigError, DataError, RunFailedError
from upstep_fast.evaluation import whitening
from upstep_fast.evaluation.dense.tokens import on_grid
from upstep_fast.evaluation.feature_files.facts import facts_in_memory
from upstep_fast.evaluation.feature_files.table import FeatureTable
from upstep_fast.evaluation.features import feature_function, load_models
from upstep_fast.evaluation.image_inputs import images_of, names_of, transformed_images
from upstep_fast.evaluation.load_options import configured, whitening_of
from upstep_fast.evaluation.search.index import FeatureIndex, build_index
from upstep_fast.evaluation.search.storage import require_same
from upstep_fast.evaluation.whitening import Whitening
from upstep_fast.model import pooling
from upstep_fast.model.backbone import Backbone
from upstep_fast.model.names import shown
from upstep_fast.runtime import machine
from upstep_fast.runtime.device import Compute, resolve
from upstep_fast.runtime.progress import track


@dataclass(frozen=True, eq=False, repr=False)
class FeatureModel:
    """A frozen ViT that gives features: no classifier, unit length, no gradients. Made by `upstep_fast.load`.

    m(images): transformed images [B, C, H, W] -> features [B, D] on the device. m.embed: images of any kind -> numpy
    [N, D]. m.transform: one image -> tensor [C, H, W]. m.vit: the timm model with the adapter merged, for its tokens;
    it must not be changed. Objects can be pickled, weights included.
    """

    backbone: Backbone  # the adapter is merged
    device: str = "auto"  # device, precision and implementation as for `embed`
    precision: str = "auto"
    implementation: str = "auto"
    adapter: str | None = None
    whitening: Whitening | None = None
    reading: Reading = AS_STORED  # as in training
    _functions: dict[pooling.Pool, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    @property
    def vit(self) -> nn.Module:
        """The timm model. `m.vit.forward_features(images)` gives its tokens, [B, N, D]."""
        return self.backbone.vit

    @property
    def transform(self) -> EvalTransform:
        """The model's evaluation transform: a path, PIL image or array [H, W, C] -> tensor [C, H, W], for datasets."""
        base = self.backbone
        how = base.interpolation, base.crop_pct, base.crop_mode
        return EvalTransform(base.img_size, base.mean, base.std, *how, self.reading)

    @property
    def dim(self) -> int:
        """Width D of the features; a whitening makes it three times the model's width, or twice (whitening.py)."""
        return self.backbone.width * (1 if self.whitening is None else 1 + pooling.num_parts(self.vit))

    @property
    def compute(self) -> Compute:
        """The device and the precision."""
        return resolve(self.device, self.precision, self.implementation)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features [B, D] of transformed images [B, C, H, W], fp32, unit length, on the device.

        Raises DataError for other shapes and types, RunFailedError for features that are not finite.
        """
        parts = self._unit(images, pooling.pooled_only if self.whitening is None else pooling.pooled_and_patch_mean)
        if self.whitening is None:
            return parts[:, 0].contiguous()
        by = Whitening(self.whitening.mean.to(parts.device), self.whitening.matrix.to(parts.device))
        return whitening.append_whitened(parts, by)

    def embed(self, images: Any, batch_size: int = 256, num_workers: int | None = None) -> np.ndarray:
        """Return the features of images as numpy fp32 [N, D], a row for each image, in their order.

        images: a path as --data takes it (a folder, .tar, list or hf:NAME; `m.paths` gives the order); a sequence of
        paths, PIL images, arrays [H, W, C] or transformed tensors; an array [N, H, W, C] of uint8, or of floating-point
        values in 0..1; or a DataLoader of batches that `m.transform` made: tensors, tuples with them first, or
        dictionaries with pixel_values, image or images; labels beside them are ignored.
        num_workers: threads; None: one per core, at most 16. The features of paths equal those of `upstep-fast embed`.
        Raises DataError naming the first image that cannot be used; none is left out.
        """
        return self._map(self, images, batch_size, num_workers).numpy()

    def fit_whitening(self, images: Any, batch_size: int = 256, num_workers: int | None = None) -> FeatureModel:
        """Return this model with a whitening fitted to unlabeled images of the domain; images: as for `embed`."""
        return dataclasses.replace(self, whitening=whitening.fit(self._all_parts(images, batch_size, num_workers)))

    def fit_embed(
        self, images: Any, batch_size: int = 256, num_workers: int | None = None
    ) -> tuple[FeatureModel, np.ndarray]:
        """Return this model with a whitening fitted to the images, and their features by it, fp32 [N, D]."""
        parts = self._all_parts(images, batch_size, num_workers)
        fitted = whitening.fit(parts)
        features = [whitening.append_whitened(batch, fitted) for batch in parts.split(batch_size)]
        return dataclasses.replace(self, whitening=fitted), torch.cat(features).numpy()

    def index(
        self, images: Any, *, exact: bool = False, batch_size: int = 256, num_workers: int | None = None
    ) -> FeatureIndex:
        """Return an index of images to search in: `index.search_images("photo.jpg")`.

        images: as for `embed`, or a `FeatureTable` of this model, as `read_features` gives. From 100,000 images on the
        index is approximate if FAISS is installed and `exact` is not set; `index.recall` is measured. Raises DataError.
        """
        is_table = isinstance(images, FeatureTable)
        table = images if is_table else self._table(images, batch_size, num_workers)
        return self.attach(build_index(table, exact=exact))

    def attach(self, index: FeatureIndex) -> FeatureIndex:
        """Return an index that was made with this model, with this model for its images. Raises DataError."""
        if index.x.shape[1] != self.dim:
            raise DataError(f"index: its features have width {index.x.shape[1]}, this model gives {self.dim}")
        require_same(index.facts, self._facts)
        return dataclasses.replace(index, embed=self._table)

    def tokens(self, images: Any, batch_size: int = 32, num_workers: int | None = None) -> np.ndarray:
        """Return the patch tokens of images on their grid as numpy fp32 [N, H, W, D], unit vectors.

        Of `m.vit.forward_features`, without class and register tokens; a whitening is for whole images and is not
        applied. images, num_workers: as for `embed`; row 0 of the grid is the top of `m.transform`'s result. Raises as
        `embed`, and ConfigError for a model whose tokens are no grid.
        """
        rows = self._map(lambda batch: self._unit(batch, pooling.patch_tokens), images, batch_size, num_workers)
        return on_grid(rows, self.backbone).numpy()

    def paths(self, data: str | Path) -> list[str]:
        """Return the names of the images at a path, in the order of `embed`'s rows. Raises DataError."""
        source = open_source(data, reading=self.reading)
        return [source.name(index) for index in range(len(source))]

    def explore(self, images: Any, **options: Any) -> Any:
        """Return a local page to look through the images of a path: see `upstep_fast.explore`. Raises UpstepError."""
        import upstep_fast

        return upstep_fast.explore(self, images, **options)

    def __repr__(self) -> str:
        """Return the model's name, adapter, input, D and device."""
        height, width = self.backbone.img_size
        size = f"images [{len(self.backbone.mean)}, {height}, {width}]"
        adapter = f"adapter {self.adapter}" if self.adapter else "no adapter"
        whitened = "whitened, " if self.whitening else ""
        where = f"{self.compute.device} in {self.compute.precision}"
        return f"FeatureModel({shown(self.backbone.name)}, {adapter}, {size}, {whitened}D = {self.dim}, {where})"

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields with weights on the CPU and without the engine's functions, which are built again."""
        return vars(self) | {"backbone": self.backbone.copy(), "_functions": {}}

    @torch.no_grad()
    def _unit(self, images: Tensor, pool: pooling.Pool) -> Tensor:
        """Return the unit vectors [B, P, D] that `pool` makes of the tokens."""
        expected = (len(self.backbone.mean), *self.backbone.img_size)
        if not isinstance(images, Tensor) or not images.is_floating_point() or images.shape[1:] != expected:
            got = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            shape = ", ".join(map(str, expected))
            raise DataError(
                f"images: got {got}, the model takes floating-point [B, {shape}] as m.transform "
                "gives; m.embed takes paths, PIL images and arrays"
            )
        compute = self.compute
        if pool not in self._functions:
            self._functions[pool] = feature_function(self.backbone, self.implementation, compute, pool)
        with compute.autocast():
            parts = F.normalize(self._functions[pool](images.to(compute.device).float()).float(), dim=-1)
        bad = int(((parts.norm(dim=-1) - 1).abs() < 0.5).all(-1).logical_not().sum())  # also of NaN
        if bad:
            cure = (
                "use precision='fp32'" if compute.dtype is not None else "check the images, its weights and the adapter"
            )
            raise RunFailedError(f"model: features of {bad} of {len(parts)} images are not finite or all zero; {cure}")
        return parts

    @functools.cached_property
    def _facts(self) -> dict[str, Any]:
        return facts_in_memory(self.backbone, self.adapter, self.whitening is not None)

    def _table(self, images: Any, batch_size: int = 256, num_workers: int | None = None) -> FeatureTable:
        """Return the features of images, named as `names_of` does."""
        x = self.embed(images, batch_size, num_workers)
        names = self.paths(images) if isinstance(images, (str, Path)) else names_of(images, len(x))
        return FeatureTable(tuple(names), x, self._facts)

    def _all_parts(self, images: Any, batch_size: int, num_workers: int | None) -> Tensor:
        """Return the unit features [N, P, D] of images, on the CPU."""
        return self._map(
            lambda batch: self._unit(batch, pooling.pooled_and_patch_mean), images, batch_size, num_workers
        )

    def _map(
        self, function: Callable[[Tensor], Tensor], images: Any, batch_size: int, num_workers: int | None
    ) -> Tensor:
        """Return function(batch) of all batches as one tensor on the CPU, with progress. Raises DataError for none."""
        total = len(images) if isinstance(images, (list, tuple, np.ndarray, Tensor)) and len(images) else None
        rows = []
        with track("features", total) as task:
            for batch in self._batches(images, batch_size, num_workers):
                rows.append(function(batch).cpu())
                task.advance(len(batch))
        if not rows:
            raise DataError("images: there are none; give at least one")
        return torch.cat(rows)

    def _batches(self, images: Any, batch_size: int, num_workers: int | None) -> Iterator[Tensor]:
        """Yield transformed images [B, C, H, W]. Raises DataError, ConfigError."""
        for name, value, low in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value is not None and value < low:
                raise ConfigError(f"{name}: got {value}, must be at least {low}")
        if isinstance(images, DataLoader):
            yield from map(images_of, images)
            return
        workers = machine.num_workers(num_workers)
        with contextlib.closing(transformed_images(images, self.transform, workers, 2 * batch_size)) as each:
            while batch := list(itertools.islice(each, batch_size)):
                yield torch.stack(batch)


def load(
    source: str | Path,
    *,
    model: str | Path | None = None,
    whiten: bool | str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    implementation: str = "auto",
    **options: Any,
) -> FeatureModel:
    """Load a model that gives features: of a run, of an adapter, or a base model.

    source: the folder of a run of `adapt` or of an adapter, which names its model; or the name of a model, as `adapt`
    takes it. model: the name of an adapter's base model, where its own is at another place. whiten: append whitened
    features, which measured best: by the whitening in the run's folder if it holds one (None), must hold one (True);
    by a file of `embed --fit-whitening`; or not at all (False). A run whose adapter was refused gives the base model.
    options: arch, img_size, in_chans, mean, std, min_matched, any_base, intensity, bands, axes, slice, tiles, level and
    mpp, as for `embed`; None: as in training. device, precision, implementation: as for `embed`. Raises ConfigError.
    """
    options |= {"device": device, "precision": precision, "implementation": implementation}
    config, own = configured(source, model, whiten, **options)
    resolve(device, precision, implementation)  # before the weights are read
    models = load_models(config)
    return feature_model_of(config, models, whitening_of(config, own, models) if config.whitening or own else {})


def feature_model_of(
    config: EmbedConfig, models: Mapping[str, Backbone], fitted: Mapping[str, Whitening]
) -> FeatureModel:
    """Return the model of `models` that a configuration means, with its whitening."""
    name, how = "base" if config.adapter is None else "adapted", config.runtime
    given = how.device, how.precision, how.implementation
    return FeatureModel(models[name], *given, config.adapter, fitted.get(name), reading_of(config.data))
