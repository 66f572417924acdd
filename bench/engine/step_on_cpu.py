"""A step on a CPU, PEFT against the engine, in alternation, by processor time of one thread.

    python bench/engine/step_on_cpu.py OUT.json [--model NAME] [--views 32] [--runs 7]

One process for each setting: fp32 on AVX2, fp32 and bf16 on what the processor has. PEFT runs under autocast, as users
write it, and with all weights and adapters in bf16; the ratio is to the faster of them. `products` are the frozen
matrix products of all blocks alone, as torch multiplies: what no step of all blocks and tokens can go below. The
engine's features are compared with PEFT's before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.cli.benchmark import make_variants, peft_of, task_of
from upstep_fast.config.tools import BenchConfig
from upstep_fast.model import backbone, lora, pooling
from upstep_fast.runtime.device import resolve
from upstep_fast.runtime.machine import processor_name

ASSET = Path(backbone.__file__).parents[1] / "assets" / "base_tiny"
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
SETTINGS: list[tuple[str, dict[str, str]]] = [("fp32", AVX2), ("fp32", {}), ("bf16", {})]
CLOSE = {"fp32": 1e-4, "bf16": 5e-2}  # of the features' norm


def main() -> None:
    """Measure every setting in a process of its own and write the rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=f"local-dir:{ASSET}")
    parser.add_argument("--views", type=int, default=32)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--precision", help="measure this one here, and print the rows")
    options = parser.parse_args()
    if options.precision:
        print(json.dumps(measured(options.model, options.views, options.precision, options.runs)))
        return
    rows = []
    for precision, extra in SETTINGS:
        environment = os.environ | extra | {"OMP_NUM_THREADS": "1"}
        line = [sys.executable, *sys.argv, "--precision", precision]
        done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        rows += json.loads(done.stdout.splitlines()[-1])
        print(*rows[-2:], sep="\n", flush=True)
    card = {"processor": processor_name(), "torch": torch.__version__, "threads": 1, "runs": options.runs}
    options.out.write_text(json.dumps(card | {"rows": rows}, indent=1) + "\n")


def measured(model: str, views: int, precision: str, runs: int) -> list[dict[str, Any]]:
    """Return a row for forward with backward and one for forward alone, in processor ms. Raises SystemExit."""
    torch.set_num_threads(1)
    compute = resolve("cpu", precision)
    found = backbone.load(model)
    images = torch.randn(views, 3, *found.img_size)
    plain = copy.deepcopy(found.vit)
    variants, _ = make_variants(found, images, BenchConfig(model=model, lora_r=8), compute)
    forms = {"peft": variants["peft"], "engine": variants["engine"]}
    if precision == "bf16":
        forms["peft, all in bf16"] = peft_in_bf16(plain, found.vit)
    with torch.no_grad():
        expected, *others = (features(images).float() for features, _ in forms.values())
    for name, other in zip(list(forms)[1:], others, strict=True):
        if (distance := float((other - expected).norm() / expected.norm())) > CLOSE[precision]:
            raise SystemExit(f"{name} differs from PEFT by {distance:.1e}: not timed")
    dtype, rows = compute.dtype or torch.float32, []
    for kind in ("backward", "forward"):
        tasks = {name: task_of(kind, form) for name, form in forms.items()}
        tasks["products"] = products(found.vit, views, dtype, kind == "backward")
        milliseconds = in_turns(tasks, images, runs)
        medians = {name: statistics.median(values) for name, values in milliseconds.items()}
        peft = min(value for name, value in medians.items() if name.startswith("peft"))
        row = {"model": Path(model).name, "views": views, "precision": precision, "kind": kind}
        row |= {"capability": torch.backends.cpu.get_cpu_capability(), "ms": medians}
        row |= {"spread": {name: [min(values), max(values)] for name, values in milliseconds.items()}}
        rows.append(
            row
            | {"peft / engine": peft / medians["engine"], "engine / products": medians["engine"] / medians["products"]}
        )
    return rows


def peft_in_bf16(plain: Any, vit: Any) -> tuple[Callable[[Tensor], Tensor], list[torch.nn.Parameter]]:
    """Return PEFT's model of the adapters of `vit`, with weights and adapters in bf16, and the adapters' parameters."""
    lora.call_qkv(plain)
    adapters = {name: m for name, m in vit.named_modules() if isinstance(m, lora.LoraLinear)}
    model, parameters = peft_of(plain, adapters)
    model.to(torch.bfloat16)
    return lambda x: pooling.features(model, x.bfloat16()), parameters


def products(vit: Any, views: int, dtype: torch.dtype, backward: bool) -> Callable[[Tensor], None]:
    """Return the frozen products of all blocks on all tokens: x W^T + c, and dy W with `backward`."""
    linears = [m for block in vit.blocks for m in block.modules() if type(m) is torch.nn.Linear]
    weights = [(m.weight.detach().to(dtype), None if m.bias is None else m.bias.detach().to(dtype)) for m in linears]
    tokens = views * vit.pos_embed.shape[1]
    inputs = {
        w.shape: (torch.randn(tokens, w.shape[1]).to(dtype), torch.randn(tokens, w.shape[0]).to(dtype))
        for w, _ in weights
    }

    def run(_: Tensor) -> None:
        for weight, bias in weights:
            x, dy = inputs[weight.shape]
            F.linear(x, weight, bias)
            if backward:
                dy @ weight

    return run


def in_turns(tasks: dict[str, Callable[[Tensor], Any]], images: Tensor, runs: int) -> dict[str, list[float]]:
    """Return the processor ms of each run of each task; the first two of each are left out."""
    milliseconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(runs + 2):
        for name, task in tasks.items():
            start = time.process_time()
            task(images)
            milliseconds[name].append(1e3 * (time.process_time() - start))
    return {name: values[2:] for name, values in milliseconds.items()}


if __name__ == "__main__":
    main()
