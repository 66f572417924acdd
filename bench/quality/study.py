"""The study of adaptation quality: a grid of configurations x data sets x seeds, one JSON line a run.

    python bench/quality/study.py GRID.toml --out ROWS.jsonl [--jobs N] [--test NAME ...] [--page PAGE.md]

Rows are keyed by a hash of configuration, data and seed: what has a row is not run again, so a study that was stopped
goes on with the same command. Configurations are chosen on a third of each train part, which adaptation does not see
("select"); --test NAME measures the named ones on the test part, from the same adapters, once; --depth NAME with a
third of the blocks at a time weakened (to 0 and 0.5). --page fills the page.

    model, data = [PATH ...], source = PATH, seeds = [0, 1, 2], k = 20
    strengths = [0.5]    measured beside 1: W + strength * s B A
    probes = [2, 4]      strengths for the label-free scores' sake: k-NN of the adapted features only
    [k_of]            sign_digits_64 = 5                 k where it is not `k`
    [base]            steps = 120                        adapt's options, for every configuration
    [configs.NAME]    cvr = "sq", cvr_weight = [1, 5]    a list is a sweep: NAME cvr_weight=1, NAME cvr_weight=5
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from job import Job, fingerprint, label

HERE = Path(__file__).resolve().parent
LOOKS = 4  # at the clusters of a run
HELD_OUT = 1 / 3  # of the train part, for choosing configurations
TUPLES = ("lora_targets", "mean", "std", "in_chans", "img_size")  # options whose values may be lists themselves


def main() -> int:
    """Run what has no row yet; returns 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    parser.add_argument("--work", type=Path, default=Path("study"), help="folder for adapters and base features")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time: processes, on one GPU or the cores")
    parser.add_argument("--test", nargs="*", default=[], metavar="NAME", help="measure these on the test part")
    parser.add_argument(
        "--depth", nargs="*", default=[], metavar="NAME", help="weaken thirds of these adapters' blocks"
    )
    parser.add_argument("--page", type=Path, help="fill the tables and plots of this page")
    parser.add_argument("--no-run", action="store_true", help="only the page, of the rows that are there")
    args = parser.parse_args()
    jobs = read_grid(args.grid)
    more = {"test": args.test, "depth": args.depth}
    for split, names in more.items():
        if unknown := set(names) - {job.name for job in jobs}:
            there = ", ".join(dict.fromkeys(job.name for job in jobs))
            parser.error(f"--{split}: no configuration {', '.join(sorted(unknown))}; there are {there}")
    asked = [(job, "select") for job in jobs]
    asked += [(job, split) for split, names in more.items() for job in jobs if job.name in names]
    failed = 0 if args.no_run else run(asked, args.out, args.work, args.jobs)
    if args.page:
        sys.path.insert(0, str(HERE))
        import study_page

        study_page.fill(args.page, rows := read_rows(args.out), args.out, missing(jobs, rows))
    return int(failed > 0)


