"""Search in 1,000,000 vectors of width 192 against FAISS's flat index, and the approximate index with its recall.

    python bench/evaluation/search_speed.py bench/results/search_speed_cpu2.json

The vectors lie in 2,000 clusters, at two spreads; queries are vectors with noise. In one process per number of threads:

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
ROUNDS = {1: 21, 64: 7}
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


def measured(threads: int) -> dict[str, Any]:
    faiss.omp_set_num_threads(threads)
    centers = np.random.default_rng(0).standard_normal((CLUSTERS, D), np.float32)
    results: dict[str, Any] = {}
    for name, spread in SPREADS.items():
        x, queries = vectors(spread, 1, N, centers), vectors(spread, 2, 256, centers)
        results[name] = {"approximate": approximates(x, queries)}
        if name == "dense":
            results[name] |= {"exact": exact(x, queries)}
        if name == "dense" and threads == 1:
            results[name] |= {"choice": choice(np.ascontiguousarray(x[:SMALL]), queries)}
    return results


def main(out: Path) -> None:
    result: dict[str, Any] = {
        "command": "python bench/evaluation/search_speed.py",
        "date": datetime.date.today().isoformat(),
        "processor": processor_name(),
        "versions": {"faiss": faiss.__version__, "numpy": np.__version__},
        "vectors": [N, D],
        "k": K,
        "load_before": os.getloadavg(),
        "threads": {},
    }
    for threads in (1, 2):
        program = [sys.executable, __file__, str(threads)]
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = os.environ | dict.fromkeys(names, str(threads))
        done = subprocess.run(program, env=environment, stdout=subprocess.PIPE, check=True)
        result["threads"][threads] = json.loads(done.stdout)
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1].isdecimal():
        print(json.dumps(measured(int(sys.argv[1]))))
    else:
        main(Path(sys.argv[1]))
