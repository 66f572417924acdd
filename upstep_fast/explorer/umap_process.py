"""UMAP in a process of its own: its compiled loops hold Python's lock, and the page must answer meanwhile.

    python -m upstep_fast.explorer.umap_process FOLDER COLUMN...

reads FOLDER/COLUMN.npy, writes FOLDER/umap-COLUMN.npy and then prints COLUMN. It ends when its standard input does:
when the process that started it has ended, in whatever way.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from pathlib import Path

import numpy as np

from upstep_fast.explorer.maps import FIT, in_square, spread

NEIGHBORS, MIN_DIST, NEAREST, SEED = 15, 0.1, 3, 0
BLOCK = 4096


def main(folder: Path, columns: list[str]) -> None:
    """Write the maps of the columns in turn; each starts from the one before."""
    import umap

    warnings.filterwarnings("ignore")
    start: np.ndarray | None = None
    for column in columns:
        x = np.load(folder / f"{column}.npy")
        rows = spread(len(x), FIT)
        options = {"n_neighbors": min(NEIGHBORS, len(rows) - 1), "min_dist": MIN_DIST, "random_state": SEED}
        first = in_square(x[rows, :2]) * 10 if start is None else start
        start = umap.UMAP(init=first, **options).fit_transform(x[rows])
        y = start if len(rows) == len(x) else placed(x, rows, start)
        np.save(folder / f"umap-{column}.npy", in_square(y))
        print(column, flush=True)


def placed(x: np.ndarray, rows: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return places [N, 2] of all rows of x [N, D]: y [R, 2] for `rows`, the others at their nearest ones' mean."""
    import faiss

    index = faiss.IndexFlatL2(x.shape[1])
    index.add(x[rows])
    result = np.empty((len(x), 2), np.float32)
    for begin in range(0, len(x), BLOCK):
        _, nearest = index.search(x[begin : begin + BLOCK], NEAREST)
        result[begin : begin + BLOCK] = y[nearest].mean(1)
    result[rows] = y
    return result


def _end_with_input() -> None:
    os.read(0, 1)  # not by sys.stdin, whose lock would abort the interpreter at its end
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_input, daemon=True).start()
    main(Path(sys.argv[1]), sys.argv[2:])
