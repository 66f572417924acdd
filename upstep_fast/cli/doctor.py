"""`upstep-fast doctor`: implementations chosen on this machine, self-checks of kernels, speed of image loading."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from upstep_fast.config.tools import DoctorConfig
from upstep_fast.data.loading.ordered_map import ordered_map
from upstep_fast.data.loading.skipped_images import read_image
from upstep_fast.data.sources.source import open_source
from upstep_fast.data.views.make_views import random_views
from upstep_fast.data.views.view_config import ViewConfig
from upstep_fast.engine.fold import unsupported_blocks, unsupported_reason
from upstep_fast.engine.self_check import compare
from upstep_fast.engine.vit import build
from upstep_fast.errors import RunFailedError
from upstep_fast.kernels import _dispatch as dispatch
from upstep_fast.kernels import _native as native
from upstep_fast.kernels._self_check import check_all
from upstep_fast.model import backbone as backbones
from upstep_fast.model import lora
from upstep_fast.runtime import terminal
from upstep_fast.runtime.device import resolve
from upstep_fast.runtime.machine import default_workers, package_version
from upstep_fast.runtime.progress import track

PACKAGES = ("upstep_fast", "torch", "triton", "timm", "peft", "torchvision", "numpy", "safetensors", "pillow")
# as docs/reference.md says it
WITHOUT_ON_MPS = "Triton and CUDA kernels, fp16, fp8, CUDA graphs, torchrun, nvJPEG, --adapter-ema, float64"
SECONDS = 1.0  # for each of the two speeds
IMAGES = 32  # generated, of a common photo's shape
SIZE = (480, 360)


def run(config: DoctorConfig) -> dict[str, Any]:
    """Print the findings and return them. Raises RunFailedError (exit code 1) if a self-check failed."""
    found = examine(config.device)
    if config.model is not None:
        found["model"] = examine_model(config.model, config.arch, config.device)
    if config.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)
    if failed := [check for check in found["checks"] if check["passed"] is False]:
        names = ", ".join(f"{c['op']} {c['implementation']} {c['dtype']}" for c in failed[:5])
        raise RunFailedError(
            f"doctor: {len(failed)} of {len(found['checks'])} self-checks failed ({names}); run with "
            "--implementation reference until the cause is found"
        )
    return found


def examine(device: str = "auto") -> dict[str, Any]:
    """Return the findings, as JSON can hold them. Raises ConfigError for a device that this machine lacks."""
    compute = resolve(device, "auto")
    with _quiet_kernels(), track("doctor: kernels"):
        outcomes, choices = check_all(compute.device)
    checks = [{k: _finite(v) for k, v in dataclasses.asdict(outcome).items()} for outcome in outcomes]
    return {
        "versions": {"python": platform.python_version()} | {name: package_version(name) for name in PACKAGES},
        "machine": _machine(compute.device) | {"precision": compute.precision},
        "native": _native(),
        "asked_for": dispatch.requested(),
        "kernels": [dataclasses.asdict(choice) for choice in choices],
        "checks": checks,
        "data": loading_speed(compute.device),
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
        "ok": all(check["passed"] is not False for check in checks),
    }


@track("doctor: model")
def examine_model(name: str, arch: str | None = None, device: str = "auto") -> dict[str, Any]:
    """Return whether the engine runs the model `name`, and how far it is from the plain model.

    Adapters on q and v are put on it, so that a gradient is compared too. Raises ConfigError as `backbone.load` does.
    """
    compute = resolve(device, "auto")
    backbone = backbones.load(name, arch=arch)
    vit = backbone.vit.to(compute.device)
    lora.inject(vit, lora.LoraSpec(targets=("q", "v")))
    reason, comparison = unsupported_reason(vit), None
    if reason is None:
        comparison = compare(build(vit, compute.dtype or torch.float32))
    assert reason is not None or comparison is not None
    found: dict[str, Any] = {"name": name, "precision": compute.precision}
    if comparison is not None:
        reason = comparison.mismatch
        found |= {key: _finite(value) for key, value in dataclasses.asdict(comparison).items()}
        found["blocks_by_timm"] = {str(index): why for index, why in unsupported_blocks(vit).items()}
    return found | {"runs": "engine" if reason is None else "plain model", "reason": reason}


@track("doctor: speed of image loading")
def loading_speed(device: torch.device, seconds: float = SECONDS) -> dict[str, float]:
    """Return images/s read and decoded from this machine's temporary folder, and images/s made into two views."""
    workers = default_workers()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(IMAGES):
            (Path(folder) / f"{i}.jpg").write_bytes(_photo(i))
        source = open_source(folder)
        images = [read_image(source, i) for i in range(IMAGES)]
        start, count = time.monotonic(), 0
        done = ordered_map(lambda i: read_image(source, i % IMAGES), range(10**9), workers, 4 * workers)
        with contextlib.closing(done):
            for _ in done:
                count += 1
                if (taken := time.monotonic() - start) > seconds:
                    break
    decoded = count / taken
    start, count = time.monotonic(), 0
    while (taken := time.monotonic() - start) < seconds:
        views = random_views(images, ViewConfig(), seed=0, epoch=count, indices=range(IMAGES), device=device)
        views[0, 0, 0, 0, 0].item()  # waits for the device
        count += IMAGES
    return {"threads": workers, "decoded_per_s": decoded, "made_into_two_views_per_s": count / taken}


