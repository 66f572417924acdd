"""The embed command: features of images, with their paths, as a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Unpack

import numpy as np
from torch import Tensor

from upstep_fast.config.evaluate import EmbedConfig
from upstep_fast.config.files import from_options
from upstep_fast.config.options import EmbedOptions
from upstep_fast.config.signatures import with_keywords
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import ConfigError
from upstep_fast.evaluation import whitening
from upstep_fast.evaluation.features import append_whitened, extract, load_models, unwhitened
from upstep_fast.model import peft_format
from upstep_fast.model.identity import model_identity
from upstep_fast.runtime import distributed
from upstep_fast.runtime.atomic_file import write_atomic
from upstep_fast.runtime.device import resolve


@with_keywords(EmbedConfig)
def embed(
    model: str | Path, data: str | Path | Sequence[str | Path], out: str | Path, **keywords: Unpack[EmbedOptions]
) -> Path:
    """Write the features of every image with its path to `out` and return `out`; keywords: `upstep-fast embed --help`.

    Features of width D give [N, D], with ensemble [N, 2 D]; a whitening makes them three times as wide, or twice for
    models whose features are the mean patch token. Raises UpstepError.
    """
    return run_embed(from_options(EmbedConfig, {"model": model, "data": data, "out": out, **keywords}, "embed"))


def run_embed(config: EmbedConfig) -> Path:
    """Run the embed command, see `embed`. Raises UpstepError."""
    out = Path(config.out)
    _check_files(out, config)
    compute = resolve(config.runtime.device, config.runtime.precision, config.runtime.implementation)
    with distributed.joined(compute.device):
        source, models = open_source(config.data.paths), load_models(config)
        whitens = bool(config.whitening or config.fit_whitening)
        identity = model_identity(models["base"]) if whitens else {}
        fingerprints = _fingerprints(identity["sha256"], config) if whitens else {}
        fitted = whitening.read(config.whitening, fingerprints, identity) if config.whitening else {}
        x, indices = extract(source, models, config, compute, patches=whitens)
        if config.fit_whitening:
            fitted = {name: whitening.fit(x[name]) for name in models}
            if distributed.is_first():
                whitening.write(config.fit_whitening, fitted, fingerprints, identity)
        features = append_whitened(x, fitted) if fitted else unwhitened(x)
        kind = "ensemble" if config.ensemble else "adapted" if config.adapter else "base"
        if distributed.is_first():
            WRITERS[out.suffix](out, features[kind], [source.name(i) for i in indices])
    return out


def _check_files(out: Path, config: EmbedConfig) -> None:
    """Raise ConfigError, before slow work, if `out` or the whitening file cannot be written."""
    if out.suffix not in WRITERS:
        raise ConfigError(f"out: {out.name} must end in {', '.join(WRITERS)}")
    files = {"out": out} | ({"fit_whitening": Path(config.fit_whitening)} if config.fit_whitening else {})
    if len({path.with_suffix("") for path in files.values()}) < len(files):
        raise ConfigError(f"fit_whitening: {config.fit_whitening} and --out {out} need names that differ")
    for field, path in files.items():
        if path.exists() and not config.overwrite:
            raise ConfigError(f"{field}: {path} exists; choose another name or add --overwrite")
        if not path.parent.is_dir():
            raise ConfigError(f"{field}: no folder {path.parent}")


def _fingerprints(base: str, config: EmbedConfig) -> dict[str, str]:
    """Return {"base": ..., "adapted": ...}; the second is of base model and adapter files, not of merged weights."""
    if config.adapter is None:
        return {"base": base}
    return {"base": base, "adapted": f"{base} {peft_format.fingerprint(config.adapter)}"}


def _write_npy(out: Path, x: Tensor, names: list[str]) -> None:
    _write(out, lambda file: np.save(file, x.numpy()))
    _write(out.with_suffix(".txt"), lambda file: file.write("".join(f"{name}\n" for name in names).encode()))


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
    table = pyarrow.table({"path": names, "features": column})
    _write(out, lambda file: pyarrow.parquet.write_table(table, file))


def _write(path: Path, content: Callable[[BinaryIO], object]) -> None:
    try:
        write_atomic(path, content)
    except OSError as error:
        raise ConfigError(f"out: cannot write {path}: {error.strerror}") from error


WRITERS: dict[str, Callable[[Path, Tensor, list[str]], None]] = {
    ".npy": _write_npy,
    ".safetensors": _write_safetensors,
    ".parquet": _write_parquet,
}
