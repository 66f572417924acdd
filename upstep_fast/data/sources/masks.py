"""Note on images that are named like masks or thumbnails of others: they are read, and said."""

from __future__ import annotations

import re
from collections.abc import Iterable

from upstep_fast.data.sources.names import Names
from upstep_fast.data.sources.part import Part, printable
from upstep_fast.data.sources.pieces import Pieces

_WORDS = (b"mask", b"seg", b"annotation", b"thumb", b"truth")
_NAMED = re.compile(
    rb"(^|/)(masks?|segmentations?|annotations?|thumbs?|thumbnails?|ground_?truth)/"
    rb"|[_.-](mask|seg|segmentation|thumb|thumbnail)\.[^./]+$"
)


def named_like_masks(parts: Iterable[Part]) -> str:
    """Return a note on images in folders such as masks/, or called such as 1_mask.png; empty if none or all are."""
    count, total, example = 0, 0, ""
    for part in parts:
        names = getattr(part.inner if isinstance(part, Pieces) else part, "names", None)
        total += len(part)
        if isinstance(names, Names) and any(word in names.blob.lower() for word in _WORDS):
            alike = [i for i in range(len(names)) if _NAMED.search(names[i].lower())]
            count += len(alike)
            example = example or (printable(names[alike[0]]) if alike else "")
    if not 0 < count < total:
        return ""
    return f"{count:,} files are named like masks or thumbnails ({example}) and are read; move them if they are"