def show(found: dict[str, Any]) -> None:
    """Print the findings as tables."""
    facts = terminal.Table(title="machine", show_header=False, title_justify="left")
    for name, value in (found["versions"] | found["machine"] | found["native"]).items():
        facts.add_row(name, "not found" if value is None else str(value))
    facts.add_row("free disk here", f"{found['free_disk_bytes'] / 2**30:,.1f} GiB")
    for name, value in found["data"].items():
        facts.add_row(name.replace("_per_s", "/s").replace("_", " "), f"{value:,.0f}")
    terminal.show(facts)
    if "model" in found:
        _show_model(found["model"])
    runs = terminal.Table("op", "device", "runs", "why", title="what runs", title_justify="left")
    for choice in found["kernels"]:
        runs.add_row(choice["op"], choice["device"], choice["implementation"], choice["reason"])
    terminal.show(runs)
    title = "self-checks: error relative to float64"
    checks = terminal.Table("op", "type", "implementation", "forward", "backward", "allowed", "", title=title)
    absent: dict[str, list[str]] = {}
    for check in found["checks"]:
        if check["passed"] is None:
            why = f"{check['implementation']}: {check['note'].rpartition('cannot run: ')[2]}"
            absent.setdefault(why, []).append(check["op"])
            continue
        errors = [_exponent(check[key]) for key in ("forward", "backward", "limit")]
        verdict = "ok" if check["passed"] else f"FAILED {check['note']}"
        checks.add_row(check["op"], check["dtype"], check["implementation"], *errors, verdict)
    terminal.show(checks)
    for why, ops in absent.items():
        terminal.print_line(f"not here: {why} ({', '.join(dict.fromkeys(ops))})")


def _show_model(found: dict[str, Any]) -> None:
    rows = terminal.Table(title="model", show_header=False, title_justify="left")
    rows.add_row(found["name"], f"runs on the {found['runs']}")
    if found["reason"]:
        rows.add_row("why", f"since {found['reason']}")
    for index, reason in found.get("blocks_by_timm", {}).items():
        rows.add_row(f"block {index} runs as it is", f"since it {reason}")
    for name in ("tokens", "features", "features_forward_only", "gradient"):
        if name in found:
            allowed = found["limits"][name == "gradient"]
            rows.add_row(f"{name.replace('_', ' ')}: difference", f"{_exponent(found[name])} (allowed {allowed:g})")
    terminal.show(rows)


def _exponent(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value or "")


@contextlib.contextmanager
def _quiet_kernels() -> Iterator[None]:
    # forcing every implementation in turn would log each change of mind
    logger = logging.getLogger(dispatch.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _machine(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "system": platform.platform(),
        "CPU cores": os.cpu_count(),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "device": str(device),
    }
    if device.type == "mps":
        facts["GPU"] = f"Apple GPU; without it: {WITHOUT_ON_MPS}"
    elif torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device if device.type == "cuda" else 0)
        facts["GPU"] = f"{properties.name}, sm_{properties.major}{properties.minor}"
        facts["GPU memory"] = f"{properties.total_memory / 2**30:.1f} GiB"
        facts["CUDA of torch"] = torch.version.cuda
    else:
        facts["GPU"] = "none that torch can use" + ("" if torch.version.cuda else " (torch was built without CUDA)")
    return facts | {"C++ compiler": shutil.which(os.environ.get("CXX", "c++")), "nvcc": shutil.which("nvcc")}


def _native() -> dict[str, Any]:
    failure = native.load_failure()
    held = "CPU and CUDA ops" if failure is None and native.has_cuda() else "CPU ops"
    facts = {"compiled ops": failure or f"{native.library_folder()}/{native.LIBRARY}: {held}"}
    try:
        built = native.extension().BUILD_INFO
        return facts | {"built with": ", ".join(f"{name} {value or 'none'}" for name, value in built.items())}
    except RuntimeError as error:
        return facts | {"built with": str(error)}


def _photo(seed: int) -> bytes:
    # smooth shapes with some noise, about as large a file as a photo of this size
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        SIZE, Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse, dtype=np.int16) + random.integers(-12, 13, (SIZE[1], SIZE[0], 3), dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def _finite(value: Any) -> Any:
    # JSON has no NaN; an error that is not a number is named
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value
