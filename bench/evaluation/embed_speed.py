"""Images a second of `embed` on a CPU, beside what else turns a folder of images into features.

    python bench/evaluation/embed_speed.py bench/results/embed_speed_cpu2.json [--rounds 5] [--only auto]

Each job reads the JPEGs or PNGs of a folder, decodes, resizes, runs the model and gathers unit features:

    ours          upstep_fast.embed
    timm          timm.create_model, its loader (processes) and its evaluation transform, inference_mode
    transformers  pipeline("image-feature-extraction"), batched, on the model as `export --format hf` writes it
    onnxruntime   the model as `export --format onnx` writes it, on batches that our threads decode; always fp32
    openvino      the same

auto: bf16 where the CPU multiplies it natively, as ours chooses; fp32: all in fp32. Every job runs in a process of its
own, one at a time, in an order that rotates from round to round, with as many workers or threads as there are cores.
It runs on a few images twice, of which the first warms up, then on all. The rate is that of the difference of the last
two, so that loading the model is left out. cpu_ms: processor time an image, of all threads and processes, which means
something on a busy machine too.
Features of the first round are compared with timm's of the same precision first: cosine above 0.999.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "upstep_fast" / "assets"
WORKERS = os.cpu_count() or 1
FEW = 32  # images of the first job
BATCH = {"base_tiny": 64, "vit_small_patch16_224": 32}
COUNT = {"base_tiny": 1024, "vit_small_patch16_224": 160}
Job = Callable[[Path, Path, int, str], np.ndarray]  # work folder, images, batch size, precision -> [N, D]


def ours(work: Path, images: Path, batch: int, precision: str) -> np.ndarray:
    import upstep_fast

    out = work / f"ours{os.getpid()}.npy"
    options = {"batch_size": batch, "precision": precision, "device": "cpu", "overwrite": True}
    upstep_fast.embed(f"local-dir:{work / 'timm'}", str(images), out, **options)
    return np.load(out)


def _bf16(precision: str) -> bool:
    return precision == "auto" and torch.cpu._is_avx512_bf16_supported()


def with_timm(work: Path, images: Path, batch: int, precision: str) -> np.ndarray:
    import timm

    dtype = torch.bfloat16 if _bf16(precision) else torch.float32
    model = timm.create_model(f"local-dir:{work / 'timm'}", pretrained=True, num_classes=0).eval().to(dtype)
    how = timm.data.resolve_model_data_config(model)
    data = timm.data.create_dataset("", root=str(images))
    names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    options = {
        "is_training": False,
        "use_prefetcher": False,
        "num_workers": WORKERS,
        **{name: how[name] for name in names},
    }
    rows = []
    with torch.inference_mode():
        for x, _ in timm.data.create_loader(data, batch_size=batch, **options):
            rows.append(F.normalize(model(x.to(dtype)).float(), dim=-1))
    return torch.cat(rows).numpy()


def with_transformers(work: Path, images: Path, batch: int, precision: str) -> np.ndarray:
    import transformers

    dtype = torch.bfloat16 if _bf16(precision) else torch.float32
    options = {"device": "cpu", "dtype": dtype, "batch_size": batch, "num_workers": WORKERS}
    run = transformers.pipeline("image-feature-extraction", model=str(work / "hf"), **options)
    paths = [str(path) for path in sorted(images.rglob("*.*"))]
    mean = json.loads((work / "timm/config.json").read_text())["global_pool"] == "avg"
    with torch.inference_mode():
        tokens = [t[0] for t in run(paths, return_tensors=True)]
    return F.normalize(torch.stack([t[1:].mean(0) if mean else t[0] for t in tokens]).float(), dim=-1).numpy()


def _with_runtime(work: Path, images: Path, batch: int, run: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    from upstep_fast.data.loading.loader import load_images
    from upstep_fast.data.sources.source import open_source
    from upstep_fast.model import backbone

    base = backbone.load(f"local-dir:{work / 'timm'}")
    batches = load_images(open_source(images), **base.eval_transform_args, batch_size=batch, num_workers=WORKERS)
    rows = [torch.from_numpy(run(base.normalized(x).numpy())) for _, x in batches]
    return F.normalize(torch.cat(rows), dim=-1).numpy()


def with_onnxruntime(work: Path, images: Path, batch: int, precision: str) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(work / "onnx/model.onnx"), providers=["CPUExecutionProvider"])
    return _with_runtime(work, images, batch, lambda x: session.run(None, {"images": x})[0])


def with_openvino(work: Path, images: Path, batch: int, precision: str) -> np.ndarray:
    import openvino

    hint = {"INFERENCE_PRECISION_HINT": "bf16" if _bf16(precision) else "f32"}
    model = openvino.Core().compile_model(str(work / "onnx/model.onnx"), "CPU", hint)
    return _with_runtime(work, images, batch, lambda x: model(x)[0].copy())


JOBS: dict[str, Job] = {
    "ours": ours,
    "timm": with_timm,
    "transformers": with_transformers,
    "onnxruntime": with_onnxruntime,
    "openvino": with_openvino,
}


def child(job: str, work: Path, batch: int, precision: str) -> None:
    """Run a job on few images and on all; print the difference of wall and processor time, and keep the features."""
    spent = []
    for part in ("few", "few", "all"):  # the first imports and warms up
        cpu, wall = _cpu(), time.perf_counter()
        x = JOBS[job](work, work / part, batch, precision)
        spent.append((time.perf_counter() - wall, _cpu() - cpu, len(x)))
    np.save(work / f"{job}-{precision}.npy", x)
    _, (wall, cpu, few), (all_wall, all_cpu, count) = spent
    print(json.dumps({"wall": all_wall - wall, "cpu": all_cpu - cpu, "images": count - few, "few_s": wall}))


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def prepare(work: Path, model: str, images: int) -> None:
    """Write the model in the forms that the jobs read, and the images."""
    import timm

    from upstep_fast.model.export.export import export

    work.mkdir()
    if model == "base_tiny":
        (work / "timm").symlink_to(ASSETS / "base_tiny")
    else:
        torch.manual_seed(0)
        timm.models.save_for_hf(
            timm.create_model(model, num_classes=0).eval(), str(work / "timm"), safe_serialization=True
        )
    for form in ("hf", "onnx"):
        export(f"local-dir:{work / 'timm'}", work / form, format=form)
    tiles = photographs()
    for part, count in (("few", FEW), ("all", images)):
        (work / part / "images").mkdir(parents=True)
        for i in range(count):
            path = work / part / "images" / f"{i:05d}"
            if model == "base_tiny":
                tiles[i % len(tiles)].save(path.with_suffix(".png"))
            else:
                mosaic(tiles, i).save(path.with_suffix(".jpg"), quality=90)


def photographs() -> list[Image.Image]:
    """Return 1,024 of the photographs of hand signs that the package includes, 64 x 64 pixels."""
    with tarfile.open(ASSETS / "sign_digits_64.tar") as tar:
        members = [m for m in tar if m.isfile() and not m.name.endswith((".csv", ".txt", ".json"))][:1024]
        return [Image.open(tar.extractfile(m)).convert("RGB") for m in members]  # type: ignore[arg-type]


def mosaic(tiles: list[Image.Image], seed: int) -> Image.Image:
    """Return 12 photographs as one of 400 x 300 pixels."""
    whole = Image.new("RGB", (400, 300))
    for i, j in enumerate(np.random.default_rng(seed).integers(0, len(tiles), 12)):
        whole.paste(tiles[j].resize((100, 100), Image.Resampling.BICUBIC), (100 * (i % 4), 100 * (i // 4)))
    return whole


def check(work: Path, precision: str) -> dict[str, float]:
    """Return the smallest cosine of an image's features with timm's, by job. Raises SystemExit below 0.999."""
    features = {job: np.load(work / f"{job}-{precision}.npy").astype(np.float64) for job in JOBS}
    cosines = {job: float((x * features["timm"]).sum(1).min()) for job, x in features.items()}
    if min(cosines.values()) < 0.999:
        sys.exit(f"features differ from timm's: {cosines}")
    return cosines


def measure(work: Path, model: str, precision: str, rounds: int) -> dict[str, Any]:
    """Return rates and processor times of all jobs."""
    found: dict[str, list[dict[str, float]]] = {job: [] for job in JOBS}
    names = list(JOBS)
    for turn in range(rounds):
        for job in names[turn % len(names) :] + names[: turn % len(names)]:
            command = [sys.executable, __file__, "--child", job, str(work), str(BATCH[model]), precision]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[job].append(json.loads(done.stdout.splitlines()[-1]))
            print(model, precision, turn, job, found[job][-1], f"load {os.getloadavg()[0]:.1f}", file=sys.stderr)
        if turn == 0:
            cosines = check(work, precision)
    return {job: _summary(runs) | {"cosine": round(cosines[job], 6)} for job, runs in found.items()}


def _summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    # beside other programs the difference of two times may be negative: such a round says nothing of the rate
    rates = sorted(run["images"] / run["wall"] for run in runs if run["wall"] > 0)
    cpu = sorted(1000 * run["cpu"] / run["images"] for run in runs)
    return {
        "images_per_s": round(statistics.median(rates), 2) if rates else None,
        "low": round(rates[0], 2) if rates else None,
        "high": round(rates[-1], 2) if rates else None,
        "cpu_ms": round(statistics.median(cpu), 2),
        "cpu_ms_low": round(cpu[0], 2),
        "cpu_ms_high": round(cpu[-1], 2),
    }


def main() -> None:
    from upstep_fast.runtime.machine import device_card, package_version

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["auto", "fp32"])
    parser.add_argument("--model", choices=list(BATCH), action="append", help="default: both")
    parser.add_argument("--fewer", type=int, default=1, help="divide the number of images, for a busy machine")
    args = parser.parse_args()
    counts = {model: COUNT[model] // args.fewer for model in args.model or BATCH}
    packages = ("timm", "transformers", "onnxruntime", "openvino", "torchvision", "pillow")
    record: dict[str, Any] = {
        "date": str(datetime.date.today()),
        "command": "python bench/evaluation/embed_speed.py " + " ".join(sys.argv[1:]),
        "machine": device_card(torch.device("cpu")) | {"cores": WORKERS, "load_before": round(os.getloadavg()[0], 1)},
        "packages": {name: package_version(name) for name in packages},
        "images": counts,
        "batch_size": BATCH,
        "results": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for model, count in counts.items():
            prepare(Path(folder) / model, model, count)
            for precision in (args.only,) if args.only else ("auto", "fp32"):
                record["results"][f"{model} {precision}"] = measure(Path(folder) / model, model, precision, args.rounds)
                record["machine"]["load_after"] = round(os.getloadavg()[0], 1)
                args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    else:
        main()
