"""How good features are: k-NN, linear probe, the ensemble with the base model, forgetting."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backbone as backbones
from . import distributed, lora, whitening
from .backbone import Backbone
from .config import EmbedConfig, EvalConfig
from .data.labelled import held_out as held_out_of
from .data.labelled import train_and_test
from .data.loader import load_images
from .data.sources import Source, open_source
from .device import Compute, resolve
from .engine import vit as engine
from .errors import ConfigError, DataError
from .whitening import Whitening
from .whole_file import write_whole

log = logging.getLogger("upstep_fast")

KNN_TEMPERATURE = 0.07  # of the votes, as in DINO's k-NN
PROBE_WEIGHTS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # L2 weights the probe chooses from, on a split of train
PROBE_HELD_OUT = 0.2


@dataclass(frozen=True)
class Features:
    """Features of a labelled set of images."""

    x: Tensor  # [N, D] fp32, unit length
    y: Tensor  # [N] int64, index into `classes`
    classes: tuple[str, ...]


def evaluate(
    model: str,
    data: str | Path | Sequence[str | Path],
    *,
    adapter: str | Path | None = None,
    source: str | Path | None = None,
    k: int = 20,
    **options: Any,
) -> dict[str, Any]:
    """k-NN and linear-probe accuracy in percent of base, adapted and ensemble features; keywords are EvalConfig's.

    data and source hold train/CLASS/... and test/CLASS/... . Returns
    {"base": {"knn", "whitened", "linear"}, "adapted": {...}, "ensemble": {...},
    "source": {"base", "adapted", "ensemble"}, "source_whitened": {...}, "n_train", "n_test", "k"}, without the parts
    that were not asked for. whitened: k-NN with whitened features beside the others (whitening.py), fitted on train.
    """
    paths = (data,) if isinstance(data, (str, Path)) else data
    return run(
        EvalConfig(
            model=model,
            data=tuple(str(p) for p in paths),
            adapter=None if adapter is None else str(adapter),
            source=None if source is None else str(source),
            k=k,
            **options,
        )
    )


def run(config: EvalConfig) -> dict[str, Any]:
    """As `evaluate`; writes config.json if given. Raises UpstepError."""
    compute = resolve(config.device, config.precision)
    with distributed.joined(compute.device):
        return _run(config, compute)


def _run(config: EvalConfig, compute: Compute) -> dict[str, Any]:
    models = load_models(config)
    result: dict[str, Any] = {}
    train, test = _train_and_test(config.data, models, config, compute)
    fitted = {name: whitening.fit(train[name].x) for name in models}

    def accuracy(bank: dict[str, Features], queries: dict[str, Features]) -> dict[str, float]:
        return {name: knn(bank[name], queries[name], config.k) for name in bank}

    plain, whitened = accuracy(train, test), accuracy(_whitened(train, fitted), _whitened(test, fitted))
    for name in train:
        linear = linear_probe(train[name], test[name])
        result[name] = {"knn": plain[name], "whitened": whitened[name], "linear": linear}
    if config.source is not None:
        bank, queries = _train_and_test((config.source,), models, config, compute)
        result["source"] = accuracy(bank, queries)
        result["source_whitened"] = accuracy(_whitened(bank, fitted), _whitened(queries, fitted))
    result |= {"n_train": len(train["base"].y), "n_test": len(test["base"].y), "k": config.k}
    if config.json is not None and distributed.is_first():
        _write_text(Path(config.json), json.dumps(result, indent=2) + "\n", "json")
    return result


def embed(model: str, data: str | Path | Sequence[str | Path], out: str | Path, **options: Any) -> Path:
    """Writes features of every image with its path; keywords are EmbedConfig's. Returns the file."""
    paths = (data,) if isinstance(data, (str, Path)) else data
    return run_embed(EmbedConfig(model=model, data=tuple(str(p) for p in paths), out=str(out), **options))


