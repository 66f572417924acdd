"""How good features are: k-NN, linear probe, the ensemble with the base model, forgetting."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upstep_fast.config.adapt import EmbedConfig, EvalConfig
from upstep_fast.data.labelled.splits import held_out as held_out_of
from upstep_fast.data.labelled.splits import train_and_test
from upstep_fast.data.loading.loader import load_images
from upstep_fast.data.sources.source import Source, open_source
from upstep_fast.engine import vit as engine
from upstep_fast.errors import ConfigError, DataError
from upstep_fast.evaluation import whitening
from upstep_fast.evaluation.whitening import Whitening
from upstep_fast.model import backbone as backbones
from upstep_fast.model import lora
from upstep_fast.model.backbone import Backbone
from upstep_fast.runtime import distributed
from upstep_fast.runtime.atomic_file import write_whole
from upstep_fast.runtime.device import Compute, resolve

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


Measure = Callable[[Features, Features], float]  # train, test -> percent
Form = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # what `extract` found -> [N, *] by base, adapted, ensemble


@dataclass(frozen=True)
class Extracted:
    """What `extract` found of a labelled set of images."""

    x: dict[str, Tensor]
    y: Tensor
    classes: tuple[str, ...]

    def features(self, form: Form) -> dict[str, Features]:
        """In one form, by "base", "adapted" and "ensemble"."""
        return {name: Features(x, self.y, self.classes) for name, x in form(self.x).items()}


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
    {"base": {"knn", "knn_whitened", "linear", "linear_whitened"}, "adapted": {...}, "ensemble": {...},
    "source": {"base", "adapted", "ensemble"}, "source_whitened": {...}, "n_train", "n_test", "k"}, without the parts
    that were not asked for. whitened: with whitened features beside the others (whitening.py), fitted to train.
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
    whitened = partial(beside, fitted={name: whitening.fit(x) for name, x in train.x.items()})

    def accuracy(of: Measure, form: Form, bank: Extracted, queries: Extracted) -> dict[str, float]:
        pairs = zip(bank.features(form).items(), queries.features(form).values(), strict=True)
        return {kind: of(of_bank, of_queries) for (kind, of_bank), of_queries in pairs}

    measures: dict[str, Measure] = {"knn": partial(knn, k=config.k), "linear": linear_probe}
    for measure, of in measures.items():
        for form, name in ((plain, measure), (whitened, f"{measure}_whitened")):
            for kind, percent in accuracy(of, form, train, test).items():
                result.setdefault(kind, {})[name] = percent
    if config.source is not None:
        bank, queries = _train_and_test((config.source,), models, config, compute)
        result["source"] = accuracy(measures["knn"], plain, bank, queries)
        result["source_whitened"] = accuracy(measures["knn"], whitened, bank, queries)
    result |= {"n_train": len(train.y), "n_test": len(test.y), "k": config.k}
    if config.json is not None and distributed.is_first():
        _write_text(Path(config.json), json.dumps(result, indent=2) + "\n", "json")
    return result


def embed(model: str, data: str | Path | Sequence[str | Path], out: str | Path, **options: Any) -> Path:
    """Writes features of every image with its path; keywords are EmbedConfig's. Returns the file.

    [N, D] for features of width D, [N, 2 D] with ensemble; with a whitening three times as wide, or twice where the
    model's features are the mean patch token.
    """
    paths = (data,) if isinstance(data, (str, Path)) else data
    return run_embed(EmbedConfig(model=model, data=tuple(str(p) for p in paths), out=str(out), **options))


def run_embed(config: EmbedConfig) -> Path:
    """As `embed`. Raises UpstepError."""
    out = Path(config.out)
    writers = {".npy": _write_npy, ".safetensors": _write_safetensors, ".parquet": _write_parquet}
    if out.suffix not in writers:
        raise ConfigError(f"out: {out.name} must end in {', '.join(writers)}")
    files = {"out": out} | ({"fit_whitening": Path(config.fit_whitening)} if config.fit_whitening else {})
    if len({path.with_suffix("") for path in files.values()}) < len(files):
        raise ConfigError(f"fit_whitening: {config.fit_whitening} and --out {out} need names that differ")
    for field, path in files.items():
        if path.exists() and not config.overwrite:
            raise ConfigError(f"{field}: {path} exists; choose another name or add --overwrite")
        if not path.parent.is_dir():
            raise ConfigError(f"{field}: no folder {path.parent}")
    compute = resolve(config.device, config.precision)
    with distributed.joined(compute.device):
        source, models = open_source(config.data), load_models(config)
        whitens = bool(config.whitening or config.fit_whitening)
        fingerprints = _fingerprints(models, config) if whitens else {}
        fitted = whitening.read(config.whitening, fingerprints) if config.whitening else {}
        x, read = extract(source, models, config, compute, patches=whitens)
        if config.fit_whitening:
            fitted = {name: whitening.fit(x[name]) for name in models}
            if distributed.is_first():
                whitening.write(config.fit_whitening, fitted, fingerprints)
        features = beside(x, fitted) if fitted else plain(x)
        kind = "ensemble" if config.ensemble else "adapted" if config.adapter else "base"
        if distributed.is_first():
            writers[out.suffix](out, features[kind], [source.name(i) for i in read])
    return out


def _fingerprints(models: Mapping[str, Backbone], config: EmbedConfig) -> dict[str, str]:
    """What tells the base model and the adapted one from others, whatever machine merges them."""
    found = {"base": backbones.fingerprint(models["base"].vit)}
    return found | ({"adapted": f"{found['base']} {lora.fingerprint(config.adapter)}"} if config.adapter else {})


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
    source: Source,
    models: dict[str, Backbone],
    config: EvalConfig | EmbedConfig,
    compute: Compute,
    patches: bool = True,
) -> tuple[dict[str, Tensor], list[int]]:
    """Of every readable image by each model: features and mean patch token, [N, P, D] (`backbone.parts`), each of unit
    length; and the images' indices. patches: False: the features alone, P = 1.
    """
    base = models["base"]
    pool = backbones.parts if patches else backbones.alone
    runs = {name: _parts_of(model, config, compute, pool) for name, model in models.items()}
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
        for name, run in runs.items():
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
    # a rank without images has none to tell the shape of
    num = {name: backbones.num_parts(model.vit) if patches else 1 for name, model in models.items()}
    nothing = {name: torch.empty(0, num[name], model.width) for name, model in models.items()}
    own = {name: torch.cat(parts) if parts else nothing[name] for name, parts in rows.items()}
    return {name: torch.cat(distributed.gather_parts(x)) for name, x in own.items()}, read


def _parts_of(
    model: Backbone, config: EvalConfig | EmbedConfig, compute: Compute, pool: Callable[[Any, Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    vit = model.vit.to(compute.device).requires_grad_(False)

    def by_the_model(images: Tensor) -> Tensor:
        return pool(vit, vit.forward_features(images))

    if config.implementation == "reference":
        return by_the_model
    dtype = compute.dtype or torch.float32
    return engine.choose(vit, dtype, "fast", otherwise=by_the_model, fp8=compute.fp8, pool=pool)


def plain(x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of what `extract` found the features as they are, [N, D], and their ensemble [N, 2 D]."""
    return _with_ensemble({name: parts[:, 0].contiguous() for name, parts in x.items()})


def beside(x: Mapping[str, Tensor], fitted: Mapping[str, Whitening]) -> dict[str, Tensor]:
    """Of what `extract` found the features with whitened ones beside them, and their ensemble."""
    return _with_ensemble({name: whitening.beside(x[name], by) for name, by in fitted.items()})


def _with_ensemble(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return found | ({"ensemble": ensemble(found["base"], found["adapted"])} if "adapted" in found else {})


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
) -> tuple[Extracted, Extracted]:
    found = []
    for part in train_and_test(paths, "eval"):
        x, read = extract(part.source, models, config, compute)
        found.append(Extracted(x, part.y[read], part.classes))
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
