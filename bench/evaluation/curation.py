"""Precision and recall of `curate` on planted copies, label errors and outliers.

    upstep-fast demo && python bench/evaluation/curation.py --data ../shared/data --out bench/results/curation_cpu2.json
    python bench/evaluation/curation.py --scale 100000        # seconds and memory of the search for neighbors alone

Sets: hand signs and cartoons, at most IMAGES of each, by the features of the included small model; hand signs also by
those of `upstep-fast demo`, which adapts it to them without labels.

    copies      COPIES images changed in each of six ways and added to their class; a found pair that is not planted
                counts as false, although a set may hold copies of its own. Beside it: the perceptual hash of `--triage`
                alone, and the nearest neighbor by features alone above a similarity that flags as many pairs
    classes     10 % of the images moved to another class at random
    outliers    OUTLIERS images of each other set, added: fewer than the neighbors that are looked at, as more of one
                kind are a group of their own; beside it scikit-learn's LocalOutlierFactor
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import LocalOutlierFactor

import upstep_fast
from upstep_fast.config.curate import CurateConfig
from upstep_fast.config.files import from_options
from upstep_fast.data.curation.perceptual_hash import near, perceptual_hash
from upstep_fast.data.loading.skipped_images import read_image
from upstep_fast.data.sources.source import open_source
from upstep_fast.evaluation.curation.curate import Curation, find
from upstep_fast.evaluation.curation.images import Images, read_images
from upstep_fast.evaluation.curation.neighbors import nearest
from upstep_fast.evaluation.curation.outliers import outlier_scores
from upstep_fast.runtime.machine import processor_name

SETS = {
    "hand signs, base": ("sign_digits_64.tar", "demo"),
    "hand signs, adapted": ("sign_digits_64.tar", "upstep-demo"),
    "cartoons, base": ("pacs_cartoon_64.tar", "demo"),
}
ODD = ("sign_digits_64.tar", "gtsrb_32.tar", "pacs_sketch_64.tar", "omniglot_64.tar", "pacs_cartoon_64.tar")
IMAGES, COPIES, WRONG, OUTLIERS = 600, 40, 0.1, 4
Change = Callable[[Image.Image, random.Random], Image.Image]


def recompressed(image: Image.Image, rng: random.Random) -> Image.Image:
    """Return the image after a JPEG of quality 50."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=50)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def cut(image: Image.Image, rng: random.Random) -> Image.Image:
    """Return 95 % of both sides, at a random place."""
    width, height = (round(0.95 * side) for side in image.size)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def scaled(image: Image.Image, rng: random.Random) -> Image.Image:
    """Return the image at 0.7 of its size."""
    return image.resize((round(0.7 * image.width), round(0.7 * image.height)), Image.Resampling.BICUBIC)


CHANGES: dict[str, Change] = {
    "recompressed": recompressed,
    "resized": scaled,
    "cut by 5 %": cut,
    "mirrored": lambda image, rng: ImageOps.mirror(image),
    "20 % brighter": lambda image, rng: ImageEnhance.Brightness(image).enhance(1.2),
    "20 % darker": lambda image, rng: ImageEnhance.Brightness(image).enhance(0.8),
}


def pictures(path: Path, count: int) -> list[tuple[str, Image.Image]]:
    """Return (class, image) of at most `count` images, chosen with seed 0."""
    source = open_source(path)
    labels = source.labels or []
    chosen = np.sort(np.random.default_rng(0).permutation(len(source))[:count]).tolist()
    return [(labels[i], Image.fromarray(read_image(source, i).permute(1, 2, 0).numpy())) for i in chosen]


def write(folder: Path, name: str, images: list[tuple[str, Image.Image]]) -> list[str]:
    """Write images as folder/CLASS/name-I.png and return the paths."""
    paths = []
    for i, (label, image) in enumerate(images):
        (folder / label).mkdir(parents=True, exist_ok=True)
        image.save(folder / label / f"{name}-{i:05}.png")
        paths.append(str(folder / label / f"{name}-{i:05}.png"))
    return paths


def curated(folder: Path, run: str) -> tuple[Curation, Images]:
    """Run the search of `curate`, without its files."""
    how = {"device": "cpu", "precision": "fp32"}
    features = upstep_fast.embed(run, folder, folder.with_name(f"{folder.name}.safetensors"), **how)
    config = from_options(CurateConfig, {"run": run, "data": folder, "features": features, **how}, "bench")
    images = read_images(config)
    return find(images, config), images


def copies(images: list[tuple[str, Image.Image]], folder: Path, run: str) -> dict[str, Any]:
    """Return recall by change and precision of near copies, and of the hash and the features alone."""
    rng = random.Random(0)
    first, origin = write(folder, "a", images), {}
    planted: dict[str, str] = {}
    for change, function in CHANGES.items():
        chosen = rng.sample(range(len(images)), COPIES)
        added = write(folder, f"z-{len(origin):05}", [(images[i][0], function(images[i][1], rng)) for i in chosen])
        origin |= {path: first[i] for path, i in zip(added, chosen, strict=True)}
        planted |= dict.fromkeys(added, change)
    found, read = curated(folder, run)
    root = {path: origin.get(path, path) for path in read.names}
    groups: dict[int, list[str]] = {}
    for f in found.findings:
        if f.finding in ("exact", "near") and f.group is not None:
            groups.setdefault(f.group, []).append(f.path)
    pairs = [(paths[0], path) for paths in groups.values() for path in paths[1:]]
    result = {"curate": _scores([p for of in groups.values() for p in _with_root(of, root)], pairs, planted, root)}
    hashes = np.array([perceptual_hash(read_image(read.source, i)) for i in range(len(read.names))], np.uint64)
    firsts, _ = near(hashes)
    by_hash = [(read.names[j], read.names[i]) for i, j in enumerate(firsts.tolist()) if j >= 0]
    result["perceptual hash alone"] = _scores(_both(by_hash, root), by_hash, planted, root)
    neighbors = nearest(read.x, 1)
    order = np.argsort(-neighbors.similarity[:, 0], kind="stable")[: 2 * len(planted)]
    by_features = [(read.names[int(neighbors.index[i, 0])], read.names[int(i)]) for i in order]
    result["features alone"] = _scores(_both(by_features, root), by_features, planted, root)
    result["planted"], result["threshold"] = len(planted), round(found.threshold, 4)
    return result