def read_grid(path: Path) -> list[Job]:
    """Return the jobs of a grid file, in the file's order, each once. Raises ValueError for keys that are not known."""
    grid = tomllib.loads(path.read_text())
    known = {"model", "data", "source", "seeds", "strengths", "probes", "k", "k_of", "base", "configs"}
    if unknown := set(grid) - known:
        raise ValueError(f"{path}: unknown {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    k_of = grid.get("k_of", {})
    found: dict[str, Job] = {}
    for data, seed, (name, options) in itertools.product(grid["data"], grid.get("seeds", [0]), _configs(grid)):
        job = Job(
            name=name,
            options=options,
            model=grid["model"],
            data=data,
            source=grid.get("source"),
            seed=seed,
            k=k_of.get(label(data), grid.get("k", 20)),
            strengths=tuple(sorted({1.0, *grid.get("strengths", [])})),
            probes=tuple(grid.get("probes", [])),
        )
        found.setdefault(job.key, job)
    return list(found.values())


def _configs(grid: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    from upstep_fast.config.adapt import AdaptConfig
    from upstep_fast.config.files import known_flag

    for name, own in grid["configs"].items():
        options = {known_flag(key, AdaptConfig, f"config {name}"): v for key, v in (grid.get("base", {}) | own).items()}
        swept = {
            key: values
            for key, values in options.items()
            if isinstance(values, list) and (key not in TUPLES or isinstance(values[0], list))
        }
        for chosen in itertools.product(*swept.values()):
            point = dict(zip(swept, chosen, strict=True))
            yield " ".join([name, *(f"{key}={value}" for key, value in point.items())]), options | point


def run(asked: list[tuple[Job, str]], out: Path, work: Path, jobs: int) -> int:
    """Run what has no good row in `out` and appends a row each as it ends; returns how many failed."""
    done = {(row["key"], row["split"]) for row in read_rows(out) if "error" not in row}
    todo = [(job, split) for job, split in asked if (job.key, split) not in done]
    print(f"{len(asked)} rows asked for, {len(todo)} to run", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    failed, total = 0, len(todo)
    # spawned: what torch has run in does not survive a fork; no max_tasks_per_child, with which 3.11 hangs (gh-115634)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(measure, job, split, work): (job, split) for job, split in todo}
        for number, future in enumerate(as_completed(running), 1):
            job, split = running[future]
            try:
                row = future.result()
            except Exception as error:
                failed += 1
                row = {"key": job.key, "split": split, "name": job.name, "data": label(job.data), "seed": job.seed}
                row["error"] = f"{type(error).__name__}: {error}"
            _append(out, row)
            print(f"{number}/{total} {job.name} {label(job.data)} seed {job.seed} {split}: {brief(row)}", flush=True)
    return failed


def measure(job: Job, split: str, work: Path) -> dict[str, Any]:
    """One row: adapts unless this adapter is there already, then measures it at every strength."""
    import clusters
    import study_scores

    from upstep_fast.train.adapt import adapt

    folder = work / job.key
    chosen_on = selection(job.data, work)
    finished = folder / "finished.json"
    if not finished.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        began, cpu = time.monotonic(), time.process_time()
        looks = {} if "steps" not in job.options else looked_at(job.options["steps"])
        # all images are trained on, and no adapter is refused
        options = {"preset": "upstep", "verdict": "off", "log_every": 1000} | looks | job.options
        adapt(model=job.model, data=str(chosen_on), out=folder, seed=job.seed, **options)
        taken = {"seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
        taken["trained"] = commit()
        taken |= {"clusters": clusters.history(folder, str(chosen_on))} if looks else {}
        finished.write_text(json.dumps(taken | study_scores.steps_taken(folder)))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    data = job.data if split == "test" else str(chosen_on)
    return {
        "key": job.key,
        "split": split,
        "name": job.name,
        "options": job.options,
        "model": job.model.rpartition("/")[2],
        "data": label(job.data),
        "seed": job.seed,
        "k": job.k,
        **json.loads(finished.read_text()),
        **study_scores.scores(job, data, folder / "adapter", work, by_depth=split == "depth"),
        "commit": commit(),
        "device": device(),
    }


def looked_at(steps: int) -> dict[str, int]:
    """Options that keep LOOKS checkpoints of a run, evenly spaced, for its clusters (clusters.py)."""
    return {"checkpoint_every": -(-steps // LOOKS), "keep_checkpoints": LOOKS}


def selection(data: str, work: Path) -> Path:
    """Write a tar of `data`'s train part, a third of it as test/, to choose configurations on; return its path."""
    from upstep_fast.data.keyed_random import uniform
    from upstep_fast.data.sources.source import open_source

    path = work / f"{label(data)}-{fingerprint(data)[:8]}-select.tar"
    if path.is_file():
        return path
    source = open_source(data, split="train")
    if source.labels is None:
        raise ValueError(f"{data}: the study needs train/CLASS/image files")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    with tarfile.open(temporary, "w") as tar:
        for index, name in enumerate(source.labels):
            part = "test" if uniform(0, index) < HELD_OUT else "train"
            content = source.read(index)
            member = tarfile.TarInfo(f"{part}/{name}/{index:06}{Path(source.name(index)).suffix}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    temporary.replace(path)
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the newest row of each key and split, in the order of the file; a torn last line is left out."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            rows[row["key"], row["split"]] = row
        except (ValueError, KeyError, TypeError):
            print(f"{path}: left out a line that is no row: {line[:60]}", file=sys.stderr)
    return list(rows.values())


def missing(jobs: list[Job], rows: list[dict[str, Any]]) -> list[str]:
    """List what the grid asks for and no row has, as "NAME on DATA (n seeds)"."""
    there = {row["key"] for row in rows if "error" not in row and row["split"] == "select"}
    lacking = Counter(f"{job.name} on {label(job.data)}" for job in jobs if job.key not in there)
    return [f"{what} ({seeds} seeds)" if seeds > 1 else what for what, seeds in lacking.items()]


def _append(path: Path, row: dict[str, Any]) -> None:
    text = path.read_bytes() if path.is_file() else b""
    with path.open("ab") as file:
        # the line of a run that was killed while writing stays apart
        file.write((b"\n" if text and not text.endswith(b"\n") else b"") + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def brief(row: dict[str, Any]) -> str:
    """Summarize a row in one line."""
    if "error" in row:
        return row["error"]
    at = row["at"]["1.0"]
    kinds = [kind for kind in ("adapted", "ensemble") if kind in at]
    gains = [f"{kind} {at[kind]['knn'] - row['base']['knn']:+.1f}" for kind in kinds]
    source = f", source {at['source']['adapted'] - row['base']['source']:+.1f}" if "source" in at else ""
    return f"k-NN {', '.join(gains)}{source}, {row['seconds']:.0f} s"


def commit() -> str:
    """Of the code that runs; + where it had changes. In a row: what measured; "trained": what adapted."""
    git = ["git", "-C", str(HERE)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "../upstep_fast", "../bench"]).returncode
    return head + "+" * bool(changed)


def device() -> str:
    """Return the name of the device."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    sys.exit(main())