def run_embed(config: EmbedConfig) -> Path:
    """As `embed`. Raises UpstepError."""
    out = Path(config.out)
    writers = {".npy": _write_npy, ".safetensors": _write_safetensors, ".parquet": _write_parquet}
    if out.suffix not in writers:
        raise ConfigError(f"out: {out.name} must end in {', '.join(writers)}")
    for field, path in (("out", out), ("fit_whitening", Path(config.fit_whitening or out))):
        if path.exists() and not config.overwrite:
            raise ConfigError(f"{field}: {path} exists; choose another name or add --overwrite")
        if not path.parent.is_dir():
            raise ConfigError(f"{field}: no folder {path.parent}")
    compute = resolve(config.device, config.precision)
    with distributed.joined(compute.device):
        source, models = open_source(config.data), load_models(config)
        fitted = whitening.read(config.whitening, models) if config.whitening else {}
        x, read = extract(source, models, config, compute)
        if config.fit_whitening:
            fitted = {name: whitening.fit(x[name]) for name in models}
            if distributed.is_first():
                whitening.write(config.fit_whitening, fitted, models)
        x = beside(x, fitted) if fitted else x
        kind = "ensemble" if config.ensemble else "adapted" if config.adapter else "base"
        if distributed.is_first():
            writers[out.suffix](out, x[kind], [source.name(i) for i in read])
    return out


def load_models(config: EvalConfig | EmbedConfig) -> dict[str, Backbone]:
    """{"base": ..., "adapted": ...}, the second only with an adapter."""
    models = {"base": backbones.load_from(config)}
    if config.adapter is not None:
        adapted = backbones.load_from(config)
        lora.attach(adapted.vit, config.adapter)
        lora.merge(adapted.vit)
        models["adapted"] = adapted
    return models


@torch.no_grad()
def extract(
    source: Source, models: dict[str, Backbone], config: EvalConfig | EmbedConfig, compute: Compute
) -> tuple[dict[str, Tensor], list[int]]:
    """Unit features [N, D] of every readable image by each model and their ensemble, and the images' indices."""
    base = models["base"]
    features = {name: _features_of(model, config, compute) for name, model in models.items()}
    rows: dict[str, list[Tensor]] = {name: [] for name in models}
    read: list[int] = []
    skipped: dict[str, str] = {}
    batches = load_images(
        source,
        distributed.own_part(len(source)),
        **base.reading,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        max_bad_fraction=config.max_bad_fraction,
        skipped=skipped,
    )
    for indices, images in batches:
        x = base.normalised(images.to(compute.device))
        read += indices.tolist()
        for name, run in features.items():
            with compute.autocast():
                f = run(x)
            rows[name].append(F.normalize(f.float(), dim=-1).cpu())
    for name, reason in skipped.items():
        log.warning("skipped %s: %s", name, reason)
    read = [index for part in distributed.gather(read) for index in part]
    if not read:
        raise DataError(
            f"data: none of the {len(source)} images could be read; the first: {next(iter(skipped.items()))}"
        )
    widths = {name: models[name].width for name in models}
    own = {name: torch.cat(parts) if parts else torch.empty(0, widths[name]) for name, parts in rows.items()}
    found = {name: torch.cat(distributed.gather_parts(x)) for name, x in own.items()}
    if "adapted" in found:
        found["ensemble"] = ensemble(found["base"], found["adapted"])
    return found, read


def _features_of(model: Backbone, config: EvalConfig | EmbedConfig, compute: Compute) -> Callable[[Tensor], Tensor]:
    vit = model.vit.to(compute.device).requires_grad_(False)
    plain = partial(backbones.features, vit)
    if config.implementation == "reference":
        return plain
    return engine.choose(vit, compute.dtype or torch.float32, "fast", otherwise=plain, fp8=compute.fp8)


def beside(x: Mapping[str, Tensor], fitted: Mapping[str, Whitening]) -> dict[str, Tensor]:
    """What `extract` found, with whitened features beside each model's own, and the ensemble of these."""
    found = {name: whitening.beside(x[name], by) for name, by in fitted.items()}
    return found | ({"ensemble": ensemble(found["base"], found["adapted"])} if "adapted" in found else {})


def _whitened(part: Mapping[str, Features], fitted: Mapping[str, Whitening]) -> dict[str, Features]:
    x = beside({name: features.x for name, features in part.items()}, fitted)
    return {name: replace(features, x=x[name]) for name, features in part.items()}


def ensemble(base: Tensor, adapted: Tensor) -> Tensor:
    """Unit features side by side, of unit length again: their cosine is the mean of the two. [N, D] -> [N, 2 D]."""
    return torch.cat([base, adapted], -1) / 2**0.5