def _with_root(paths: list[str], root: dict[str, str]) -> list[str]:
    """Return those of a group whose original, or another copy of it, is in the group."""
    count = Counter(root[path] for path in paths)
    return [path for path in paths if count[root[path]] > 1]


def _both(pairs: list[tuple[str, str]], root: dict[str, str]) -> list[str]:
    return [path for pair in pairs if root[pair[0]] == root[pair[1]] for path in pair]


def _scores(
    found: list[str], pairs: list[tuple[str, str]], planted: dict[str, str], root: dict[str, str]
) -> dict[str, Any]:
    hit, right = set(found), sum(root[a] == root[b] for a, b in pairs)
    recall = {c: round(np.mean([p in hit for p, of in planted.items() if of == c]).item(), 3) for c in CHANGES}
    every = round(np.mean([path in hit for path in planted]).item(), 3)
    return {
        "recall": every,
        "precision": round(right / max(1, len(pairs)), 3),
        "pairs": len(pairs),
        "by change": recall,
    }


def classes(images: list[tuple[str, Image.Image]], folder: Path, run: str) -> dict[str, Any]:
    """Return precision and recall of wrong classes, and how often the proposed one is right."""
    rng = random.Random(1)
    names = sorted({label for label, _ in images})
    wrong = set(rng.sample(range(len(images)), round(WRONG * len(images))))
    given = [
        (rng.choice([n for n in names if n != label]) if i in wrong else label, picture)
        for i, (label, picture) in enumerate(images)
    ]
    paths = write(folder, "a", given)
    truth = {path: label for path, (label, _) in zip(paths, images, strict=True)}
    moved = {paths[i] for i in wrong}
    listed = [f for f in curated(folder, run)[0].findings if f.finding == "mislabeled"]
    hits = [f.path in moved for f in listed]
    return {
        "planted": len(moved),
        "listed": len(listed),
        "precision": round(float(np.mean(hits)), 3),
        "recall": round(sum(hits) / len(moved), 3),
        "precision of as many as planted": round(float(np.mean(hits[: len(moved)])), 3),
        "proposed class right": round(
            float(np.mean([f.suggested == truth[f.path] for f in listed if f.path in moved])), 3
        ),
    }


def outliers(images: list[tuple[str, Image.Image]], odd: list[Image.Image], folder: Path, run: str) -> dict[str, Any]:
    """Return precision and recall of the listed outliers, and average precision and AUC of the ranks."""
    rng = random.Random(2)
    write(folder, "a", images)
    planted = set(write(folder, "z", [(rng.choice(images)[0], picture) for picture in odd]))
    found, read = curated(folder, run)
    is_odd = np.array([name in planted for name in read.names])
    listed = [f.path in planted for f in found.findings if f.finding == "outlier"]
    local = -LocalOutlierFactor(n_neighbors=10, metric="cosine").fit(read.x).negative_outlier_factor_
    ranks = {"curate": outlier_scores(nearest(read.x)), "LocalOutlierFactor": local}
    return {
        "planted": len(odd),
        "listed": len(listed),
        "precision": round(float(np.mean(listed)) if listed else 0.0, 3),
        "recall": round(sum(listed) / len(odd), 3),
        "average precision": {name: round(float(average_precision_score(is_odd, z)), 3) for name, z in ranks.items()},
        "AUC": {name: round(float(roc_auc_score(is_odd, z)), 3) for name, z in ranks.items()},
    }


def scale(count: int) -> dict[str, Any]:
    """Return seconds and memory of the neighbors of `count` random features of 192 values."""
    x = np.random.default_rng(0).normal(size=(count, 192)).astype(np.float32)
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    nearest(x)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    seconds = round(time.perf_counter() - began, 1)
    return {"images": count, "width": 192, "seconds": seconds, "MiB above the features": round(grown)}


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--scale", type=int)
    args = parser.parse_args()
    result: dict[str, Any] = {"version": upstep_fast.__version__}
    result["device"] = f"{processor_name()}, {torch.get_num_threads()} threads"
    if args.scale:
        result["neighbors"] = scale(args.scale)
    else:
        for name, (file, run) in SETS.items():
            images = pictures(args.data / file, IMAGES)
            odd = [one for other in ODD if other != file for _, one in pictures(args.data / other, OUTLIERS)]
            with tempfile.TemporaryDirectory() as top:
                result[name] = {
                    "images": len(images),
                    "copies": copies(images, Path(top, "copies"), run),
                    "classes": classes(images, Path(top, "classes"), run),
                    "outliers": outliers(images, odd, Path(top, "outliers"), run),
                }
            print(name, json.dumps(result[name]), flush=True)
    print(json.dumps(result, indent=1))
    if args.out:
        known = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(json.dumps(known | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
