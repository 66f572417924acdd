"""Frames a second of the explorer's maps in headless Chromium with software rendering, and how long the page opens.

    python bench/explorer/frames.py --points 100000 1000000 --json bench/results/explorer_frames_cpu2.json

Random features in 20 clusters; no images. By the processor, as the page does where WebGL is emulated, and by the
emulated WebGL. Both maps are drawn at 1440 x 860 pixels. While a map moves, a part of its
points is drawn if all of them take longer than 30 ms (`thinned`); `all points` measures the drawing of all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from playwright.sync_api import Page, sync_playwright

from upstep_fast.data.sources.source import Source
from upstep_fast.explorer import maps
from upstep_fast.explorer.columns import Column
from upstep_fast.explorer.gallery import Gallery
from upstep_fast.explorer.maps import start_maps
from upstep_fast.explorer.serve import listen, start
from upstep_fast.explorer.thumbnails import Thumbnails

WIDTH, CLUSTERS = 32, 20
SECONDS = 5
FLAGS = ["--no-sandbox"]
MOVE = """async ([seconds, isThinned]) => {
  const { base, adapted } = explorer.scatters, gaps = [], end = performance.now() + 1000 * seconds;
  let last = await new Promise(requestAnimationFrame), drawn = 0;
  for (let k = 0; performance.now() < end; k++) {
    for (const s of [base, adapted]) {
      if (!isThinned) s.budget = 1e9;
      else if (s.budget > 1e8) s.budget = 150000;
      s.x = 0.2 * Math.sin(k / 9);
      s.zoom = 1.2 + 0.2 * Math.cos(k / 7);
      s.moved();
      s.lastFrame = isThinned ? s.lastFrame : 1e15; // never slow, so that all are drawn
    }
    const now = await new Promise(requestAnimationFrame);
    gaps.push(now - last);
    [last, drawn] = [now, adapted.drawn];
  }
  return [gaps, drawn];
}"""


def main() -> None:
    """Print and write the frame rates."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--points", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--umap", type=int, help="points of which UMAP's maps are timed too")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [measure(points, args.chromium, way) for points in args.points for way in ("", "#webgl")]
    seconds = {} if args.umap is None else {"umap_points": args.umap, "umap_s": umap_seconds(args.umap)}
    result = {
        "load_1_min": round(os.getloadavg()[0], 1),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, SwiftShader",
        **seconds,
        "rows": rows,
    }
    for row in rows:
        print(row)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(points: int, chromium: str, way: str) -> dict[str, Any]:
    """Return a row of the table for this many points."""
    began = time.perf_counter()
    with mock.patch.object(maps, "MIN_ROWS", points + 1):  # without UMAP
        page = start(gallery(points), listen(0))
    prepared = time.perf_counter() - began
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        view = browser.new_page(viewport={"width": 1440, "height": 860})
        began = time.perf_counter()
        view.goto(page.url + way)
        while not view.evaluate(
            "globalThis.explorer?.scatters.adapted?.drawn > 0 && !!explorer.scatters.adapted.colors"
        ):
            time.sleep(0.05)
        row = {
            "points": points,
            "drawn_by": "WebGL" if way else "processor",
            "server_s": round(prepared, 1),
            "open_s": round(time.perf_counter() - began, 1),
        }
        row["all_points"] = rate(view, thinned=False)
        rate(view, thinned=True)  # finds how many points it can draw
        row["thinned"] = rate(view, thinned=True)
        row |= interactions(view)
        browser.close()
    page.close()
    return row


def umap_seconds(points: int) -> list[float]:
    """Return the seconds until each of the two maps by UMAP is there, of the first and of the second."""
    began, seconds = time.perf_counter(), []
    made = gallery(points).maps
    for column in ("base", "adapted"):
        while ("umap", column) not in made.ready and made.state != "" and "failed" not in made.state:
            time.sleep(0.1)
        seconds.append(round(time.perf_counter() - began, 1))
    if ("umap", "adapted") not in made.ready:
        raise RuntimeError(made.state)
    return seconds


def rate(view: Page, thinned: bool) -> dict[str, float]:
    """Return the frames a second of both maps moving, and the points drawn of each."""
    before = processor_seconds()
    gaps, drawn = view.evaluate(MOVE, [SECONDS, thinned])
    used = processor_seconds() - before
    gaps = sorted(gaps)
    return {
        "processor_ms_per_frame": round(1000 * used / len(gaps), 1),
        "frames_per_s": round(1000 / statistics.mean(gaps), 1),
        "slowest_tenth_ms": round(gaps[int(0.9 * len(gaps))], 1),
        "drawn": drawn,
    }


def processor_seconds() -> float:
    """Return the processor time of this process's descendants: Chromium."""
    parents, times = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            pid = int(folder.name)
            parents[pid], times[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
    total, found = 0, {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
        total += sum(times[pid] for pid in more)
    return total / os.sysconf("SC_CLK_TCK")


def interactions(view: Page) -> dict[str, float]:
    """Return milliseconds of the first and a later look for the point under the pointer, and of a lasso of all."""
    script = """() => {
      const s = explorer.scatters.adapted, times = [], at = () => performance.now();
      s.grid = null;
      for (let k = 0; k < 21; k++) { const t = at(); s.near(300 + k, 300); times.push(at() - t); }
      const t = at(), n = s.grid.inside([[-1, -1], [1, -1], [1, 1], [-1, 1]]).length;
      return [times[0], times.slice(1).sort((a, b) => a - b)[10], at() - t, n];
    }"""
    first, later, lasso, _ = view.evaluate(script)
    return {"first_hover_ms": round(first, 1), "hover_ms": round(later, 2), "lasso_all_ms": round(lasso, 1)}


def gallery(points: int) -> Gallery:
    """Return points in clusters, without images."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, CLUSTERS, points).astype(np.uint16)
    x = {}
    for column in ("base", "adapted"):
        centers = rng.normal(size=(CLUSTERS, WIDTH)).astype(np.float32)
        rows = centers[codes] + rng.standard_normal((points, WIDTH), dtype=np.float32)
        x[column] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    column = Column("cluster", codes, tuple(f"cluster {i + 1}" for i in range(CLUSTERS)))
    names = tuple(f"image {i}" for i in range(points))
    none: Any = None  # the page asks neither for a model nor for lists
    rows, source = np.full(points, -1), Source(())
    return Gallery("random", names, x, rows, source, none, [column], start_maps(x, None), Thumbnails(source, 3), none)


if __name__ == "__main__":
    main()
