"""The curate command: what `evaluation.curation` finds, as curation.html, curation.csv and a list for --data."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from upstep_fast.config.curate import CurateConfig
from upstep_fast.config.files import from_options
from upstep_fast.config.options import CurateOptions
from upstep_fast.config.signatures import with_keywords
from upstep_fast.data.loading.skipped_images import csv_cell, read_image
from upstep_fast.data.sources.selection import is_selection, selected_data, selection_text
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import BadImage, ConfigError, DataError, UpstepError
from upstep_fast.evaluation.curation import findings
from upstep_fast.evaluation.curation.curate import Curation, find
from upstep_fast.evaluation.curation.findings import Finding
from upstep_fast.evaluation.curation.images import Images, read_images
from upstep_fast.evaluation.run_features import data_of_run
from upstep_fast.report.image_panels import thumbnail
from upstep_fast.report.page import page
from upstep_fast.runtime.atomic_file import probe, require_writable, write_errors
from upstep_fast.runtime.commit import Content, commit_together, settle
from upstep_fast.runtime.progress import track

log = logging.getLogger("upstep_fast")

PAGE, TABLE = "curation.html", "curation.csv"
HEADER = ("path", "finding", "score", "group", "other", "suggested", "why")
MOST = 60  # findings of a kind that the page shows
CURE = "what was there is unchanged; make room, or give another --out"
TITLES = {
    findings.EXACT: "Exact copies",
    findings.NEAR: "Near copies",
    findings.LEAK: "Copies of test images",
    findings.CONFLICT: "Copies in several classes",
    findings.MISLABELED: "Neighbors of another class",
    findings.OUTLIER: "Unlike all others",
}


@with_keywords(CurateConfig)
def curate(
    run: str | Path,
    data: str | Path | Sequence[str | Path] = (),
    out: str | Path = "curation",
    **keywords: Unpack[CurateOptions],
) -> Curation:
    """Find copies, odd images, wrong classes and leaks by the features of a run; keywords: `curate --help`.

    data: images as --data takes them; (): those of the run. Writes curation.html and curation.csv to `out`, and with
    `apply` the list of the images that are kept. Raises UpstepError.
    """
    return run_curate(from_options(CurateConfig, {"run": run, "data": data, "out": out, **keywords}, "curate"))


def run_curate(config: CurateConfig) -> Curation:
    """Run the curate command, see `curate`. Raises UpstepError."""
    out = Path(config.out)
    _check_places(out, config)
    with track("curate"):
        images = read_images(config)
        found = find(images, config)
        contents: dict[Path, Content] = {out / PAGE: curation_page(found, images).encode()}
        if config.apply is not None:
            contents[Path(config.apply)] = _list_of(found, config)
        contents[out / TABLE] = table(found.findings).encode()
        with write_errors("the report", CURE):
            out.mkdir(parents=True, exist_ok=True)
            commit_together(contents)
    return found


def table(rows: Sequence[Finding]) -> str:
    """Return the findings as CSV, with the cells as `csv_cell` has them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for f in rows:
        cells = (f.path, f.finding, f"{f.score:.4f}", f.group or "", f.other, f.suggested, f.why)
        writer.writerow([cell if i == 2 else csv_cell(str(cell)) for i, cell in enumerate(cells)])
    return text.getvalue()


def curation_page(found: Curation, images: Images) -> str:
    """Return curation.html: of each kind the first findings with their pictures."""
    shown = {kind: [f for f in found.findings if f.finding == kind][:MOST] for kind in TITLES}
    thumbs = _thumbnails(images, {name for rows in shown.values() for f in rows for name in (f.path, f.other) if name})
    sections = [
        (f"{title} ({found.counts[kind]:,})", [_card(f, thumbs) for f in shown[kind]], found.counts[kind] > MOST)
        for kind, title in TITLES.items()
    ]
    summary = {"images": f"{len(found.names):,}"} | {TITLES[k]: f"{n:,}" for k, n in found.counts.items()}
    return page("curation.html", "Curation", summary=summary, sections=sections, notes=found.notes, table=TABLE)


def _card(finding: Finding, thumbs: dict[str, str]) -> dict[str, Any]:
    pictures = [(name, thumbs.get(name, "")) for name in (finding.path, finding.other) if name]
    number = "" if finding.group is None else f"group {finding.group}"
    return {"pictures": pictures, "finding": finding, "score": f"{finding.score:.3f}", "group": number}


def _thumbnails(images: Images, names: set[str]) -> dict[str, str]:
    thumbs: dict[str, str] = {}
    indices = [i for i, name in enumerate(images.names) if name in names]
    with track("curate: pictures", len(indices)) as task:
        for i in indices:
            with contextlib.suppress(BadImage, UpstepError):
                image = read_image(images.source, i, channels=images.channels, min_side=128)
                thumbs[images.names[i]] = thumbnail(image)
            task.advance()
    return thumbs


def _list_of(found: Curation, config: CurateConfig) -> bytes:
    """Return the list of the images that are kept, by the names that their data has at its absolute path."""
    if not found.kept:
        raise DataError("apply: no image would be kept; leave kinds out of --drop")
    paths = list(config.data or data_of_run(config.run))
    places = [path if path.startswith("hf:") else os.path.abspath(path) for path in paths]
    if not all(os.fsencode(place) == place.encode("utf-8", "replace") for place in places):
        raise ConfigError("apply: the path of --data is not UTF-8, which a list cannot hold; rename its folder")
    kept, there = set(found.kept), set(found.names)
    before, after = (open_source(of, reading=found.reading) for of in (paths, places))
    if len(before) != len(after):
        raise DataError("apply: the images of --data changed meanwhile; repeat the command")
    names = [after.name(i) for i in range(len(before)) if before.name(i) in kept or before.name(i) not in there]
    data = [one for place in places for one in (selected_data(place)[0] if is_selection(place) else [place])]
    return selection_text(data, names)


def _check_places(out: Path, config: CurateConfig) -> None:
    """Raise ConfigError, before slow work, if a result cannot be written or is there already."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out: {out} is a file; name a folder")
    with write_errors("the report", CURE):
        settle([out / PAGE, *([Path(config.apply)] if config.apply is not None else []), out / TABLE], "out")
    if os.path.lexists(out / TABLE) and not config.overwrite:
        raise ConfigError(f"out: {out} holds an earlier {TABLE}; choose another folder or add --overwrite")
    try:
        probe(out)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"out: cannot write {out}: {reason}; give another path") from error
    if config.apply is not None:
        if os.path.lexists(config.apply) and not config.overwrite:
            raise ConfigError(f"apply: {config.apply} exists; choose another name or add --overwrite")
        require_writable(Path(config.apply), "apply")
