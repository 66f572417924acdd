"""Messages for paths without images: what is there instead, and the cure."""

from __future__ import annotations

import os

from upstep_fast.data.formats.kinds import NO_READER, PHOTOGRAPHS, missing_of
from upstep_fast.data.sources.part import Columns, Listing

_NO_TABLE = "write a CSV with the columns path,label, or give the folder as --data hf:FOLDER"
_UNPACK = "unpack it and give the folder"
_DECOMPRESS = "decompress it: members of compressed tars have no offsets"
_IN_FOLDERS = {
    ".tar": "give its tars as --data '{folder}/*.tar'",
    ".zip": "give its zips as --data '{folder}/*.zip'",
    ".csv": "give the list itself: --data {path}",
    ".parquet": "give the folder as --data hf:{folder}",
    ".arrow": "give the folder as --data hf:{folder}",
}
# what to do with a file that is no image, tar or list, by its suffix
HINTS = {
    **dict.fromkeys((".parquet", ".arrow"), "give it as --data hf:{path}"),
    **dict.fromkeys((".json", ".jsonl", ".yaml", ".yml"), _NO_TABLE),
    **dict.fromkeys((".7z", ".rar"), _UNPACK),
    **dict.fromkeys((".gz", ".tgz", ".bz2", ".xz", ".zst"), _DECOMPRESS),
    **{suffix: f"nothing here reads this kind; {cure}" for suffix, cure in NO_READER.items()},
}


def no_images(where: str, split: str | None, columns: Columns, listing: Listing) -> str:
    """Return the message for data without images: where, what is there instead, and the cure."""
    if split == "test" and listing.without_test:
        return f"data: no test images in {where}; {'; '.join(listing.without_test)}"
    if columns.image is not None:
        return f"data: no images in {where} with the suffix {columns.image} (--image-column); give another or none"
    if any(map(missing_of, listing.others)):
        return f"data: no images in {where} without the packages that read them; it holds {listing.left_out()}"
    problems = listing.problems
    if problems and not listing.others:  # images, none of which can be used
        name, reason = problems[0]
        others = f"no images in {where} that can be used; the first of {len(problems):,} problems: "
        return f"data: {'' if name == where else others}{name}: {reason}"
    message = f"data: no images in {where}; looked for files ending in {' '.join(PHOTOGRAPHS)}"
    if listing.others:
        message += f"; it holds {listing.left_out()}"
    for kind in sorted(listing.others, key=lambda kind: kind not in _IN_FOLDERS):
        if hint := _IN_FOLDERS.get(kind) or HINTS.get(kind):
            path = listing.examples[kind]
            message += f"; {hint.format(path=path, folder=os.path.dirname(path))}"
            break
    first = f"; the first of {len(problems)} problems: {problems[0][0]}: {problems[0][1]}" if problems else ""
    return f"{message}{first}"
