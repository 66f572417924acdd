"""The report's image panels: PCA plots, nearest neighbors and thumbnails, computed once and kept in OUT/pictures.json.

At the end of a run at most 512 images, spread evenly over the data, pass through the base and the adapted model.
pictures.json holds their thumbnails, the first two principal components of each model's features (pca_plot.py), the
nearest neighbors of a few images (neighbors.py), the patch tokens of a few as colors (dense/picture.py), and thumbnails
of the readable images in skipped.csv. With them the page can be rendered again without the model or the images.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast import input_files
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.evaluate import EvalConfig
from upstep_fast.data.decode.thumbnail import encode_thumbnail
from upstep_fast.data.loading.loader import load_images
from upstep_fast.data.loading.skipped_images import csv_cell, read_image
from upstep_fast.data.sources.source import Source, open_configured
from upstep_fast.errors import BadImage, UpstepError
from upstep_fast.evaluation.dense.picture import token_colors, upsampled
from upstep_fast.evaluation.dense.tokens import on_grid
from upstep_fast.evaluation.features import load_models
from upstep_fast.model import backbone as backbones
from upstep_fast.model import pooling
from upstep_fast.report.neighbors import nearest
from upstep_fast.report.pca_plot import principal
from upstep_fast.runtime.atomic_file import write_atomic
from upstep_fast.runtime.device import Compute
from upstep_fast.runtime.progress import track
from upstep_fast.runtime.run_folder import writing

log = logging.getLogger("upstep_fast")

NAME = "pictures.json"
MAX_IMAGES, MIN_IMAGES = 512, 64
CPU_FLOP = 4e12  # limit on a CPU, about half a minute: a large model sees fewer than MAX_IMAGES
SIDE = 64  # pixels of a thumbnail
QUALITY = 60  # of the WebP
MAX_ODD = 24  # thumbnails of images in skipped.csv
QUERIES, NEIGHBORS = 8, 5
COLORED = 8  # images whose patch tokens are shown
BATCH_SIZE = 32
_THUMB = re.compile(r"[A-Za-z0-9+/]{16,12000}={0,2}")


@dataclass(frozen=True)
class ImagePanels:
    """Panels of N images; `points` and `neighbours` by "before" (the base model) and "after" (with the adapter).

    The fields are the keys of pictures.json.
    """

    names: list[str]
    thumbs: list[str]  # WebP in base64
    points: dict[str, list[list[float]]]  # N of (x, y)
    queries: list[int]
    neighbours: dict[str, list[list[int]]]  # of each query, nearest first
    odd: dict[str, str]  # name in skipped.csv -> thumbnail
    colored: list[int] = field(default_factory=list)  # images whose tokens are shown; runs of earlier versions: none
    tokens: dict[str, list[str]] = field(default_factory=dict)  # of each, as colors, by "before" and "after"


def collect(
    config: AdaptConfig, compute: Compute, source: Source, out: Path, *, backbone: backbones.Backbone | None = None
) -> None:
    """Write out/pictures.json. Errors are logged as warnings, because the run itself is complete.

    backbone: the base model, if it is loaded already; it is not changed.
    """
    try:
        panels = compute_panels(config, compute, source, out, backbone=backbone)
        with writing(out):
            write_atomic(out / NAME, json.dumps(asdict(panels)).encode())
    except Exception as error:
        log.warning("report: no image panels (%s: %s)", type(error).__name__, str(error).split("\n")[0])


def compute_panels(
    config: AdaptConfig, compute: Compute, source: Source, out: Path, *, backbone: backbones.Backbone | None = None
) -> ImagePanels:
    """Run the base model and the adapted model on some of the images. Raises UpstepError."""
    described = replace(config.model, mean=None, std=None)
    models = load_models(EvalConfig(described, config.data, adapter=str(out / "adapter")), backbone=backbone)
    base = models["base"]
    chosen, both = spread(len(source), _num_images(base, compute)), (base, models["adapted"])
    indices, thumbs, (before, after), patches = _extract(source, chosen, both, config, compute)
    features, queries = {"before": before, "after": after}, spread(len(indices), QUERIES)
    return ImagePanels(
        names=[source.name(i) for i in indices],
        thumbs=thumbs,
        points={when: principal(x).tolist() for when, x in features.items()},
        queries=queries,
        neighbours={when: nearest(x, queries, NEIGHBORS) for when, x in features.items()},
        odd=_odd_thumbnails(config, out / "skipped.csv", len(base.mean)),
        colored=[position for position, _ in patches],
        tokens=_token_pictures([tokens for _, tokens in patches], base),
    )


@torch.no_grad()
def _extract(
    source: Source, indices: list[int], models: Sequence[backbones.Backbone], config: AdaptConfig, compute: Compute
) -> tuple[list[int], list[str], list[Tensor], list[tuple[int, list[Tensor]]]]:
    """Return the indices of the readable images, their thumbnails, and each model's unit features [N, D].

    And of a few images: their position among these, and their unit patch tokens [h w, D] by each model.
    """
    base = models[0]
    read: list[int] = []
    thumbs: list[str] = []
    features: list[list[Tensor]] = [[] for _ in models]
    colored = {indices[i] for i in spread(len(indices), COLORED)}
    patches: list[tuple[int, list[Tensor]]] = []
    for model in models:
        model.vit.to(compute.device)
    arguments = base.eval_transform_args | {"batch_size": BATCH_SIZE, "num_workers": config.data.num_workers}
    with track("report: pictures", len(indices)) as task:
        for batch, images in load_images(source, indices, **arguments, max_bad_fraction=1.0):
            x = base.normalized(images, compute.device)
            few = [i for i, index in enumerate(batch.tolist()) if index in colored]
            of_few: list[list[Tensor]] = [[] for _ in few]
            for rows, model in zip(features, models, strict=True):
                with compute.autocast():
                    tokens = model.vit.forward_features(x)
                    f = pooling.pooled(model.vit, tokens)
                rows.append(F.normalize(f.float(), dim=-1).cpu())
                unit = F.normalize(pooling.patch_tokens(model.vit, tokens[few]).float(), dim=-1).cpu()
                for of_image, image_tokens in zip(of_few, unit, strict=True):
                    of_image.append(image_tokens)
            patches += [(len(read) + i, of_image) for i, of_image in zip(few, of_few, strict=True)]
            read += batch.tolist()
            thumbs += [thumbnail((255 * image).round().byte()) for image in images]
            task.advance(len(batch))
    return read, thumbs, [torch.cat(rows) for rows in features], patches


def _token_pictures(patches: Sequence[Sequence[Tensor]], base: backbones.Backbone) -> dict[str, list[str]]:
    """Return the tokens of images as colors, by "before" and "after". patches: [h w, D] of each image and model."""
    if not patches:
        return {}
    of_models = [on_grid(torch.stack(list(x)), base) for x in zip(*patches, strict=True)]
    pictures = [upsampled(colors, base.img_size) for colors in token_colors(of_models)]
    return {when: [thumbnail(picture) for picture in x] for when, x in zip(("before", "after"), pictures, strict=True)}


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` of the indices 0 .. count - 1, evenly spread."""
    num = min(count, most)
    return [i * count // num for i in range(num)]


def thumbnail(image: Tensor) -> str:
    """Return a small WebP in base64 of an image, uint8 [C, H, W]; of its first channel unless C is 3."""
    return base64.b64encode(encode_thumbnail(image, SIDE, QUALITY)).decode()


def read_panels(folder: Path) -> ImagePanels | None:
    """Return the panels that `collect` wrote to `folder`; None if the file is missing or fails a check."""
    try:
        return _checked(input_files.read_json(folder / NAME, "report"))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):  # ConfigError is a ValueError
        return None


