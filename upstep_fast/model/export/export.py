"""Exports a model with its adapter to other tools' formats; each export is read back by its tool and compared.

    difference = max |f' - f| / max(1, max |f|)

f are the features of the model with LoraLinear modules, f' those of the exported files in the tool that reads them,
both in fp32. If the difference is above 1e-4, nothing is written. Before, f is compared in the same way with the
features that PEFT computes with the adapter on the base model, where PEFT is installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from upstep_fast.config.adapter_folder import reading_flags, with_adapter
from upstep_fast.config.base import DataConfig, reading_of
from upstep_fast.config.flat import from_flat
from upstep_fast.config.reading import AS_STORED, READING
from upstep_fast.config.tools import ExportConfig
from upstep_fast.data.loading.loader import load_images
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import CheckFailedError, ConfigError, RunFailedError, UpstepError, first_line
from upstep_fast.input_files import read_bytes
from upstep_fast.model import adapter_base, lora, model_card, peft_format
from upstep_fast.model import backbone as backbones
from upstep_fast.model.backbone import Backbone
from upstep_fast.model.export.peft_check import features_by_peft
from upstep_fast.model.export.writers import WRITERS, Job, Written
from upstep_fast.model.pooling import features
from upstep_fast.runtime.atomic_file import probe, temporary_of
from upstep_fast.runtime.commit import replace_folder, settle_folder
from upstep_fast.runtime.progress import track

BOUND = 1e-4
IMAGES = 16  # number of the user's images in the comparison
PHOTOS, FEW = "sign_digits_64.tar", 4  # images of the package, used without --data, and their number
MARK = "exported by upstep-fast"  # in the model card; only a folder with it is replaced
LIBRARIES = {"timm": "timm", "hf": "transformers", "peft": "peft"}  # library_name of the hub
MAX_CARD_BYTES = 1 << 20


@dataclass(frozen=True)
class Exported:
    """An exported folder, and its difference from the original model."""

    folder: Path
    difference: float
    images: str  # description of the compared images


def export(model: str, out: str | Path, *, adapter: str | Path | None = None, **options: Any) -> Exported:
    """Write `model` with the adapter in folder `adapter` to the new folder `out`; keywords are ExportConfig's."""
    adapter = None if adapter is None else str(adapter)
    flags = with_adapter({"model": model, "out": str(out), "adapter": adapter, **options}, ExportConfig)
    return run(from_flat(ExportConfig, **flags))


@track("export")
@torch.no_grad()
def run(config: ExportConfig) -> Exported:
    """Export as `config` says.

    Raises ConfigError for a model that the format cannot hold, CheckFailedError if its features differ, and
    RunFailedError if the folder cannot be written.
    """
    out = Path(os.path.realpath(config.out))  # of a link, what it leads to; of a loop, itself
    _check(config, out)
    base = backbones.load_from(config.model)
    images, images_text = _images(config, base)
    base_record, adapters = adapter_base.record(base.vit), {}
    if config.adapter is not None:
        unadapted = base.copy().vit
        adapters = peft_format.attach(base.vit, config.adapter, model=config.model.name, any_base=config.any_base)
    expected = features(base.vit, images)
    if not expected.isfinite().all():
        adapted = "" if config.adapter is None else f" with the adapter {config.adapter}"
        raise ConfigError(f"model: {config.model.name}{adapted} gives features that are not finite; check its weights")
    if config.adapter is not None:
        _check_reading(expected, features_by_peft(unadapted, config.adapter, images), config.adapter)
    if config.format != "peft":
        lora.merge(base.vit)
    with _replacing(out) as folder:
        written = WRITERS[config.format](Job(config, base, base_record, adapters, folder))
        difference = _difference(written.measure(images), expected)
        if not difference <= BOUND:
            raise CheckFailedError(
                f"format: features in {written.tool} differ by {difference:.1e} on {images_text}, "
                f"more than {BOUND:.0e}; "
                "nothing was written; this format cannot hold this model, try another"
            )
        card, base_sha256 = folder / model_card.NAME, json.loads(base_record)["sha256"]
        text = _card(config, base, base_sha256, written, difference, images_text)
        library, tags = LIBRARIES.get(config.format), ("lora",) if config.format == "peft" else ()
        card.write_text(model_card.with_front_matter(text, base_model=base.name, library=library, tags=tags))
        for path in folder.iterdir():  # safetensors writes files that only their owner may read
            path.chmod(card.stat().st_mode)
    return Exported(Path(config.out), difference, images_text)


def _difference(measured: Tensor, expected: Tensor) -> float:
    return ((measured - expected).abs().max() / expected.abs().max().clamp_min(1)).item()


def _check_reading(expected: Tensor, by_peft: Tensor | None, adapter: str) -> None:
    """Raise CheckFailedError if PEFT reads the adapter in another way than this package. by_peft: its features."""
    if by_peft is not None and not (difference := _difference(by_peft, expected)) <= BOUND:
        raise CheckFailedError(
            f"adapter: features with {adapter} in PEFT differ by {difference:.1e} from those here, more than "
            f"{BOUND:.0e}; nothing was written; merge the adapter with PEFT (merge_and_unload), and report this"
        )


