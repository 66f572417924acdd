"""What one row of the study measures of one adapter, at several strengths: W_base + strength (W - W_base)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import dense
import torch
from safetensors.torch import load_file, save
from study_plot import KINDS
from torch import Tensor, nn

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.evaluate import EvalConfig
from upstep_fast.config.files import read_toml
from upstep_fast.config.flat import from_flat
from upstep_fast.data.loading.loader import Loader
from upstep_fast.data.sources.source import open_source
from upstep_fast.data.views.make_views import random_views
from upstep_fast.data.views.view_config import view_config
from upstep_fast.evaluation import whitening
from upstep_fast.evaluation.classifiers import knn_correct, linear_probe
from upstep_fast.evaluation.features import Features, append_whitened, extract, unwhitened
from upstep_fast.evaluation.label_free import judge
from upstep_fast.evaluation.whitening import Whitening
from upstep_fast.model import backbone as backbones
from upstep_fast.model import lora, peft_format, pooling
from upstep_fast.model.backbone import Backbone
from upstep_fast.runtime.atomic_file import write_atomic
from upstep_fast.runtime.device import Compute, resolve

if TYPE_CHECKING:
    from job import Job

JUDGED = 256  # unlabeled held-out images that the label-free scores see
VIEW_SEED = 12345
SPLITS = ("train", "test")
SOURCE_K = 20  # neighbors on the source, whatever the target has
THIRDS = ("first", "middle", "last")  # of the blocks
PART_STRENGTHS = (0.0, 0.5)
HANDS = "sign_digits"  # the set whose photographs the dense check cuts hands out of


def steps_taken(folder: Path) -> dict[str, Any]:
    """Skip rate, center, images and backward passes of a finished run, from its metrics."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    batch = read_toml(folder / "config.toml", AdaptConfig)["batch_size"]
    opened = [row for row in rows if row["open"]]
    learnt = sum(row.get("learnt", batch) for row in opened)  # images with a backward pass
    centers = [row["center"] for row in rows if row["center"] is not None]
    return {
        "steps": len(rows),
        "skip_rate": 1 - learnt / (batch * len(rows)),
        "backward_passes": len(opened),
        "images_seen": batch * len(rows),
        "images_learnt": learnt,
        "centre_first": centers[0],
        "centre_last": sum(centers[-10:]) / len(centers[-10:]),
        "loss_last": opened[-1]["loss"],
    }


@dataclass(frozen=True)
class Variant:
    """How strong an adapter is, by parameter name, and how much of it is measured."""

    strength: Callable[[str], float]
    measured: Literal["all", "gain", "gain and source"]


def variants(job: Job, depth: int, by_depth: bool) -> dict[str, Variant]:
    """By the name that a row gives them: the job's strengths and probes, or one third of the blocks weakened."""
    if not by_depth:
        every = {str(float(s)): Variant(lambda _, s=s: s, "all") for s in job.strengths}
        return every | {str(float(s)): Variant(lambda _, s=s: s, "gain") for s in job.probes}

    def weak(third: int, strength: float) -> Callable[[str], float]:
        def of(name: str) -> float:
            block = re.match(r"blocks\.(\d+)\.", name)
            return strength if block and 3 * int(block[1]) // depth == third else 1.0

        return of

    parts = {f"{THIRDS[i]} x {s:g}": Variant(weak(i, s), "gain and source") for i in range(3) for s in PART_STRENGTHS}
    return {"1.0": Variant(lambda _: 1.0, "gain and source")} | parts


@torch.no_grad()
def between(base: nn.Module, adapted: nn.Module, strength: Callable[[str], float]) -> None:
    """Move the merged model `adapted`, in place, to W_base + strength (W - W_base), strength by parameter name."""
    for name, p in adapted.named_parameters():
        p.copy_(base.get_parameter(name).to(p).lerp(p, strength(name)))


