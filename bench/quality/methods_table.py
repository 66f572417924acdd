"""Top-1 of linear, LoRA, LoSA and full fine-tuning on labeled sets, from the base model and from an adapted one.

    python bench/quality/methods_table.py run [--results FILE] [--adapted] [--sets NAME ...] [--methods ...]
    python bench/quality/methods_table.py table [--results FILE]

Each run is `upstep-fast finetune` in a process of its own and adds one JSON line; runs that are in the file already are
not repeated. Of a method's learning rates the table takes the one with the best held-out accuracy, a split of train/;
test/ is measured by every run and chooses nothing. --adapted makes an adapter first, with the recipe of the demo.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from upstep_fast.runtime.device import resolve
from upstep_fast.runtime.machine import device_card

SHARED = Path(os.environ.get("UPSTEP_FAST_SHARED", Path(__file__).resolve().parents[3] / "shared" / "data"))
SETS = ("sign_digits_64", "pacs_cartoon_64", "pacs_sketch_64", "gtsrb_32", "omniglot_64")
STARTS = ("base", "adapted")
CACHED = ("--preset-views", "none", "--cache", "memory")
# method: learning rates, other flags. All see the same images: no random views.
METHODS: dict[str, tuple[tuple[float, ...], tuple[str, ...]]] = {
    "linear": ((1e-2, 3e-2), (*CACHED, "--epochs", "40")),
    "lora": ((6e-3, 2e-3), ("--preset-views", "none", "--epochs", "8", "--lora-r", "8")),
    "losa": ((3e-3, 6e-3), (*CACHED, "--epochs", "16")),
    "full": ((3e-4, 1e-3), ("--preset-views", "none", "--epochs", "6")),
}
ADAPT = ("--steps", "160", "--batch-size", "64", "--lr", "6e-3", "--gate", "none", "--cvr", "off", "--prototypes", "64")
ADAPT += ("--verdict", "off")  # all images are trained on


def run(args: argparse.Namespace) -> None:
    done = {key(row) for row in rows(args.results)}
    starts = STARTS[1:] if args.adapted else STARTS[:1]
    # first one rate of everything, then the others
    for place in range(max(len(rates) for rates, _ in METHODS.values())):
        for name in args.sets:
            for start in starts:
                for method, (rates, flags) in METHODS.items():
                    if (
                        method in args.methods
                        and place < len(rates)
                        and (name, start, method, rates[place]) not in done
                    ):
                        one(args, name, start, method, rates[place], flags)


def one(args: argparse.Namespace, name: str, start: str, method: str, lr: float, flags: tuple[str, ...]) -> None:
    model, data = f"local-dir:{args.shared / 'base_tiny'}", str(args.shared / f"{name}.tar")
    out = args.work / f"{name}-{start}-{method}-{lr:g}"
    given = ["--model", model, "--data", data, "--num-workers", "1"]
    command = ["finetune", *given, "--out", str(out), "--overwrite", "--method", method, "--lr", str(lr), *flags]
    with locked(args.lock):
        if start == "adapted":
            adapter = args.work / f"{name}-adapter"
            if not (adapter / "adapter" / "adapter_config.json").is_file():
                upstep(["adapt", *given, "--out", str(adapter), "--overwrite", *ADAPT])
            command += ["--adapter", str(adapter / "adapter")]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        upstep(command)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = [step["held_out_top1"] for step in steps if "held_out_top1" in step]
    row = {
        "set": name,
        "start": start,
        "method": method,
        "lr": lr,
        "held_out_top1": max(measured),
        "epochs": len(measured),
        **json.loads((out / "result.json").read_text()),
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "command": "upstep-fast " + " ".join(command),
        "device": device_card(resolve("auto", "auto").device) | {"precision": resolve("auto", "auto").precision},
        "date": time.strftime("%Y-%m-%d"),
    }
    with args.results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(name, start, method, lr, f"held out {row['held_out_top1']:.1f} test {row['top1']:.1f}", flush=True)


def upstep(command: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "upstep_fast", *command], check=True)


@contextlib.contextmanager
def locked(path: Path | None) -> Iterator[None]:
    """Wait until no other heavy job holds the file's lock."""
    with contextlib.ExitStack() as stack:
        if path is not None:
            fcntl.flock(stack.enter_context(path.open("a")), fcntl.LOCK_EX)
        yield


def key(row: dict) -> tuple[str, str, str, float]:
    return row["set"], row["start"], row["method"], row["lr"]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table(args: argparse.Namespace) -> None:
    best: dict[tuple[str, str, str], dict] = {}
    for row in rows(args.results):
        place = row["set"], row["start"], row["method"]
        if place not in best or row["held_out_top1"] > best[place]["held_out_top1"]:
            best[place] = row
    print("| set | from | method | lr | held out | top-1 | balanced | trained | CPU s | peak MB |")
    print("|---|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for place in itertools.product(SETS, STARTS, METHODS):
        print(f"| {' | '.join(place)} | {' | '.join(cells(best[place]) if place in best else 7 * ['not measured'])} |")


def cells(row: dict) -> list[str]:
    """Return the table's columns for one run."""
    scores = [f"{row[name]:.1f}" for name in ("held_out_top1", "top1", "balanced")]
    costs = [f"{row['trainable_parameters']:,}", f"{row['cpu_seconds']:.0f}", f"{row['peak_bytes'] / 1e6:,.0f}"]
    return [f"{row['lr']:g}", *scores, *costs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--results", type=Path, default=Path("bench/results/methods_base_tiny.jsonl"))
    parser.add_argument("--sets", nargs="+", default=SETS[:2], choices=SETS)
    parser.add_argument("--methods", nargs="+", default=tuple(METHODS), choices=tuple(METHODS))
    parser.add_argument("--adapted", action="store_true", help="from the adapted model")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder of base_tiny and the sets")
    parser.add_argument("--work", type=Path, default=Path("/tmp/methods_table"), help="folder for the runs")
    parser.add_argument("--lock", type=Path, help="file whose lock each run waits for")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    table(args) if args.what == "table" else run(args)


if __name__ == "__main__":
    main()
