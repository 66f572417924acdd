"""A page with the images that a search found: one file without scripts that needs no network."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from upstep_fast.config.search import SearchConfig
from upstep_fast.data.curation.intensity import measure_intensity
from upstep_fast.data.loading.eval_transform import EvalTransform
from upstep_fast.data.loading.skipped_images import read_image
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import BadImage, UpstepError
from upstep_fast.evaluation.run_features import data_of_run, model_of
from upstep_fast.evaluation.run_search import Found
from upstep_fast.report.image_panels import thumbnail
from upstep_fast.report.page import page

log = logging.getLogger("upstep_fast")


def search_page(config: SearchConfig, found: Found) -> str:
    """Return the HTML page. An image that cannot be read any more has its name in place of a picture."""
    names = dict.fromkeys([*found.queries, *(match.name for matches in found.matches for match in matches)])
    pictures = _pictures(config, names, model_of(config).transform)
    rows = [
        (
            query,
            pictures.get(query),
            [(rank, f"{m.similarity:.4f}", m.name, pictures.get(m.name)) for rank, m in enumerate(matches, 1)],
        )
        for query, matches in zip(found.queries, found.matches, strict=True)
    ]
    return page("search.html", "Similar images", searched=found.searched, rows=rows)


def _pictures(config: SearchConfig, names: Iterable[str], transform: EvalTransform) -> dict[str, str]:
    """Return {name: thumbnail} of the images that can be read: files by their path, others in the data."""
    thumbs, others = {}, set()
    for name in names:
        if not Path(name).is_file():
            others.add(name)
            continue
        try:
            thumbs[name] = thumbnail(transform.pixels(name))
        except (BadImage, UpstepError) as error:
            log.warning("out: no picture of %s: %s", name, error)
    if others:
        thumbs |= _of_data(config, others, transform)
    return thumbs


def _of_data(config: SearchConfig, names: set[str], transform: EvalTransform) -> dict[str, str]:
    """Return {name: thumbnail} of images within files, such as members of a tar and slices of a volume."""
    thumbs, channels = {}, len(transform.mean)
    try:
        source = open_source(config.data or data_of_run(config.run), reading=transform.reading)
        source = measure_intensity(source, channels=channels)
        for index in range(len(source)):
            if (name := source.name(index)) in names:
                thumbs[name] = thumbnail(read_image(source, index, channels=channels))
    except (BadImage, UpstepError) as error:
        log.warning("out: no pictures of some images: %s", error)
    return thumbs