def knn(train: Features, test: Features, k: int = 20) -> float:
    """Top-1 accuracy in percent of a k-NN classifier, votes weighted by exp(similarity / 0.07).

    Both sets hold unit features and share their classes; k above the size of `train` is reduced to it.
    """
    own = slice(distributed.rank(), None, distributed.size())
    right = knn_right(train, Features(test.x[own], test.y[own], test.classes), k).sum()
    return 100.0 * distributed.reduce(right).item() / len(test.y)


def knn_right(train: Features, test: Features, k: int = 20) -> Tensor:
    """Which images of `test` the classifier of `knn` gets right, [N] bool; of one process."""
    votes_of = F.one_hot(train.y, len(train.classes)).float()
    right = []
    for x, y in zip(test.x.split(1024), test.y.split(1024), strict=True):
        similarity, nearest = (x @ train.x.T).topk(min(k, len(train.x)), dim=1)
        votes = (votes_of[nearest] * ((similarity - 1) / KNN_TEMPERATURE).exp()[..., None]).sum(1)
        right.append(votes.argmax(1) == y)
    return torch.cat(right)


def linear_probe(train: Features, test: Features, *, seed: int = 0) -> float:
    """Top-1 accuracy in percent of logistic regression; its L2 weight is chosen on a split of `train`, not on test."""
    mean, std = train.x.mean(0), train.x.std(0).clamp_min(1e-6)
    x, x_test = (train.x - mean) / std, (test.x - mean) / std
    held_out = held_out_of(train.y, PROBE_HELD_OUT, seed)
    classes = len(train.classes)
    if held_out.any():

        def held_out_accuracy(l2: float) -> float:
            model = fit_logistic(x[~held_out], train.y[~held_out], classes, l2)
            return _accuracy(model, x[held_out], train.y[held_out])

        best = max(PROBE_WEIGHTS, key=held_out_accuracy)
    else:  # one image a class leaves nothing to choose on
        best = PROBE_WEIGHTS[len(PROBE_WEIGHTS) // 2]
    return _accuracy(fit_logistic(x, train.y, classes, best), x_test, test.y)


def fit_logistic(x: Tensor, y: Tensor, classes: int, l2: float, iterations: int = 100) -> nn.Linear:
    """Minimises mean cross-entropy + l2/2 |W|^2 by L-BFGS. x: [N, D]; y: [N]."""
    model = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=iterations, line_search_fn="strong_wolfe", tolerance_grad=1e-5
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) + 0.5 * l2 * model.weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return model


@torch.no_grad()
def _accuracy(model: nn.Linear, x: Tensor, y: Tensor) -> float:
    return 100.0 * float((model(x).argmax(1) == y).float().mean())


def _train_and_test(
    paths: Sequence[str], models: dict[str, Backbone], config: EvalConfig, compute: Compute
) -> tuple[dict[str, Features], dict[str, Features]]:
    found = []
    for part in train_and_test(paths, "eval"):
        x, read = extract(part.source, models, config, compute)
        found.append({name: Features(value, part.y[read], part.classes) for name, value in x.items()})
    return found[0], found[1]


def _write_text(path: Path, text: str, field: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"{field}: cannot write {path}: {error.strerror}") from error


def _write_npy(out: Path, x: Tensor, names: list[str]) -> None:
    _write(out, lambda file: np.save(file, x.numpy()))
    _write(out.with_suffix(".txt"), lambda file: file.write("".join(f"{n}\n" for n in names).encode()))


def _write_safetensors(out: Path, x: Tensor, names: list[str]) -> None:
    from safetensors.torch import save

    _write(out, lambda file: file.write(save({"features": x}, {"paths": json.dumps(names)})))


def _write_parquet(out: Path, x: Tensor, names: list[str]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "out: .parquet needs pyarrow; `pip install pyarrow`, or write .npy or .safetensors"
        ) from error
    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(x.numpy().ravel()), x.shape[1])
    _write(
        out,
        lambda file: pyarrow.parquet.write_table(pyarrow.table({"path": names, "features": column}), file),
    )


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    try:
        write_whole(path, write)
    except OSError as error:
        raise ConfigError(f"out: cannot write {path}: {error.strerror}") from error
