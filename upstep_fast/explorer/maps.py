"""Maps: two coordinates for each image, by PCA at once and by UMAP in a process of its own.

    PCA    y = (x - mean) V, V [D, 2] the first two principal directions, from at most FIT rows
    UMAP   of the first 50 principal components; fitted to at most FIT rows, the other rows at the mean of the places
           of their 3 nearest fitted rows

The map of the adapted features is turned to that of the base features (PCA: Procrustes; UMAP: starts from it), so that
an image stays on its side of the picture where its neighbors do.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from upstep_fast.errors import first_line
from upstep_fast.runtime.atomic_file import write_atomic

log = logging.getLogger("upstep_fast")

FIT = 100_000  # rows that PCA and UMAP are fitted to
COMPONENTS = 50
MIN_ROWS = 10  # UMAP needs neighbors
FORM = "1"  # of the cached maps; another number computes them again


def principal(x: np.ndarray, count: int) -> np.ndarray:
    """Return the first principal components [N, count] of x [N, D], fp32; columns of 0 beyond D.

    Signs: the largest entry of each direction is positive.
    """
    some = x[spread(len(x), FIT)].astype(np.float64)
    mean = some.mean(0)
    some -= mean
    _, vectors = np.linalg.eigh(some.T @ some)
    v = vectors[:, ::-1][:, :count]
    v = v * np.sign(v[np.abs(v).argmax(0), np.arange(v.shape[1])])
    y = x @ v.astype(np.float32) - (mean @ v).astype(np.float32)
    return np.pad(y, ((0, 0), (0, count - y.shape[1])))


def spread(count: int, most: int) -> np.ndarray:
    """Return at most `most` of the indices 0 .. count - 1, evenly spread."""
    num = min(count, most)
    return np.arange(num) * count // max(num, 1)


def turned_to(y: np.ndarray, to: np.ndarray) -> np.ndarray:
    """Return y [N, 2] rotated and reflected to be as near to `to` as that makes it (orthogonal Procrustes)."""
    u, _, v = np.linalg.svd((y - y.mean(0)).T.astype(np.float64) @ (to - to.mean(0)))
    return (y @ (u @ v)).astype(np.float32)


def in_square(y: np.ndarray) -> np.ndarray:
    """Return y [N, 2] moved and scaled, fp32, so that all but the outermost thousandths lie in -1 .. 1 on both axes."""
    low, high = np.quantile(y[spread(len(y), FIT)], (0.001, 0.999), axis=0)
    half = max(float((high - low).max()) / 2, 1e-12)
    return np.ascontiguousarray((y - (low + high) / 2) / (1.05 * half), dtype=np.float32)


@dataclass(eq=False)
class Maps:
    """The maps of base and adapted features; those of UMAP appear when they are ready."""

    ready: dict[tuple[str, str], np.ndarray]  # (kind, column) -> [N, 2]
    state: str = ""  # of UMAP, for people; "" once it is ready
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def close(self) -> None:
        """End the process, if it runs."""
        with self.lock:
            self.state = "stopped"
            if self.process is not None:
                self.process.kill()


def start_maps(x: Mapping[str, np.ndarray], cache: Path | None) -> Maps:
    """Return the PCA maps of {column: features [N, D]}, "base" first, and start UMAP unless its maps are in `cache`."""
    pca: dict[tuple[str, str], np.ndarray] = {}
    first: np.ndarray | None = None
    for column, rows in x.items():
        y = principal(rows, 2)
        y = y if first is None else turned_to(y, first)
        first = y
        pca["pca", column] = in_square(y)
    maps = Maps(pca)
    if len(next(iter(x.values()))) < MIN_ROWS:
        maps.state = f"UMAP needs {MIN_ROWS} images"
        return maps
    folder = cache / key_of(x) if cache is not None else None
    if folder is not None and _read(maps, folder, x):
        return maps
    maps.state = "UMAP is being computed"
    threading.Thread(target=_compute, args=(maps, x, folder), daemon=True, name="explore: UMAP").start()
    return maps


def key_of(x: Mapping[str, np.ndarray]) -> str:
    """Return the name of the cached maps of these features."""
    digest = hashlib.sha256(f"{FORM} {FIT} {COMPONENTS}".encode())
    for column, rows in x.items():
        digest.update(f"{column} {rows.shape}".encode())
        digest.update(np.ascontiguousarray(rows).data)
    return f"maps-{digest.hexdigest()[:16]}"


def _compute(maps: Maps, x: Mapping[str, np.ndarray], folder: Path | None) -> None:
    """Run UMAP in a process; its maps go to `maps` as they are made, and to `folder`."""
    try:
        with tempfile.TemporaryDirectory(prefix="upstep-explore-") as name:
            for column, rows in x.items():
                np.save(Path(name) / f"{column}.npy", principal(rows, min(COMPONENTS, rows.shape[1])))
            command = [sys.executable, "-m", "upstep_fast.explorer.umap_process", name, *x]
            with maps.lock:
                if maps.state == "stopped":
                    return
                # its input stays open as long as this process lives
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
                maps.process = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]
            assert maps.process.stdout is not None
            for line in maps.process.stdout:
                column = line.decode().strip()
                maps.ready["umap", column] = y = np.load(Path(name) / f"umap-{column}.npy")
                _write(folder, column, y)
            if maps.process.wait():
                raise RuntimeError(f"its process ended with {maps.process.returncode}")
            maps.state = ""
    except Exception as error:  # the page is of use without it
        if maps.state == "stopped":  # its process was ended, whatever it says
            return
        maps.state = f"UMAP failed: {first_line(error)}"
        log.warning("explore: %s", maps.state)


def _read(maps: Maps, folder: Path, x: Mapping[str, np.ndarray]) -> bool:
    """Read the maps in `folder`; return whether all are there and of the right shape."""
    for column, rows in x.items():
        try:
            y = np.load(folder / f"umap-{column}.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return False
        if y.shape != (len(rows), 2) or y.dtype != np.float32 or not np.isfinite(y).all():
            return False
        maps.ready["umap", column] = y
    return True


def _write(folder: Path | None, column: str, y: np.ndarray) -> None:
    if folder is not None:
        with contextlib.suppress(OSError):  # a cache
            os.makedirs(folder, exist_ok=True)
            write_atomic(folder / f"umap-{column}.npy", lambda file: np.save(file, y))
