"""Images as a notebook has them, paths, PIL images, arrays or tensors, as the transformed images that a model takes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from upstep_fast.data.curation.intensity import measure_intensity
from upstep_fast.data.decode.in_memory import pixels_of
from upstep_fast.data.loading.eval_transform import EvalTransform
from upstep_fast.data.loading.ordered_map import ordered_map
from upstep_fast.data.loading.skipped_images import read_image
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import BadImage, DataError

IMAGE_KEYS = ("pixel_values", "image", "images")  # of a DataLoader's batches, in this order

R = TypeVar("R")
Job = tuple[str, Callable[[], Tensor]]  # an image's name, and a function that returns the transformed image


def transformed_images(images: Any, transform: EvalTransform, num_workers: int, ahead: int) -> Generator[Tensor]:
    """Yield each image transformed, fp32 [C, *size], in order; close() ends the threads.

    images: a path of `--data`, or an iterable of images: paths, PIL images, arrays, transformed tensors. ahead: most
    images in flight. Raises DataError, also for the first image that cannot be used.
    """
    jobs = _of_source(images, transform) if isinstance(images, (str, Path)) else _of_items(images, transform)
    return ordered_map(lambda job: _run(*job), jobs, num_workers, ahead)


def names_of(images: Any, count: int) -> list[str]:
    """Return the names of `count` images: paths as they are, "image 0", ... for what has none."""
    items = images if isinstance(images, (list, tuple)) else [None] * count
    return [str(item) if isinstance(item, (str, Path)) else f"image {i}" for i, item in enumerate(items)]


def images_of(batch: Any) -> Tensor:
    """Return the images of a DataLoader's batch: itself, the first of a tuple, or an entry of a dictionary."""
    if isinstance(batch, Mapping):
        if (name := next((name for name in IMAGE_KEYS if name in batch), None)) is None:
            raise DataError(f"images: a batch has the keys {', '.join(map(str, batch))}; name one {IMAGE_KEYS[0]}")
        return batch[name]
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def _run(name: str, function: Callable[[], R]) -> R:
    try:
        return function()
    except BadImage as error:
        raise DataError(f"images: {name}: {error.reason}; repair it or leave it out") from error


def _of_source(path: str | Path, transform: EvalTransform) -> Iterator[Job]:
    source = measure_intensity(open_source(path, reading=transform.reading), channels=len(transform.mean))

    def load(index: int) -> Tensor:
        return transform.of_pixels(read_image(source, index, channels=len(transform.mean)))

    for index in range(len(source)):
        yield source.name(index), partial(load, index)


def _of_items(images: Any, transform: EvalTransform) -> Iterator[Job]:
    if (
        not isinstance(images, Iterable)
        or isinstance(images, Mapping)
        or (isinstance(images, np.ndarray) and images.ndim in (0, 3))
    ):
        got = f"an array of shape {images.shape}" if isinstance(images, np.ndarray) else f"a {type(images).__name__}"
        raise DataError(f"images: got {got}; give a folder, a list of images, or an array [N, H, W, C]")
    for index, image in enumerate(images):
        if isinstance(image, (str, Path)):
            yield str(image), partial(transform, image)
        elif isinstance(image, Tensor):
            yield f"image {index}", partial(_checked, image, transform)
        else:
            # in this thread: PIL decodes an image in place, and a list may hold it twice
            pixels = _run(f"image {index}", partial(pixels_of, image, len(transform.mean), transform.reading))
            yield f"image {index}", partial(transform.of_pixels, pixels)


def _checked(image: Tensor, transform: EvalTransform) -> Tensor:
    expected = (len(transform.mean), *transform.size)
    if image.shape != expected or not image.is_floating_point():
        raise BadImage(
            f"a tensor {list(image.shape)} of {image.dtype}; tensors are results of m.transform, {list(expected)}, "
            "others are given as arrays [H, W, C]"
        )
    return image.float()
