"""What the report shows of the images themselves: looked at once, at the end of a run, and kept in OUT/pictures.json.

At most 512 images, spread evenly over the data, pass through the base and the adapted model. Kept of them: thumbnails,
the first two principal components of each model's features (projection.py), the nearest neighbours of a few
(neighbours.py); and thumbnails of what skipped.csv names, where it can be read. So the page can be made again without
the model or the images.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.evaluate import EvalConfig
from upstep_fast.data.loading.loader import load_images
from upstep_fast.data.loading.skipped import read_image
from upstep_fast.data.sources.source import Source, open_source
from upstep_fast.errors import BadImage
from upstep_fast.evaluation.features import load_models
from upstep_fast.model import backbone as backbones
from upstep_fast.model import pooling
from upstep_fast.report.neighbors import nearest
from upstep_fast.report.pca_plot import principal
from upstep_fast.runtime.atomic_file import write_atomic
from upstep_fast.runtime.device import Compute

log = logging.getLogger("upstep_fast")

NAME = "pictures.json"
MAX_IMAGES = 512
CPU_FLOP = 4e12  # about what a CPU does in half a minute; fewer images of a model for which 512 take more
SIDE = 64  # pixels of a thumbnail
MAX_ODD = 24  # thumbnails of what skipped.csv names
QUERIES, NEIGHBOURS = 8, 5
_THUMB = re.compile(r"[A-Za-z0-9+/]{16,12000}={0,2}")


@dataclass(frozen=True)
class Pictures:
    """N images; `points` and `neighbours` by "before" (the base model) and "after" (with the adapter)."""

    names: list[str]
    thumbs: list[str]  # WebP in base64
    points: dict[str, list[list[float]]]  # N of (x, y)
    queries: list[int]
    neighbours: dict[str, list[list[int]]]  # of each query, the nearest first
    odd: dict[str, str]  # name in skipped.csv -> thumbnail


def collect(
    config: AdaptConfig, compute: Compute, source: Source, out: Path, *, backbone: backbones.Backbone | None = None
) -> None:
    """Write out/pictures.json; errors are logged as warnings, since the run is done.

    backbone: the base model, if it is loaded already; it stays as it is.
    """
    try:
        found = look(config, compute, source, out, backbone=backbone)
        write_atomic(out / NAME, json.dumps(asdict(found)).encode())
    except Exception as error:
        log.warning("report: no pictures (%s: %s)", type(error).__name__, str(error).split("\n")[0])


@torch.no_grad()
def look(
    config: AdaptConfig, compute: Compute, source: Source, out: Path, *, backbone: backbones.Backbone | None = None
) -> Pictures:
    """Run both models on some of the images. Raises UpstepError."""
    same = {name: getattr(config, name) for name in ("model", "data", "arch", "img_size", "in_chans", "min_matched")}
    models = load_models(EvalConfig(**same, adapter=str(out / "adapter")), backbone=backbone)
    base = models["base"]
    chosen = spread(len(source), _how_many(base, compute))
    rows: dict[str, list[Tensor]] = {"before": [], "after": []}
    indices: list[int] = []
    thumbs: list[str] = []
    batches = load_images(
        source,
        chosen,
        **base.eval_transform_args,
        batch_size=32,
        num_workers=config.num_workers,
        max_bad_fraction=1.0,
    )
    for model in models.values():
        model.vit.to(compute.device)
    for at, images in batches:
        x = base.normalized(images.to(compute.device))
        for when, model in zip(rows, (base, models["adapted"]), strict=True):
            with compute.autocast():
                f = pooling.features(model.vit, x)
            rows[when].append(F.normalize(f.float(), dim=-1).cpu())
        indices += at.tolist()
        thumbs += [thumbnail((255 * image).round().byte()) for image in images]
    features = {when: torch.cat(parts) for when, parts in rows.items()}
    queries = spread(len(indices), QUERIES)
    return Pictures(
        names=[source.name(i) for i in indices],
        thumbs=thumbs,
        points={when: principal(x).tolist() for when, x in features.items()},
        queries=queries,
        neighbours={when: nearest(x, queries, NEIGHBOURS) for when, x in features.items()},
        odd=_odd(config, out / "skipped.csv", len(base.mean)),
    )


def spread(count: int, most: int) -> list[int]:
    """At most `most` of 0 .. count - 1, evenly spread."""
    few = min(count, most)
    return [i * count // few for i in range(few)]


def thumbnail(image: Tensor) -> str:
    """uint8 [C, H, W] -> a small WebP in base64; of other channels than 1 or 3 the first."""
    pixels = image if image.shape[0] == 3 else image[:1].expand(3, -1, -1)
    picture = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=60)
    return base64.b64encode(file.getvalue()).decode()


def read(folder: Path) -> Pictures | None:
    """What `collect` left in `folder`, or None; nothing in it is trusted."""
    try:
        return _checked(json.loads((folder / NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None


def _checked(found: dict[str, Any]) -> Pictures:
    names, thumbs = [str(name) for name in found["names"]], [_is_thumb(thumb) for thumb in found["thumbs"]]
    count = len(names)
    if not 0 < count <= MAX_IMAGES or len(thumbs) != count:
        raise ValueError

    def index(value: Any) -> int:
        if not isinstance(value, int) or not 0 <= value < count:
            raise ValueError
        return value

    points = {when: [[float(v) for v in point] for point in found["points"][when]] for when in ("before", "after")}
    for rows in points.values():
        if len(rows) != count or not all(len(p) == 2 and all(map(math.isfinite, p)) for p in rows):
            raise ValueError
    queries = [index(i) for i in found["queries"][:QUERIES]]
    near = {
        when: [[index(i) for i in row[:NEIGHBOURS]] for row in found["neighbours"][when][:QUERIES]] for when in points
    }
    if any(len(rows) != len(queries) for rows in near.values()):
        raise ValueError
    odd = {str(name): _is_thumb(thumb) for name, thumb in list(found["odd"].items())[:MAX_ODD]}
    return Pictures(names, thumbs, points, queries, near, odd)


def _is_thumb(value: Any) -> str:
    if not isinstance(value, str) or not _THUMB.fullmatch(value):
        raise ValueError
    return value


def _how_many(base: backbones.Backbone, compute: Compute) -> int:
    if compute.device.type != "cpu":
        return MAX_IMAGES
    height, width = base.vit.patch_embed.patch_size
    tokens = base.img_size[0] * base.img_size[1] / (height * width)
    of_one = 2 * 2 * sum(p.numel() for p in base.vit.parameters()) * tokens  # two models, two FLOPs a weight and token
    return int(min(MAX_IMAGES, max(64, CPU_FLOP / of_one)))


def _odd(config: AdaptConfig, skipped: Path, channels: int) -> dict[str, str]:
    """Thumbnails of the first images in skipped.csv that can be read."""
    try:
        rows: Sequence[Sequence[str]] = list(csv.reader(io.StringIO(skipped.read_text(encoding="utf-8"))))[1:]
    except (OSError, ValueError, csv.Error):
        return {}
    wanted = dict.fromkeys(row[0] for row in rows[: 8 * MAX_ODD] if row)
    found: dict[str, str] = {}
    if not wanted:
        return found
    source = open_source(config.data, split="train")  # with what triage left out
    for index in range(len(source)):
        if len(found) == MAX_ODD or not wanted:
            break
        if (name := source.name(index)) in wanted:
            del wanted[name]
            with contextlib.suppress(BadImage):
                found[name] = thumbnail(read_image(source, index, channels=channels))
    return found
