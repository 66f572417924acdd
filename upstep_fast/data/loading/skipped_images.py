"""Skipped images: images that cannot be read or decoded, how many are allowed, and the file that lists them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from upstep_fast.config.reading import Reading
from upstep_fast.data.decode.image import decode
from upstep_fast.data.decode.piece import decode_piece
from upstep_fast.data.loading.ordered_map import ordered_map
from upstep_fast.data.reading.retries import with_retries
from upstep_fast.data.reading.transient import may_pass
from upstep_fast.data.sources.part import Item
from upstep_fast.data.sources.source import Source
from upstep_fast.errors import BadImage, DataError, printable
from upstep_fast.runtime.atomic_file import write_atomic

MAX_CELL = 4096  # characters of a line in a CSV file; Linux's longest path
FORMULA_STARTS = tuple("=+-@\uff1d\uff0b\uff0d\uff20")  # the last four: full-width forms, which some spreadsheets run

T = TypeVar("T")
R = TypeVar("R")


class SkippedImages(dict[str, str]):
    """Images that cannot be used: name -> reason."""

    def check(self, total: int, max_bad_fraction: float) -> None:
        """Raise DataError if they are more than `max_bad_fraction` of `total` images."""
        if too_many(len(self), total, max_bad_fraction):
            name, reason = next(iter(self.items()))
            raise DataError(
                f"data: {len(self)} of {total} images cannot be used, more than the {max_bad_fraction:.2%} allowed; "
                f"the first: {name}: {reason}; repair them or raise --max-bad-fraction"
            )


def too_many(bad: int, total: int, max_bad_fraction: float) -> bool:
    """Return whether `bad` of `total` images are more than a run accepts."""
    return bad > max_bad_fraction * total


def read_image(source: Source, index: int, *, channels: int = 3, min_side: int | None = None) -> Tensor:
    """Return the decoded image, uint8 [channels, H, W]. Raises BadImage, or as `with_retries`."""

    def read() -> Tensor:
        return decode_item(read_item(source, index), source.reading, channels=channels, min_side=min_side)

    return with_retries(read, lambda: source.name(index))


def decode_item(item: Item, reading: Reading, *, channels: int, min_side: int | None = None) -> Tensor:
    """Return the image, uint8 [channels, H, W]. Raises BadImage, or OSError or MemoryError, which may pass."""
    options: dict[str, Any] = {"channels": channels, "min_side": min_side, "reading": reading}
    if item.kind is None:
        return decode(item.file, **options)  # type: ignore[arg-type]  # bytes
    try:
        return decode_piece(item.kind, item.file, item.piece, layout=item.layout, **options)
    except OSError as error:  # of a file that is read by its path
        raise _as_bad_image(error) from error


def read_item(source: Source, index: int) -> Item:
    """Return the encoded image. Raises BadImage, or OSError if it may pass: for use within `with_retries`."""
    try:
        return source.item(index)
    except OSError as error:
        raise _as_bad_image(error) from error


def _as_bad_image(error: OSError) -> OSError | BadImage:
    """Return a BadImage for an error of the file; an error that may pass as it is."""
    return error if may_pass(error) else BadImage(f"cannot be read: {error.strerror or error}")


def catch_bad_image(function: Callable[[T], R]) -> Callable[[T], R | BadImage]:
    """Return `function` with the BadImage that it raises as its result, so that threads can hand it over in order."""

    def call(item: T) -> R | BadImage:
        try:
            return function(item)
        except BadImage as error:
            return error

    return call


def map_readable(
    function: Callable[[int], R],
    source: Source,
    indices: Sequence[int],
    skipped: SkippedImages,
    *,
    num_workers: int,
    ahead: int,
    max_bad_fraction: float,
) -> Generator[tuple[int, R]]:
    """Yield (index, function(index)) in order, computed by threads; close() ends them.

    An image for which `function` raises BadImage is added to `skipped`; errors that may pass are retried. Raises
    DataError when more than `max_bad_fraction` of the indices are bad, and as `with_retries`.
    """

    def retried(index: int) -> R:
        return with_retries(lambda: function(index), lambda: source.name(index))

    results = ordered_map(catch_bad_image(retried), indices, num_workers, ahead)
    try:
        for index, result in zip(indices, results, strict=True):
            if isinstance(result, BadImage):
                skipped[source.name(index)] = result.reason
                skipped.check(len(indices), max_bad_fraction)
            else:
                yield index, result
    finally:
        results.close()


def write_skipped(path: str | Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write a CSV with the header name,reason and these rows as `csv_cell` has them, atomically. Raises OSError."""
    text = io.StringIO()
    cells = ([csv_cell(name), csv_cell(reason)] for name, reason in rows)
    csv.writer(text, lineterminator="\n").writerows([("name", "reason"), *cells])
    write_atomic(Path(path), text.getvalue().encode())


def csv_cell(text: str) -> str:
    """Return text that a spreadsheet shows and does not run, and that steers no terminal.

    Each line that starts with = + - or @, also after white space, gets an apostrophe in front, which spreadsheets read
    as the mark of text (OWASP, CSV Injection). Control characters except line feeds become Python escapes, so no reader
    takes one for the end of a row.
    """
    lines = [printable(line, MAX_CELL) for line in text.split("\n")]
    return "\n".join(f"'{line}" if line.lstrip().startswith(FORMULA_STARTS) else line for line in lines)