def _checked(content: dict[str, Any]) -> ImagePanels:
    """Return the content of pictures.json as panels. Raises ValueError, KeyError or TypeError if it is not valid."""
    names, thumbs = [str(name) for name in content["names"]], [_checked_thumb(thumb) for thumb in content["thumbs"]]
    count = len(names)
    if not 0 < count <= MAX_IMAGES or len(thumbs) != count:
        raise ValueError
    queries = _checked_indices(content["queries"][:QUERIES], count)
    points, near = {}, {}
    for when in ("before", "after"):
        points[when] = [[float(v) for v in point] for point in content["points"][when]]
        near[when] = [_checked_indices(row[:NEIGHBORS], count) for row in content["neighbours"][when][:QUERIES]]
        if len(points[when]) != count or len(near[when]) != len(queries):
            raise ValueError
        if not all(len(point) == 2 and all(map(math.isfinite, point)) for point in points[when]):
            raise ValueError
    odd = {str(name): _checked_thumb(thumb) for name, thumb in list(content["odd"].items())[:MAX_ODD]}
    colored = _checked_indices(content.get("colored", [])[:COLORED], count)
    tokens = {when: [_checked_thumb(x) for x in row[:COLORED]] for when, row in content.get("tokens", {}).items()}
    if any(len(tokens.get(when, ())) != len(colored) for when in ("before", "after")) or len(tokens) > 2:
        raise ValueError
    return ImagePanels(names, thumbs, points, queries, near, odd, colored, tokens)


def _checked_indices(values: list[Any], count: int) -> list[int]:
    if not all(isinstance(value, int) and 0 <= value < count for value in values):
        raise ValueError
    return list(values)


def _checked_thumb(value: Any) -> str:
    if not isinstance(value, str) or not _THUMB.fullmatch(value):
        raise ValueError
    return value


def _num_images(base: backbones.Backbone, compute: Compute) -> int:
    if compute.device.type != "cpu":
        return MAX_IMAGES
    height, width = base.vit.patch_embed.patch_size
    tokens = base.img_size[0] * base.img_size[1] / (height * width)
    # two models, two FLOPs per weight and token
    flops_per_image = 2 * 2 * sum(p.numel() for p in base.vit.parameters()) * tokens
    return int(min(MAX_IMAGES, max(MIN_IMAGES, CPU_FLOP / flops_per_image)))


def _odd_thumbnails(config: AdaptConfig, skipped: Path, channels: int) -> dict[str, str]:
    """Return {name: thumbnail} of the first images in skipped.csv that can be read."""
    try:
        text = input_files.read_text(skipped, "report")
        rows: Sequence[Sequence[str]] = list(csv.reader(io.StringIO(text)))[1:]
    except (ValueError, csv.Error):
        return {}
    unread = {row[0] for row in rows[: 8 * MAX_ODD] if row}
    thumbs: dict[str, str] = {}
    if not unread:
        return thumbs
    source = open_configured(config.data, "train")  # includes the images that triage left out
    for index in range(len(source)):
        if len(thumbs) == MAX_ODD or not unread:
            break
        if (name := csv_cell(source.name(index))) in unread:
            unread.remove(name)
            with contextlib.suppress(BadImage, UpstepError):
                thumbs[name] = thumbnail(read_image(source, index, channels=channels))
    return thumbs