def _check(config: ExportConfig, out: Path) -> None:
    if config.format == "peft" and config.adapter is None:
        raise ConfigError("adapter: --format peft writes an adapter; give one with --adapter")
    if not out.parent.is_dir():
        raise ConfigError(f"out: no folder {out.parent}")
    try:
        settle_folder(out)
        entries = sorted(out.iterdir()) if out.exists() else []
    except NotADirectoryError as error:
        raise ConfigError(f"out: {out} is a file; give a folder") from error
    except OSError as error:
        raise ConfigError(f"out: cannot read {out}: {error.strerror or error}; choose another folder") from error
    if entries:
        if not config.overwrite:
            raise ConfigError(f"out: {out} is not empty; choose another folder or add --overwrite")
        if not _is_export(out / "README.md"):
            raise ConfigError(f"out: {out} holds no export of upstep-fast, so --overwrite does not replace it")
    try:
        probe(out.parent)
    except OSError as error:
        raise ConfigError(f"out: cannot write to {out.parent}: {error.strerror or error}; choose another") from error


def _is_export(card: Path) -> bool:
    try:
        return MARK in read_bytes(card, "out", MAX_CARD_BYTES).decode(errors="replace")
    except ConfigError:
        return False


@contextlib.contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out`; put it in the place of `out` on success, remove it on an error."""
    temporary = temporary_of(out)
    try:
        temporary.mkdir()
        yield temporary
        replace_folder(temporary, out)
    except Exception as error:
        if isinstance(error, UpstepError) or (reason := _disk_reason(error)) is None:
            raise
        raise RunFailedError(f"out: cannot write {out}: {reason}; make room or give another --out") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _disk_reason(error: BaseException | None) -> str | None:
    """Return why the disk refused a write, if that is what an exporter's error comes from."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or first_line(error)
        if isinstance(error, SafetensorError) and "os error" in str(error):
            return first_line(error)
        error = error.__cause__ or error.__context__
    return None


def _images(config: ExportConfig, base: Backbone) -> tuple[Tensor, str]:
    """Return normalized images for the comparison, and their description."""
    channels = base.vit.patch_embed.proj.in_channels
    data, count, stored = config.data, IMAGES, channels
    if not data:
        data, count, stored = (str(files("upstep_fast") / "assets" / PHOTOS),), FEW, 3
    reading = reading_of(DataConfig((), **_reading(config))) if config.data else AS_STORED
    source = open_source(data, reading=reading)
    batches = load_images(
        source,
        range(min(count, len(source))),
        **base.eval_transform_args | {"channels": stored},
        max_bad_fraction=1.0,
    )
    pixels = torch.cat([images for _, images in batches] or [torch.empty(0)])
    if not len(pixels):
        raise ConfigError(f"data: none of the first {count} images in {', '.join(data)} can be read")
    images_text = f"{len(pixels)} images of {', '.join(data)}"
    if not config.data:  # channels repeat red, green and blue, as timm repeats the weights
        pixels = pixels[:, torch.arange(channels) % 3]
        images_text = f"{len(pixels)} of upstep-fast's own photographs ({PHOTOS})"
    return base.normalized(pixels), images_text


def _reading(config: ExportConfig) -> dict[str, Any]:
    """Return how the adapter's images were read, by flag."""
    return {} if config.adapter is None else reading_flags(Path(config.adapter))


def _reading_rows(config: ExportConfig) -> str:
    """Return the rows of the card's table on how images are read; "" without an adapter."""
    if not (reading := _reading(config)):
        return ""
    how = reading.get("intensity", "auto") + (f", bands {reading['bands']}" if "bands" in reading else "")
    parts = " ".join(f"--{name} {reading[name]}" for name in READING[2:] if name in reading)
    rows = f"| values of more than 8 bits | brightness by `--intensity {how}` |\n"
    return rows + (f"| parts of files | `{parts}` |\n" if parts else "")


def _card(
    config: ExportConfig, base: Backbone, base_sha256: str, written: Written, difference: float, images_text: str
) -> str:
    def numbers(values: tuple[float, ...]) -> str:
        return ", ".join(f"{value:g}" for value in values)

    measured = (
        f"{difference:.1e}, measured in {written.tool} on {images_text}, fp32, as a share of the largest (at least 1)"
    )

    adapter = "none"
    if config.adapter is not None:
        adapter = f"`{config.adapter}`, SHA-256 of its files `{peft_format.fingerprint(config.adapter)}`"
    vit: Any = base.vit
    license_name = vit.pretrained_cfg.get("license")
    channels = vit.patch_embed.proj.in_channels
    return f"""\
# {Path(config.out).name}

{base.arch} with width {base.width}, {MARK} in the format of {config.format}.

| | |
| --- | --- |
| base model | `{config.model.name}`, SHA-256 of its blocks `{base_sha256}` |
| adapter | {adapter} |
| input | {channels} x {base.img_size[0]} x {base.img_size[1]}, {base.interpolation}, crop {base.crop_pct:g} |
| mean | {numbers(base.mean)} |
| standard deviation | {numbers(base.std)} |
{_reading_rows(config)}| largest difference of a feature | {measured} |

```python
{written.usage.replace("FOLDER", config.out)}
```

The terms of the base model{f" ({license_name})" if license_name else ""} apply to these weights.
"""
