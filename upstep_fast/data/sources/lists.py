"""Lists of images: a text file with one path a line, or a CSV with a header.

Paths are relative to the list's folder, or absolute. Blank lines and lines that start with "#" are ignored. In a CSV
the path is in the column `path`, `image`, `file`, `filename` or `filepath` (else the first) and the class, if there is
one, in `label` or `class`. The order is that of the list.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

from upstep_fast.data.sources.folders import Files
from upstep_fast.data.sources.part import Names
from upstep_fast.errors import DataError

PATH_COLUMNS = ("path", "image", "file", "filename", "filepath")
LABEL_COLUMNS = ("label", "class")


def read_list(path: Path) -> Files:
    """Return the files of a list. Raises DataError if it cannot be read, is empty, or none of its first paths exist."""
    try:
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"data: cannot read the list {path}: {error.strerror}") from error
    if b"\0" in text[:4096]:
        raise DataError(f"data: {path} is not a text list (it holds NUL bytes); give one path a line")
    if path.suffix.lower() in (".csv", ".tsv"):
        names, classes = _read_csv(text, path)
    else:
        names = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(b"#")]
        classes = None
    root = os.path.dirname(path) or "."
    first = names[:100]
    if not first:
        raise DataError(f"data: the list {path} names no images; write one path a line")
    if not any(os.path.exists(os.path.join(os.fsencode(root), name)) for name in first):
        raise DataError(
            f"data: none of the first {len(first)} paths in {path} exist, e.g. {os.fsdecode(first[0])}; "
            "paths are relative to the list's folder"
        )
    return Files(str(root), Names.pack(names, component=None), classes)


def _read_csv(text: bytes, path: Path) -> tuple[list[bytes], tuple[str, ...] | None]:
    decoded = text.decode("utf-8", "surrogateescape")
    rows = csv.reader(decoded.splitlines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        header = [cell.strip().lower() for cell in next(rows, [])]
        column = next((header.index(name) for name in PATH_COLUMNS if name in header), 0)
        label = next((header.index(name) for name in LABEL_COLUMNS if name in header), None)
        names, classes = [], []
        for row in rows:
            if not row:
                continue
            if len(row) <= max(column, label or 0):
                raise DataError(f"data: {path}, line {rows.line_num}: {len(row)} columns, the header has {len(header)}")
            names.append(os.fsencode(row[column].strip()))
            if label is not None:
                classes.append(row[label].strip())
    except csv.Error as error:
        raise DataError(f"data: {path}, line {rows.line_num}: {error}") from error
    return names, tuple(classes) if label is not None else None
