"""Search in 1,000,000 vectors of width 192 against FAISS's flat index, and the approximate index with its recall.

    python bench/evaluation/search_speed.py bench/results/search_speed_cpu2.json

The vectors lie in 2,000 clusters, at two spreads; queries are other vectors of the same clusters. Each section is a
process of its own:

    exact         the 20 nearest of 1 and of 64 queries: `top_k` and IndexFlatIP in turn; their hits are compared
    approximate   build (k-means, lists, recall), opening, 1 and 64 queries, recall on queries that are not in the index
    choice        of 200,000 vectors: the inverted file and HNSW (32 links), build and 64 queries at their recall

Times are medians with quartiles in ms: of the process (all threads) and of the wall, which other work disturbs.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from upstep_fast.evaluation.search import approximate
from upstep_fast.evaluation.search.exact import top_k, unit_rows
from upstep_fast.runtime.machine import processor_name

N, D, K, CLUSTERS, SMALL = 1_000_000, 192, 20, 2000, 200_000
SPREADS = {"dense": 0.7, "loose": 2.0}  # of a cluster, per direction; its center has 1
RUNS = (
    ("exact", "dense", 1),
    ("approximate", "dense", 1),
    ("exact", "dense", 2),
    ("choice", "dense", 1),
    ("approximate", "loose", 1),
)
ROUNDS = {1: 15, 64: 5}
BLOCK = 100_000


def vectors(spread: float, seed: int, count: int, centers: np.ndarray) -> np.ndarray:
    random = np.random.default_rng(seed)
    x = np.empty((count, D), np.float32)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        rows = centers[random.integers(0, CLUSTERS, size)] + spread * random.standard_normal((size, D), np.float32)
        x[start : start + size] = unit_rows(rows)
    return x


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return {name: {"process", "wall": [lower quartile, median, upper quartile] in ms}} of calls made in turn."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for name in calls:
        calls[name]()
    for _ in range(rounds):
        for name, call in calls.items():
            process, wall = time.process_time(), time.perf_counter()
            call()
            times[name].append((time.process_time() - process, time.perf_counter() - wall))
    return {
        name: {
            kind: [round(1e3 * float(v), 3) for v in np.percentile([t[i] for t in taken], (25, 50, 75))]
            for i, kind in enumerate(("process", "wall"))
        }
        for name, taken in times.items()
    }


def exact(x: np.ndarray, queries: np.ndarray) -> dict[str, Any]:
    index, results = faiss.IndexFlatIP(D), {}
    index.add(x)
    for num, rounds in ROUNDS.items():
        q = queries[:num]
        ours, theirs = top_k(x, q, K)[1], index.search(q, K)[1]
        row = timed({"ours": lambda q=q: top_k(x, q, K), "faiss": lambda q=q: index.search(q, K)}, rounds)
        for kind in ("process", "wall"):
            row[f"ratio_{kind}"] = round(row["ours"][kind][1] / row["faiss"][kind][1], 3)
        results[num] = row | {"equal_hits": float((ours == theirs).mean())}
    return results


def recall_of(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found, true, strict=True)]))


def approximates(x: np.ndarray, queries: np.ndarray) -> dict[str, Any]:
    names = [str(i) for i in range(len(x))]
    started = time.process_time()
    lists = approximate.build(names, x)
    built = time.process_time() - started
    started = time.process_time()
    index = approximate.faiss_index(lists, x)
    opened = time.process_time() - started

    def search(q: np.ndarray) -> np.ndarray:
        return approximate.search(index, lists.nprobe, x, q, K)[1]

    return {
        "lists": len(lists.centroids),
        "nprobe": lists.nprobe,
        "recall_reported": round(lists.recall, 4),
        "recall_of_new_queries": round(recall_of(search(queries), top_k(x, queries, K)[1]), 4),
        "build_process_s": round(built, 2),
        "open_process_s": round(opened, 2),
        "times": {num: timed({"ours": lambda q=queries[:num]: search(q)}, rounds)["ours"]
                  for num, rounds in ROUNDS.items()},
    }  # fmt: skip


def choice(x: np.ndarray, queries: np.ndarray) -> dict[str, Any]:
    rows = {"inverted file": approximates(x, queries)}
    started = time.process_time()
    index = faiss.IndexHNSWFlat(D, 32, faiss.METRIC_INNER_PRODUCT)
    index.add(x)
    built, true = time.process_time() - started, top_k(x, queries, K)[1]
    for effort in (16, 32, 64, 128, 256, 512):
        how = faiss.SearchParametersHNSW(efSearch=effort)
        if (recall := recall_of(index.search(queries, K, params=how)[1], true)) >= approximate.RECALL:
            break
    times = {num: timed({"faiss": lambda q=queries[:num]: index.search(q, K, params=how)}, rounds)["faiss"]
             for num, rounds in ROUNDS.items()}  # fmt: skip
    rows["HNSW"] = {"efSearch": effort, "recall_of_new_queries": round(recall, 4), "build_process_s": round(built, 2)}
    rows["HNSW"]["times"] = times
    return rows


def measured(section: str, spread: str, threads: int) -> dict[str, Any]:
    faiss.omp_set_num_threads(threads)
    centers = np.random.default_rng(0).standard_normal((CLUSTERS, D), np.float32)
    count = SMALL if section == "choice" else N
    x, queries = vectors(SPREADS[spread], 1, count, centers), vectors(SPREADS[spread], 2, 256, centers)
    return {"exact": exact, "approximate": approximates, "choice": choice}[section](x, queries)


def main(out: Path) -> None:
    """Run each section in a process of its own; the file is written after each, and what it holds is not run again."""
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    result |= {
        "command": f"python bench/evaluation/search_speed.py bench/results/{out.name}",
        "processor": processor_name(),
        "versions": {"faiss": faiss.__version__, "numpy": np.__version__},
        "vectors": [N, D],
        "k": K,
    }
    for section, spread, threads in RUNS:
        name = f"{section}, {spread}, {threads} thread{'s' * (threads > 1)}"
        if name in result:
            continue
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        program = [sys.executable, __file__, section, spread, str(threads)]
        load = round(os.getloadavg()[0], 1)
        done = subprocess.run(program, env=environment, stdout=subprocess.PIPE, check=True)
        result[name] = {"date": datetime.date.today().isoformat(), "load": load} | json.loads(done.stdout)
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(measured(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
    else:
        main(Path(sys.argv[1]))
