"""The engine against PEFT and the eager reference over model, batch, image side, rank and skip rate; table and plot.

    python bench/engine/sweep.py [--runs 5] [--only batch rank] --json bench/results/sweep_cpu2.json
    python bench/engine/sweep.py --read bench/results/sweep_cpu2.json --page bench/results/sweep.md   # the page alone

One thing changes at a time from a base point; at every point variants alternate and ratios are formed within it. On a
CPU the models are small. Utilization: the model's own FLOPs over those of a large product, measured in the same run; a
block's, of M tokens in images of T:

    forward = 2 M sum |W| + 4 M T D;    backward = 2 M sum |W| + 10 M T D
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import nn

from upstep_fast.cli import benchmark
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.flat import from_flat
from upstep_fast.config.presets import PRESETS
from upstep_fast.config.tools import BenchConfig
from upstep_fast.data.views.types import Views
from upstep_fast.model import backbone
from upstep_fast.runtime import machine, timing
from upstep_fast.runtime.device import Compute, resolve
from upstep_fast.runtime.duration import product_rate
from upstep_fast.train import loop as trainer
from upstep_fast.train.state import fresh_state
from upstep_fast.train.step import flush, step

Row = dict[str, Any]
BEGIN, END = "<!-- sweep: written by bench/engine/sweep.py -->", "<!-- end of sweep -->"
PLOT = Path("images") / "sweep.svg"
BASE = {
    "cuda": {"model": "vit_large_patch14_dinov2", "batch_size": 128, "img_size": 224, "lora_r": 16},
    "cpu": {"model": "vit_tiny_patch16_224", "batch_size": 8, "img_size": 224, "lora_r": 16},
}
MODELS = {
    "cuda": {"vit_base_patch16_224": 256, "vit_large_patch14_dinov2": 128, "vit_giant_patch14_dinov2": 32},
    "cpu": {"vit_tiny_patch16_224": 8, "vit_small_patch16_224": 8},
}
POINTS = {
    "cuda": {"batch": [8, 32, 128, 256], "side": [98, 224, 336, 518], "rank": [4, 16, 64, 128]},
    "cpu": {"batch": [1, 4, 16], "side": [96, 224, 320], "rank": [4, 16, 64]},
}
FIELD = {"batch": "batch_size", "side": "img_size", "rank": "lora_r"}
SKIPPED = [0.0, 0.25, 0.5, 0.75]
STEPS = 4  # timed at once, so that each share of SKIPPED comes out whole


def points(kind: str) -> list[tuple[str, Any, dict[str, Any]]]:
    """Return the points of a sweep: (name of the swept option, its value, options of the point)."""
    base = BASE[kind]
    found = [("model", model, base | {"model": model, "batch_size": n}) for model, n in MODELS[kind].items()]
    for what, values in POINTS[kind].items():
        for value in values:
            options = base | {FIELD[what]: value}
            if what == "side":  # as many tokens in all, or a large image would not fit
                options["batch_size"] = max(1, round(base["batch_size"] * min(1, (base["img_size"] / value) ** 2)))
            found.append((what, value, options))
    return found + [("skipped", share, base) for share in SKIPPED]


def flops(vit: Any, views: int) -> dict[str, float]:
    """Of the model itself, adapters left out; in backward the weights take no gradient."""
    tokens = vit.patch_embed.num_patches + vit.num_prefix_tokens
    weights = sum(m.weight.numel() for m in vit.blocks.modules() if isinstance(m, nn.Linear))
    products, attention = 2.0 * views * tokens * weights, 4.0 * views * tokens**2 * vit.embed_dim * len(vit.blocks)
    forward = products + attention
    return {"forward": forward, "backward": forward + products + 2.5 * attention}


def backbone_rows(options: dict[str, Any], compute: Compute, runs: int, with_compile: bool) -> list[Row]:
    """Forward, and forward with backward, of every variant."""
    config = BenchConfig(**options, runs=runs, precision=compute.precision, compile=with_compile)
    result = benchmark.run(config)
    with torch.device("meta"):
        vit = backbone.load(options["model"], img_size=options["img_size"], pretrained=False).vit
    work = flops(vit, options["batch_size"])
    return [row | {"kind": kind, "flops": work[kind]} for kind in ("backward", "forward") for row in result[kind]]


def step_rows(options: dict[str, Any], skipped: float, compute: Compute, runs: int) -> list[Row]:
    """Whole steps of UpStep, views given: embeddings, gate, loss, backward, update; both sides open the same steps."""
    tasks = {}
    for name, implementation in (("reference", "reference"), ("engine", "auto")):
        config = from_flat(
            AdaptConfig,
            **PRESETS["upstep"] | options | {"batch_size": options["batch_size"] // 2},
            data=("none",),
            out="none",
            steps=10**6,
            gate="alternate",
            gate_rate=1 - skipped,
            max_skips=STEPS,
            implementation=implementation,
        )
        loaded = backbone.load(options["model"], img_size=options["img_size"], pretrained=False)
        state = fresh_state(config, compute, loaded)
        views = Views.of(torch.randn(2, config.optimization.batch_size, 3, *loaded.img_size, device=compute.device))
        tasks[name] = partial(_steps, state, views, trainer.gate_rule(config), config, compute)
    times = timing.alternate(tasks, compute.device, runs=runs)
    rows = []
    for name, found in times.items():
        low, median, high = quantiles([t / STEPS for t in found], n=4)
        peak = machine.extra_peak_bytes(tasks[name], compute.device)
        rows.append(
            {"name": name, "kind": "step", "median_ms": median, "low_ms": low, "high_ms": high, "peak_bytes": peak}
        )
    return rows


def _steps(state: Any, views: Views, rule: Any, config: AdaptConfig, compute: Compute) -> None:
    for _ in range(STEPS):
        step(state, views, rule, config, compute)
    flush(state)


def table(rows: list[Row]) -> str:
    """One line a point and half: milliseconds, and the engine's ratio to each."""
    lines = ["| | | half | PEFT, ms | reference, ms | engine, ms | over PEFT | over the reference | of the ceiling |"]
    lines += ["|---|---|---|--:|--:|--:|--:|--:|--:|"]
    groups: dict[tuple[str, Any, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["changes"], row["value"], row["kind"]), {})[row["name"]] = row
    for (what, value, kind), by in groups.items():
        ours = by["engine"]
        cells = [
            f"{by[n]['median_ms']:.0f} ({by[n]['low_ms']:.0f}..{by[n]['high_ms']:.0f})" if n in by else ""
            for n in ("peft", "reference", "engine")
        ]
        cells += [f"{by[n]['median_ms'] / ours['median_ms']:.2f}x" if n in by else "" for n in ("peft", "reference")]
        cells.append(f"{100 * ours['utilization']:.0f} %" if "utilization" in ours else "")
        half = {"backward": "forward and backward", "forward": "forward", "step": "whole step"}[kind]
        shown = f"{100 * value:.0f} %" if what == "skipped" else value
        lines.append(f"| {what} | {shown} | {half} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[Row]) -> Any:
    """Plot the engine's speedup over the eager reference, one panel for each swept option."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.6), layout="constrained")
    for axes, what in zip(figure.subplots(1, 4, sharey=True), ("batch", "side", "rank", "skipped"), strict=True):
        for kind, label in (("backward", "forward and backward"), ("forward", "forward"), ("step", "whole step")):
            own = {(r["value"], r["name"]): r["median_ms"] for r in rows if r["changes"] == what and r["kind"] == kind}
            values = sorted({value for value, _ in own})
            if values:
                ratios = [own[value, "reference"] / own[value, "engine"] for value in values]
                axes.plot(range(len(values)), ratios, "o-", label=label)
                axes.set_xticks(
                    range(len(values)), [f"{100 * v:.0f} %" if what == "skipped" else str(v) for v in values]
                )
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.set(xlabel={"side": "image side", "skipped": "steps skipped"}.get(what, what))
        axes.legend(fontsize=6)
    figure.axes[0].set_ylabel("times the eager reference")
    return figure


def write_page(page: Path, result: dict[str, Any], source: Path) -> None:
    """Write the table and the plot between the page's markers."""
    before, rest = page.read_text().split(BEGIN)
    card = result["device"]
    where = card.get("gpu") or f"{card['processor']}, {card['threads']} threads"
    base = ", ".join(f"{name} {value}" for name, value in result["base"].items())
    ceiling = (
        f"ceiling {result['ceiling'] / 1e12:.2f} TFLOP/s"
        if result["ceiling"] < 1e13
        else f"{result['ceiling'] / 1e12:.0f}"
    )
    head = f"`{source}`: {where}, torch {card['torch']}, {result['precision']}, {ceiling}. Base point: {base}."
    (page.parent / PLOT).parent.mkdir(exist_ok=True)
    draw(result["rows"]).savefig(page.parent / PLOT, metadata={"Date": None})
    body = f"{head}\n\n{table(result['rows'])}\n\n![the engine over the eager reference]({PLOT})\n"
    page.write_text(before + BEGIN + "\n" + body + END + rest.split(END)[1])


def main() -> None:
    """Measures, or reads what was measured; writes JSON and page."""
    # lizard forgives: the arguments, then the measurement in its order
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=["model", "batch", "side", "rank", "skipped"])
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--read", type=Path)
    parser.add_argument("--page", type=Path)
    args = parser.parse_args()
    if args.read:
        result = json.loads(args.read.read_text())
    else:
        compute = resolve("auto", args.precision)
        kind, ceiling = compute.device.type, product_rate(compute)
        rows = []
        for what, value, options in points(kind):
            if args.only and what not in args.only:
                continue
            if what == "skipped":
                found = step_rows(options, value, compute, args.runs)
            else:
                found = backbone_rows(options, compute, args.runs, with_compile=kind == "cuda" and what == "model")
            for row in found:
                if "flops" in row:
                    row["utilization"] = row["flops"] / (row["median_ms"] / 1e3) / ceiling
                rows.append({"changes": what, "value": value, **row})
            print(
                what, value, {r["name"]: round(r["median_ms"], 1) for r in found if r["kind"] != "forward"}, flush=True
            )
        result = {
            "device": machine.device_card(compute.device),
            "command": " ".join(sys.argv),
            "precision": compute.precision,
            "ceiling": ceiling,
            "base": BASE[kind],
            "rows": rows,
        }
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.page:
        write_page(args.page, result, args.read or args.json)


if __name__ == "__main__":
    main()