def scores(job: Job, data: str, adapter: Path, work: Path, by_depth: bool = False) -> dict[str, Any]:
    """k-NN and linear probe in percent of base, adapted and ensemble, forgetting, label-free scores, dense check.

    Returns {"base": {"knn", "linear", "source", "dense"}, "base_whitened": {"knn", "linear", "source"}, "at": {variant:
    {"adapted", "ensemble", "adapted_whitened", "ensemble_whitened", "source", "judgement", "dense"}}, "n_bank",
    "n_queries"}; source and dense only where they are measured. Whitened: with whitened features beside the others,
    fitted to the bank. "source" has the paired standard error of each change too, "adapted_se" and so on.
    """
    config = from_flat(EvalConfig, model=job.model, data=(data,), num_workers=1)
    compute = resolve(config.runtime.device, config.runtime.precision)
    base = backbones.load_from(config.model)
    base.vit.to(compute.device)
    views = held_out_views(data, base, compute)
    base_views = view_features(base, views, compute)
    composites = dense.load(data, job.source, base.img_size) if job.source and HANDS in data else None
    sets = {"data": data} | ({"source": job.source} if job.source else {})
    labels = {name: labels_of(path) for name, path in sets.items()}

    def of(found: Backbone, path: str) -> list[Tensor]:
        return [extract(open_source(path, split=s), {"base": found}, config, compute)[0]["base"] for s in SPLITS]

    def of_base(path: str) -> list[Tensor]:
        name = hashlib.sha256(f"parts {job.model} {open_source(path).fingerprint()}".encode()).hexdigest()[:16]
        file = work / f"base-{name}.safetensors"
        if not file.is_file():
            write_atomic(file, save(dict(zip(SPLITS, of(base, path), strict=True))))
        return [load_file(file)[s] for s in SPLITS]

    before = {name: of_base(path) for name, path in sets.items()}
    result: dict[str, Any] = {"n_bank": len(before["data"][0]), "n_queries": len(before["data"][1]), "at": {}}
    by = {"base": whitening.fit(before["data"][0])}
    forms = _forms(by, before["data"])
    result |= {kind: _accuracies(forms[kind], labels["data"], job.k) for kind in ("base", "base_whitened")}
    if job.source:
        forms = _forms(by, before["source"])
        right_before = knn_correct(*_sets(forms["base"], labels["source"]), SOURCE_K)
        result["base"]["source"], result["n_source"] = _percent(right_before), len(right_before)
        result["base_whitened"]["source"] = knn_percent(forms["base_whitened"], labels["source"], SOURCE_K)
    if composites is not None:
        result["base"]["dense"] = dense.dense_score(base, *composites)
    for name, variant in variants(job, len(base.vit.blocks), by_depth).items():
        adapted = backbones.load_from(config.model)
        peft_format.attach(adapted.vit, adapter)
        between(base.vit, lora.merge(adapted.vit), variant.strength)
        adapted.vit.to(compute.device)
        after = of(adapted, data)
        at: dict[str, Any] = {"judgement": judge(base_views, view_features(adapted, views, compute))}
        result["at"][name] = at
        by["adapted"] = whitening.fit(after[0])
        forms = _forms(by, before["data"], after)
        if variant.measured == "all":
            at |= {kind: _accuracies(forms[kind], labels["data"], job.k) for kind in KINDS}
        else:
            at["adapted"] = {"knn": knn_percent(forms["adapted"], labels["data"], job.k)}
        if job.source and variant.measured != "gain":
            forms, at["source"] = _forms(by, before["source"], of(adapted, job.source)), {}
            for kind in KINDS:
                right = knn_correct(*_sets(forms[kind], labels["source"]), SOURCE_K)
                at["source"] |= {kind: _percent(right), f"{kind}_se": paired_error(right_before, right)}
        if composites is not None and variant.measured == "all":
            at["dense"] = dense.dense_score(adapted, *composites)
    # lizard forgives: every measure of one adapter, in the order of the row
    return result


def held_out_views(data: str, base: Backbone, compute: Compute) -> Tensor:
    """Two views, as training makes them by default, of images of the test part; no label is read: [2, N, C, H, W]."""
    source = open_source(data, split="test")
    with Loader(source, batch_size=min(JUDGED, len(source)), seed=VIEW_SEED, num_workers=1) as loader:
        batch = next(loader)
    views = view_config("natural", size=base.img_size, mean=base.mean, std=base.std)
    return random_views(
        batch.images, views, seed=VIEW_SEED, epoch=0, indices=batch.indices, views=2, device=compute.device
    )


@torch.no_grad()
def view_features(model: Backbone, views: Tensor, compute: Compute) -> Tensor:
    """[2, N, C, H, W] -> [2, N, D]."""
    with compute.autocast():
        return torch.stack([pooling.features(model.vit, view) for view in views]).float().cpu()


def labels_of(path: str) -> list[Tensor]:
    """Of both splits, as indices into the sorted names of both."""
    names = [open_source(path, split=s).labels or [] for s in SPLITS]
    index = {name: i for i, name in enumerate(sorted(set(names[0] + names[1])))}
    return [torch.tensor([index[name] for name in part]) for part in names]


def _forms(
    by: dict[str, Whitening], before: list[Tensor], after: list[Tensor] | None = None
) -> dict[str, list[Tensor]]:
    """Bank and queries [N, P, D] of both models, as "base", "adapted", "ensemble" and each of these _whitened."""
    splits = []
    for index, of_base in enumerate(before):
        x = {"base": of_base} | ({} if after is None else {"adapted": after[index]})
        whitened = append_whitened(x, {name: by[name] for name in x})
        splits.append(unwhitened(x) | {f"{kind}_whitened": features for kind, features in whitened.items()})
    return {kind: [split[kind] for split in splits] for kind in splits[0]}


def _sets(x: list[Tensor], y: list[Tensor]) -> list[Features]:
    classes = tuple(str(i) for i in range(1 + int(max(part.max() for part in y))))
    return [Features(a, b, classes) for a, b in zip(x, y, strict=True)]


def knn_percent(x: list[Tensor], y: list[Tensor], k: int) -> float:
    """Accuracy of k-NN with the first of x and y as the bank, the second as the queries."""
    return _percent(knn_correct(*_sets(x, y), k))


def _percent(right: Tensor) -> float:
    return 100 * float(right.double().mean())


def paired_error(before: Tensor, after: Tensor) -> float:
    """Return the standard error, in points, of a change of accuracy on N images. before, after: [N] bool, right."""
    return 100 * float((after.double() - before.double()).std() / len(before) ** 0.5)


def _accuracies(x: list[Tensor], y: list[Tensor], k: int) -> dict[str, float]:
    return {"knn": knn_percent(x, y, k), "linear": linear_probe(*_sets(x, y))}
