"""Lists that name some of the images of other data: what `curate --apply` writes.

    #upstep_fast selection of ["/home/me/photos"]      the data, as --data takes it, in JSON
    /home/me/photos/cat/a.jpg                          one name a line, as `name_line` writes it

The images keep the classes, the splits and the order of that data. Names are those of `Source.name`, so members of tar
and zip files, rows of data sets and pictures of a file (scan.nii.gz#z=12) can be listed; these need the flags of
reading with which the list was written. Of files alone it is a plain list to other programs, without the first line.
Two names of other bytes than UTF-8 may be one label; then both images are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from upstep_fast.data.sources.lines import name_line, name_of_line
from upstep_fast.data.sources.lists import read_text
from upstep_fast.data.sources.part import Listing, Part, open_data
from upstep_fast.data.sources.subset import Subset
from upstep_fast.errors import DataError, NoTestPartError, first_line

if TYPE_CHECKING:
    from upstep_fast.data.sources.source import Source  # which imports this module

HEADER = b"#upstep_fast selection of "


def selection_text(paths: Sequence[str], names: Sequence[str]) -> bytes:
    """Return the text of a list of images `names` of the data at `paths`, which are absolute."""
    lines = [HEADER.decode() + json.dumps(list(paths)), *map(name_line, names)]
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")


def is_selection(path: str) -> bool:
    """Return whether `path` is such a list. Raises DataError if it cannot be read."""
    if not path.lower().endswith(".txt") or not os.path.isfile(path):
        return False
    with open_data(path) as file:
        return file.read(len(HEADER)) == HEADER


def selected_data(path: str) -> tuple[list[str], list[str]]:
    """Return the data of a list, and the names. Raises DataError."""
    first, *lines = read_text(Path(path)).decode("utf-8", "surrogateescape").split("\n")
    try:
        paths = json.loads(first[len(HEADER) :])
        names = [str(name_of_line(line)) for line in lines if line]
    except (ValueError, RecursionError) as error:
        raise DataError(f"data: {path} is damaged ({first_line(error)}); write it again with curate --apply") from error
    if not isinstance(paths, list) or not paths or not all(isinstance(p, str) for p in paths):
        raise DataError(f"data: {path} is damaged (its first line names no data); write it again with curate --apply")
    return paths, names


def open_selection(path: str, split: str | None, listing: Listing, opened: Callable[[list[str]], Source]) -> list[Part]:
    """Return the part of the images that a list names. Raises DataError if none of them is there.

    opened: opens its data, of the split.
    """
    paths, names = selected_data(path)
    if any(map(is_selection, paths)):
        raise DataError(f"data: {path} names another such list, {', '.join(paths)}; write it again with curate --apply")
    try:
        source = opened(paths)
    except NoTestPartError as error:
        listing.without_test.append(str(error).removeprefix("data: "))
        return []
    wanted = set(names)
    indices = [i for i in range(len(source)) if source.name(i) in wanted]
    if names and not indices and split is None:
        raise DataError(
            f"data: none of the {len(names)} images in {path} is in {', '.join(paths)}, e.g. {names[0]}; give the "
            "flags of reading (--tiles, --slice) with which it was written, or write it again with curate --apply"
        )
    if split is None and (missing := wanted - {source.name(i) for i in indices}):
        listing.problems += [(name, f"listed in {path}, but not there any more") for name in sorted(missing)]
    listing.add_note(f"{path}: {len(indices):,} of {len(source):,} images of {', '.join(paths)}")
    return [Subset(source, np.array(indices, np.int64))]
