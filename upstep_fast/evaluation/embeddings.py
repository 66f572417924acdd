"""The embed command: features of images, with their paths, as a file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from torch import Tensor

from upstep_fast.config.adapter_folder import is_refused, run_folder
from upstep_fast.config.evaluate import EmbedConfig
from upstep_fast.config.files import from_options
from upstep_fast.config.options import EmbedOptions
from upstep_fast.config.run_reading import log_of_adapter
from upstep_fast.config.signatures import with_keywords
from upstep_fast.data.curation.intensity import measure_intensity
from upstep_fast.data.sources.lines import name_line
from upstep_fast.data.sources.source import Source, open_configured
from upstep_fast.errors import ConfigError
from upstep_fast.evaluation import whitening
from upstep_fast.evaluation.dense.embed_tokens import run_tokens
from upstep_fast.evaluation.feature_files import facts as feature_facts
from upstep_fast.evaluation.feature_files import folder as feature_folder
from upstep_fast.evaluation.feature_files import parquet as feature_parquet
from upstep_fast.evaluation.feature_files import shards as feature_shards
from upstep_fast.evaluation.feature_files.job import FeatureJob
from upstep_fast.evaluation.feature_files.parquet import FACTS, FEATURES
from upstep_fast.evaluation.feature_files.write import write_table
from upstep_fast.evaluation.features import extract, load_models, log_time
from upstep_fast.evaluation.whitening import OtherModelError, Whitening
from upstep_fast.input_files import read_bytes
from upstep_fast.model import pooling
from upstep_fast.model.backbone import Backbone
from upstep_fast.runtime import distributed
from upstep_fast.runtime.atomic_file import require_writable, write_errors
from upstep_fast.runtime.commit import Content, commit_together, settle
from upstep_fast.runtime.device import Compute, resolve
from upstep_fast.runtime.progress import track

log = logging.getLogger("upstep_fast")

CURE = "what was there is unchanged; make room, or give another --out"


@with_keywords(EmbedConfig)
def embed(
    model: str | Path, data: str | Path | Sequence[str | Path], out: str | Path, **keywords: Unpack[EmbedOptions]
) -> Path:
    """Write the features of every image with its path to `out` and return `out`; keywords: `upstep-fast embed --help`.

    Features of width D give [N, D], with ensemble [N, 2 D]; a whitening, by default that of the run's folder, makes
    them three times as wide, or twice for models whose features are the mean patch token. Raises UpstepError.
    """
    return run_embed(from_options(EmbedConfig, {"model": model, "data": data, "out": out, **keywords}, "embed")).out


@dataclass(frozen=True)
class Embedded:
    """Result of `run_embed`: the shape of features [N, D] or tokens [N, H, W, D], and their form in words."""

    out: Path
    shape: tuple[int, ...]
    form: str
    counts: str = ""  # of a folder: what was there and what is new, in words


def run_embed(config: EmbedConfig) -> Embedded:
    """Run the embed command, see `embed`. Raises UpstepError."""
    out, shards = Path(config.out), feature_folder.is_folder(config.out)
    config, own = with_run(config)
    if config.tokens:
        return Embedded(out, *run_tokens(config))
    with contextlib.ExitStack() as stack:
        target = feature_folder.target_of(out, config)
        if distributed.is_first():
            stack.enter_context(feature_folder.locked(out, config)) if shards else _check_files(out, config)
        compute = resolve(config.runtime.device, config.runtime.precision, config.runtime.implementation)
        with distributed.joined(compute.device, "repeat the command"), track("embed"):
            source = open_configured(config.data)
            if not shards:
                return _embed_file(out, _open(config, own, compute, source))
            source = feature_folder.with_recorded_intensity(source, feature_folder.plans_of(target))
            job, counts = feature_shards.run(_open(config, own, compute, source), target)
            shape = counts.there + counts.new, job.columns[FEATURES]
            return Embedded(out, shape, job.form, str(counts))


def _open(config: EmbedConfig, own: Path | None, compute: Compute, source: Source) -> FeatureJob:
    log.info("data: %s", source.summary)
    models = load_models(config)
    source = measure_intensity(source, channels=len(models["base"].mean), workers=config.data.num_workers)
    return job_of(config, own, compute, source, models)


def job_of(
    config: EmbedConfig, own: Path | None, compute: Compute, source: Source, models: dict[str, Backbone]
) -> FeatureJob:
    """Return what makes the features of a source, with their facts. own: as `with_run`. Raises ConfigError."""
    identity = whitening.identity_of(models["base"], source.reading)
    fitted: dict[str, Whitening] = {}
    if config.whitening or own:
        fitted = read_whitening(config, own, models, identity)
    content = read_bytes(Path(config.whitening or own or ""), "whitening", whitening.MAX_BYTES) if fitted else None
    fingerprint = feature_facts.fingerprint(identity, config.adapter, content)
    return FeatureJob(config, source, models, compute, fitted, identity, fingerprint)


def _embed_file(out: Path, job: FeatureJob) -> Embedded:
    config, source, models = job.config, job.source, job.models
    log_time(len(source), {kind: models[kind] for kind in job.kinds}, job.compute)
    whitens = bool(config.fit_whitening or job.fitted)
    x, indices = extract(source, models, config, job.compute, patches=whitens, name="embed", kinds=job.kinds)
    contents: dict[Path, Content] = {}
    if config.fit_whitening:
        fitted = {name: whitening.fit(x[name]) for name in models}
        content = whitening.content(
            fitted, whitening.fingerprints_of(job.identity["sha256"], config.adapter), job.identity
        )
        contents[Path(config.fit_whitening)] = content
        fingerprint = feature_facts.fingerprint(job.identity, config.adapter, content)
        job = replace(job, fitted=fitted, fingerprint=fingerprint)
    features = job.features(x)
    if distributed.is_first():
        contents |= WRITERS[out.suffix](out, features, [source.name(i) for i in indices], job.facts)
        _write(contents)
    return Embedded(out, (len(indices), features[FEATURES].shape[1]), job.form)


def with_run(config: EmbedConfig) -> tuple[EmbedConfig, Path | None]:
    """Return the configuration, without an adapter that its run refused, and the whitening in the run's folder.

    None with --form plain, with another whitening, and where there is none. Both are logged. Raises ConfigError.
    """
    if config.adapter is None:
        return config, None
    folder = run_folder(config.adapter)
    log_of_adapter(config.adapter, config.data)
    if is_refused(config.adapter):
        if config.ensemble:
            raise ConfigError(f"ensemble: the adapter of {folder} was refused; leave out --ensemble for the base model")
        log.warning("adapter: that of %s was refused, as it made the features worse: base model used", folder)
        config = replace(config, adapter=None)
    if config.form == "plain" or config.tokens or config.whitening or config.fit_whitening:
        return config, None
    file = folder / whitening.FILE
    if os.path.lexists(file):
        return config, file
    log.info("form: plain, as %s holds no %s; embed --fit-whitening fits one", folder, whitening.FILE)
    return config, None


def read_whitening(
    config: EmbedConfig,
    own: Path | None,
    models: Mapping[str, Backbone],
    identity: Mapping[str, Any],
) -> dict[str, Whitening]:
    """Return the whitenings of --whitening, or of the run's folder (`own`, of `with_run`), by model.

    identity: of the base model, `whitening.identity_of`. The folder's are left out, with a warning, if they were fitted
    to other models or another input. Raises ConfigError.
    """
    base = models["base"]
    fingerprints = whitening.fingerprints_of(identity["sha256"], config.adapter)
    facts = fingerprints, identity, (pooling.num_parts(base.vit), base.width)
    try:
        return whitening.read(config.whitening or own or "", *facts)
    except OtherModelError as error:
        if config.whitening:
            raise
        log.warning("form: plain: %s", error)
        return {}


def _files(out: Path, config: EmbedConfig) -> dict[Path, str]:
    """Return what the command writes, with the flag that names it, in the order of the commit."""
    whitened = {Path(config.fit_whitening): "fit_whitening"} if config.fit_whitening else {}
    names = {_names_of(out): "out"} if out.suffix == ".npy" else {}
    return whitened | {out: "out"} | names


def _check_files(out: Path, config: EmbedConfig) -> None:
    """Raise ConfigError, before slow work, if `out` or the whitening file cannot be written."""
    if out.suffix not in WRITERS:
        raise ConfigError(f"out: {out.name} must end in {', '.join(WRITERS)}, or in / for a folder")
    if config.shard_size or config.moved:
        field = "shard_size" if config.shard_size else "moved"
        raise ConfigError(f"{field}: {out} is one file; give a folder, --out {out.with_suffix('')}/, or leave it out")
    if out.suffix == ".parquet":
        feature_parquet.require_pyarrow("out")
    if out.suffix == ".npy" and config.with_base:
        raise ConfigError("with_base: a .npy holds one array; write .safetensors, .parquet or a folder")
    if config.fit_whitening is not None and not Path(config.fit_whitening).name:
        raise ConfigError(f"fit_whitening: got {config.fit_whitening!r}, must name a file")
    if config.fit_whitening and Path(config.fit_whitening).with_suffix("") == out.with_suffix(""):
        raise ConfigError(f"fit_whitening: {config.fit_whitening} and --out {out} need names that differ")
    files = _files(out, config)
    with write_errors("the features", CURE):
        settle(list(files), "out")
    for path, field in files.items():
        if os.path.lexists(path) and not config.overwrite:
            raise ConfigError(f"{field}: {path} exists; choose another name or add --overwrite")
        require_writable(path, field)


def _names_of(out: Path) -> Path:
    return out.with_suffix(".txt")


def _npy(out: Path, x: Mapping[str, Tensor], names: list[str], facts: Mapping[str, Any]) -> dict[Path, Content]:
    lines = "".join(f"{name_line(name)}\n" for name in names).encode()
    return {out: lambda file: np.save(file, x[FEATURES].numpy()), _names_of(out): lambda file: file.write(lines)}


def _safetensors(out: Path, x: Mapping[str, Tensor], names: list[str], facts: Mapping[str, Any]) -> dict[Path, Content]:
    from safetensors.torch import save

    metadata = {"paths": json.dumps(names), FACTS: json.dumps(facts)}
    return {out: lambda file: file.write(save(dict(x), metadata))}


def _parquet(out: Path, x: Mapping[str, Tensor], names: list[str], facts: Mapping[str, Any]) -> dict[Path, Content]:
    columns = {name: rows.numpy() for name, rows in x.items()}
    return {out: lambda file: write_table(names, columns, {FACTS: facts}, file)}


def _write(contents: Mapping[Path, Content]) -> None:
    with write_errors("the features", CURE):
        commit_together(contents)


WRITERS: dict[str, Callable[[Path, Mapping[str, Tensor], list[str], Mapping[str, Any]], dict[Path, Content]]] = {
    ".npy": _npy,
    ".safetensors": _safetensors,
    ".parquet": _parquet,
}
