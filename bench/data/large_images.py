"""Tiles of large images against reading them whole, and against the libraries alone; ratios of one run.

    python bench/data/large_images.py bench/results/large_images_cpu2.json

All files are made here. The variants of a pair alternate, so that both meet the same load; the numbers are medians, and
quartiles of the ratio over the pairs.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import tifffile
from PIL import Image

from upstep_fast.config.reading import Reading
from upstep_fast.data.decode import cut
from upstep_fast.data.formats import slides, tiff_windows
from upstep_fast.data.loading.skipped_images import read_image
from upstep_fast.data.reading import tiles
from upstep_fast.data.reading.stored import Piece
from upstep_fast.data.sources.source import open_source
from upstep_fast.runtime.machine import processor_name

SIDE, TILE, PAIRS = 8192, 224, 25
SPARSE_SIDE = 100_000


def picture(side: int) -> np.ndarray:
    """Return a picture with structure at all scales, uint8 [side, side, 3]."""
    rng = np.random.default_rng(0)
    noise = [
        np.asarray(Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((side, side)), np.uint16)
        for n in (side // 128, side // 16, side // 2)
    ]
    return (sum(noise) // 3).astype(np.uint8)


def write_slide(path: Path, image: np.ndarray) -> None:
    """Write a pyramid as Aperio does, JPEG tiles of 256 x 256."""
    options = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg", "metadata": None, "subfiletype": 0}
    text = f"Aperio Image Library v1\r\n{image.shape[1]}x{image.shape[0]} (256x256) JPEG/RGB Q=75|MPP = 0.25"
    with tifffile.TiffWriter(path) as file:
        for k in range(4):
            file.write(np.asarray(Image.fromarray(image).reduce(4**k)) if k else image, description=text, **options)
            if k == 0:
                file.write(image[::32, ::32].copy(), photometric="rgb", metadata=None, rowsperstrip=16)


def write_sparse(path: Path) -> None:
    """Write a picture of 100,000 x 100,000 pixels of which nine tiles of 256 x 256 are stored."""
    across = -(-SPARSE_SIDE // 256)
    rng = np.random.default_rng(0)
    places = {(row, column) for row in (5, 200, 390) for column in (7, 8, 300)}
    noise = (zlib.compress(rng.integers(0, 255, (256, 256, 3), dtype=np.uint8).tobytes()) for _ in places)
    stored = dict(zip(places, noise, strict=True))
    segments = (stored.get(divmod(k, across), b"") for k in range(across**2))
    form = {"shape": (SPARSE_SIDE, SPARSE_SIDE, 3), "dtype": np.uint8, "tile": (256, 256), "photometric": "rgb"}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(segments, compression="zlib", metadata=None, **form)


def compared(ours: Callable[[int], object], theirs: Callable[[int], object], pairs: int = PAIRS) -> dict[str, float]:
    """Return the medians of both [ms] and of theirs / ours, with quartiles. The argument is the number of the pair."""
    times: list[tuple[float, float]] = []
    for k in range(-2, pairs):
        row = []
        for call in (ours, theirs) if k % 2 else (theirs, ours):
            start = time.perf_counter()
            call(abs(k))
            row.append(1000 * (time.perf_counter() - start))
        if k >= 0:
            times.append((row[0], row[1]) if k % 2 else (row[1], row[0]))
    low, middle, high = statistics.quantiles([b / a for a, b in times], n=4)
    ours_ms, theirs_ms = (round(statistics.median(column), 3) for column in zip(*times, strict=True))
    return {
        "ours_ms": ours_ms,
        "other_ms": theirs_ms,
        "ratio": round(middle, 3),
        "ratio_low": round(low, 3),
        "ratio_high": round(high, 3),
    }


def places(count: int) -> list[tuple[int, int]]:
    """Return corners of tiles, (top, left), drawn by a fixed seed."""
    rng = np.random.default_rng(1)
    return [(int(a), int(b)) for a, b in rng.integers(0, SIDE - TILE, (count, 2))]


def tile_against_whole(slide: Path) -> dict[str, float]:
    """One tile at a time, its segments decoded anew, against all pixels of level 0 by tifffile."""
    corners = places(PAIRS + 2)

    def ours(k: int) -> None:
        tiff_windows.forget()
        tiff_windows.read(str(slide), Piece(window=(*corners[k], TILE, TILE)))

    def whole(k: int) -> None:
        tifffile.imread(slide, key=0, maxworkers=1)

    return compared(ours, whole, pairs=7)


def layer_against_tifffile(slide: Path) -> dict[str, float]:
    """One hundred tiles by our layer, against tifffile's own decoding of the same segments from an open file."""
    corners = places(100 * 12)
    tiff_windows._segments.limit = 20 << 20  # 100 of the slide's 1024 segments, as of many slides

    def ours(k: int) -> None:
        for corner in corners[100 * k : 100 * k + 100]:
            tiff_windows.read(str(slide), Piece(window=(*corner, TILE, TILE)))

    with tifffile.TiffFile(slide) as file:
        page = file.pages[0]
        across = -(-SIDE // 256)

        def alone(k: int) -> None:
            for top, left in corners[100 * k : 100 * k + 100]:
                out = np.empty((TILE, TILE, 3), np.uint8)
                for row in range(top // 256, (top + TILE - 1) // 256 + 1):
                    for column in range(left // 256, (left + TILE - 1) // 256 + 1):
                        at = row * across + column
                        file.filehandle.seek(page.dataoffsets[at])
                        data = file.filehandle.read(page.databytecounts[at])
                        segment = page.decode(data, at, jpegtables=page.jpegtables)[0][0]
                        y, x = row * 256, column * 256
                        first, last, start, end = (
                            *(max(top, y), min(top + TILE, y + 256)),
                            *(max(left, x), min(left + TILE, x + 256)),
                        )
                        out[first - top : last - top, start - left : end - left] = segment[
                            first - y : last - y, start - x : end - x
                        ]
                np.ascontiguousarray(np.moveaxis(out, -1, 0))

        return compared(ours, alone, pairs=9)


def layer_against_openslide(slide: Path) -> dict[str, float]:
    """One hundred tiles by our layer, against read_region, white behind it, in an open handle."""
    corners, handle = places(100), openslide.OpenSlide(slide)

    def ours(k: int) -> None:
        for corner in corners:
            slides.read(str(slide), Piece(window=(*corner, TILE, TILE)))

    def alone(k: int) -> None:
        for top, left in corners:
            region = handle.read_region((left, top), 0, (TILE, TILE))
            white = Image.alpha_composite(Image.new("RGBA", region.size, "white"), region)
            np.moveaxis(np.asarray(white.convert("RGB")), -1, 0)

    return compared(ours, alone, pairs=9)


def photograph(folder: Path, image: np.ndarray) -> dict[str, float]:
    """All tiles of a JPEG of 16 megapixels, against decoding it once by Pillow."""
    folder.mkdir()
    path = folder / "a.jpg"
    Image.fromarray(image[:4096, :4096]).save(path, quality=90)
    source = open_source(str(folder), reading=Reading(tile=TILE))

    def ours(k: int) -> None:
        cut._pictures.clear()
        for index in range(len(source)):
            read_image(source, index)

    return {"tiles": len(source), **compared(ours, lambda k: np.asarray(Image.open(path)), pairs=7)}


def sparse(path: str) -> None:
    """Print what opening, listing and reading a slide of 100,000 x 100,000 pixels takes."""
    start = time.perf_counter()
    layout = tiff_windows.layout(path)
    grid = tiles.grid(layout, Reading(tile=TILE))
    kept = tiles.without_blank(
        grid, layout, lambda piece: tiff_windows.read(path, piece), lambda piece: tiff_windows.has_data(path, piece)
    )
    for piece in kept:
        tiff_windows.read(path, piece)
    # not ru_maxrss, which starts with that of the process that started this one
    status = Path("/proc/self/status").read_text()
    megabytes = int(status.partition("VmHWM:")[2].split()[0]) // 1024
    seconds = round(time.perf_counter() - start, 2)
    print(json.dumps({"tiles": len(grid), "kept": len(kept), "seconds": seconds, "peak_mb": megabytes}))


def main() -> int:
    if sys.argv[1] == "--sparse":
        sparse(sys.argv[2])
        return 0
    out = Path(sys.argv[1])
    image = picture(SIDE)
    with tempfile.TemporaryDirectory() as name:
        slide, hollow = Path(name) / "a.svs", Path(name) / "hollow.tif"
        write_slide(slide, image)
        write_sparse(hollow)
        found = {
            "tile_against_whole": tile_against_whole(slide),
            "100_tiles_against_tifffile": layer_against_tifffile(slide),
            "100_tiles_against_openslide": layer_against_openslide(slide),
            "jpeg_16_megapixels": photograph(Path(name) / "photographs", image),
        }
        command = [sys.executable, __file__, "--sparse", str(hollow)]
        found["sparse_100000"] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    machine = {"cpu": processor_name(), "cores": os.cpu_count(), "gpu": "none"}
    versions = {"tifffile": tifffile.__version__, "openslide": openslide.__library_version__}
    command_line = f"python bench/data/large_images.py {out}"
    record = {
        "date": str(datetime.date.today()),
        "command": command_line,
        "machine": machine,
        "versions": versions,
        "results": found,
    }
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
