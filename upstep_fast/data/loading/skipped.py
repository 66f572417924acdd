"""Images that are left out: why, how many are allowed, and the file that lists them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from upstep_fast.data.decode.image import BadImage, decode
from upstep_fast.data.sources.source import Source
from upstep_fast.errors import DataError
from upstep_fast.runtime.atomic_file import write_atomic


def read_image(source: Source, index: int, *, channels: int = 3, min_side: int | None = None) -> Tensor | str:
    """The decoded image, or in one line why there is none."""
    try:
        return decode(source.read(index), channels=channels, min_side=min_side)
    except BadImage as error:
        return error.reason
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def too_many(bad: int, total: int, max_bad_fraction: float) -> bool:
    """Whether this many bad images of `total` end the run."""
    return bad > max_bad_fraction * total


def check_bad(skipped: dict[str, str], total: int, max_bad_fraction: float) -> None:
    """Raise DataError with the counts, the first file and the cure."""
    if too_many(len(skipped), total, max_bad_fraction):
        name, reason = next(iter(skipped.items()))
        raise DataError(
            f"data: {len(skipped)} of {total} images cannot be used, more than the {max_bad_fraction:.2%} allowed; "
            f"the first: {name}: {reason}; repair them or raise --max-bad-fraction"
        )


def write_skipped(path: str | Path, rows: Iterable[tuple[str, str]]) -> None:
    """A CSV with the header name,reason and these rows; written whole or not at all."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("name", "reason"), *rows])
    write_atomic(Path(path), text.getvalue().encode())
