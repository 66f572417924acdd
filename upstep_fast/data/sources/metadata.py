"""metadata.csv and metadata.jsonl of Hugging Face's image folders.

Their column `file_name` is relative to the file's folder; another holds the label. See
https://huggingface.co/docs/datasets/image_dataset; the package `datasets` is not needed.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upstep_fast.data.sources.lists import Row, columns_of_header, csv_cells, read_text, row_of
from upstep_fast.data.sources.part import Columns, Listing, printable
from upstep_fast.errors import DataError, first_line

METADATA = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"

Cells = tuple[list[str], list[tuple[int, list[str]]]]  # header, and rows with their lines


@dataclass(frozen=True)
class Metadata:
    """Rows of one file."""

    path: Path
    folder: bytes  # that of the file, relative to the data's: b"" or b"train/"
    rows: dict[bytes, Row]  # by the image's path, relative to the data's folder
    label: str | None  # column of the classes
    reason: str  # why there is none

    def of_split(self, name: str) -> Metadata:
        """Return the rows whose column `split` holds `name`."""
        return replace(self, rows={path: row for path, row in self.rows.items() if row.split == name})


def read_metadata(root: str, folder: str, columns: Columns, listing: Listing) -> Metadata | None:
    """Return what the file in root/folder says; None without one, or without names of files, which `listing` notes.

    Raises DataError for two such files, for one that cannot be read, and for an image with two labels.
    """
    found = [path for name in METADATA if (path := Path(root, folder, name)).is_file()]
    if len(found) > 1:
        raise DataError(f"data: {found[0].parent} has {' and '.join(METADATA)}; keep one of them")
    if not found:
        return None
    (path,) = found
    text = read_text(path)
    if path.suffix == ".csv":
        header, cells = csv_cells(text.decode("utf-8", "surrogateescape"), path)
    else:
        header, cells = _json_cells(text, path)
    image = columns.image if columns.image in header else FILE_NAME
    if image not in header:
        listing.add_note(f"{path} is not read, as it has no column {FILE_NAME}")
        return None
    known, have = columns_of_header(header, path, Columns(image, columns.label)), ", ".join(header)
    rows = [row_of(row, line, known, path, len(header)) for line, row in cells]
    if rows and all(row.label == "-1" for row in rows):  # how test splits without classes are published
        rows = [replace(row, label=None) for row in rows]
    reason = f"has no column label or class ({path}); it has {have}; name one with --label-column"
    label = header[known["label"]] if "label" in known else None
    return Metadata(path, os.fsencode(folder), _by_path(rows, os.fsencode(folder), path), label, reason)


def _by_path(rows: list[Row], folder: bytes, path: Path) -> dict[bytes, Row]:
    result: dict[bytes, Row] = {}
    for row in rows:
        key = os.path.normpath(folder + row.path.replace(b"\\", b"/"))
        first = result.setdefault(key, row)
        if first.label != row.label:
            lines = f"{first.label} in line {first.line} and {row.label} in line {row.line}"
            raise DataError(f"data: {path}: {printable(row.path)} has two labels: {lines}; keep one of them")
    return result


def _json_cells(text: bytes, path: Path) -> Cells:
    """Return the objects of a JSON-lines file as a table whose header holds the keys of all. Raises DataError."""
    rows = [
        (line, _object(row, f"{path}, line {line}")) for line, row in enumerate(text.split(b"\n"), 1) if row.strip()
    ]
    header = list(dict.fromkeys(key for _, row in rows for key in row))
    return header, [(line, [_text(row.get(key)) for key in header]) for line, row in rows]


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise DataError(f"data: {where}: not valid JSON ({first_line(error)}); write one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"data: {where}: not a JSON object; write one object a line, with the key {FILE_NAME}")
    return row


def _text(value: Any) -> str:
    """Return a class or name as text; empty for what is neither, as boxes and captions of several parts are."""
    return "" if value is None or value != value or isinstance(value, (list, dict)) else str(value)
