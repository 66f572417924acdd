"""Lists of images: a text file with one path a line, or a CSV.

Paths are relative to the list's folder, absolute, or addresses (s3://, https:// ...). Blank lines and lines that start
with "#" and name no file are ignored. A CSV's header names the column of paths, one of PATH_COLUMNS or --image-column
(else it is the first), that of the classes, one of LABEL_COLUMNS or --label-column, and, with a column `split`, which
rows are for training and which for testing. A CSV whose first line holds a path has no header: it is the column of
paths, and the other of two columns is the class. The order is that of the list.
"""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass, replace
from pathlib import Path

from upstep_fast.data.remote.address import PROTOCOLS, is_address, joined, shown
from upstep_fast.data.sources.folders import Files
from upstep_fast.data.sources.names import Names
from upstep_fast.data.sources.part import ALREADY_LISTED, IMAGE_SUFFIXES, Columns, Listing, Part, open_data, printable
from upstep_fast.data.sources.remote_files import RemoteFiles
from upstep_fast.data.sources.splits import TEST_NAMES, TRAIN_NAMES, all_read, find_splits, reading
from upstep_fast.errors import DataError

LIST_SUFFIXES = (".txt", ".lst", ".csv", ".tsv")
PATH_COLUMNS = ("path", "image", "file", "filename", "filepath", "file_name", "file_path", "image_path", "image_name")
LABEL_COLUMNS = ("label", "class")
MAX_LIST_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Row:
    """Row of a list."""

    line: int
    path: bytes
    label: str | None = None
    split: str = ""


@dataclass(frozen=True)
class _Table:
    rows: list[Row]
    reason: str  # why it has no labels, if it has none
    cure: str  # if none of the paths exist
    other: str = ""  # a column that holds splits and is not called split


def read_list(path: Path, split: str | None, columns: Columns, listing: Listing, root: str = "") -> list[Part]:
    """Return the files of a list, or those of one split. root: address of the folder that a remote list lies in.

    Raises DataError if it cannot be read, is empty, none of its first paths exist, or it contradicts itself.
    """
    table = _table(path, columns)
    if root:
        rows = [replace(row, path=os.fsencode(joined(root, os.fsdecode(row.path)))) for row in table.rows]
        table = replace(table, rows=rows)
    _check_paths(path, table)
    rows, values = table.rows, {row.split for row in table.rows}
    splits = find_splits(values, str(path))
    if split and table.other:
        listing.add_note(f"{path}: the column {table.other} holds splits and is not read; call it split")
    if split and splits is None:
        _check_split_words(path, split, values, listing)
    if split == "test" and splits is None:
        need = "a CSV with the columns path,label,split, and train and test (or val, valid, validation) in split"
        listing.without_test.append(f"it must be {need}")
        return []
    if split and splits is not None:
        listing.notes.append(reading(str(path), splits[split], {row.split for row in rows}, folders=False))
        rows = [row for row in rows if row.split == splits[split]]
    return [_part(path, _once(path, rows, listing), table.reason)]


def _check_split_words(path: Path, split: str, values: set[str], listing: Listing) -> None:
    """Raise DataError if a column `split` is filled and says of no row that it is for training."""
    words = sorted(values - {""})
    if words and not any(word.lower() in TRAIN_NAMES for word in words):
        have = ", ".join(words[:5]) + (f" and {len(words) - 5} more" if len(words) > 5 else "")
        raise DataError(
            f"data: no {split} images in {path}: its column split holds {have}; "
            f"it must hold {' or '.join(TRAIN_NAMES)} "
            f"and one of {', '.join(TEST_NAMES)}; rename them, or the column if it is not for that"
        )
    if words and len(values) > 1:
        listing.add_note(all_read(str(path), (value or "(empty)" for value in values)))


def _part(path: Path, rows: list[Row], reason: str) -> Files:
    classes = [row.label for row in rows if row.label is not None]
    if classes and len(classes) < len(rows):
        first = next(row.line for row in rows if row.label is None)
        reason = f"has {len(rows) - len(classes)} images without a label ({path.name}, first in line {first})"
    names = Names.pack([row.path for row in rows], component=None)
    kind = RemoteFiles if any(is_address(row.path) for row in rows) else Files
    return kind(os.path.dirname(path) or ".", names, tuple(classes) if len(classes) == len(rows) else None, reason)


def _table(path: Path, columns: Columns) -> _Table:
    text = read_text(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        return _read_csv(text.decode("utf-8", "surrogateescape"), path, columns)
    rows = [Row(line, name.strip()) for line, name in enumerate(text.splitlines(), 1) if name.strip()]
    rows = [row for row in rows if not row.path.startswith(b"#") or _exists(path, row.path)]
    reason = f"is a list without classes ({path.name}); write a CSV with the columns path,label"
    return _Table(rows, reason, "paths are relative to the list's folder")


def read_text(path: Path) -> bytes:
    """Return the bytes of a text file of at most MAX_LIST_BYTES, without a byte order mark. Raises DataError."""
    with open_data(path) as file:
        text = file.read(MAX_LIST_BYTES + 1).removeprefix(b"\xef\xbb\xbf")
    if len(text) > MAX_LIST_BYTES:
        raise DataError(f"data: the list {path} has more than {MAX_LIST_BYTES} bytes; give several lists")
    if b"\0" in text:
        raise DataError(f"data: {path} is not a text list (it holds NUL bytes); give one path a line, in UTF-8")
    return text


def _place(path: Path, name: bytes) -> bytes:
    return name if is_address(name) else os.path.join(os.fsencode(os.path.dirname(path) or "."), name)


def _exists(path: Path, name: bytes) -> bool:
    """Return whether a file is there; of an address that is told when it is read."""
    return is_address(name) or os.path.exists(_place(path, name))


def _check_paths(path: Path, table: _Table) -> None:
    """Raise DataError if there are no rows, or none of the first paths exist."""
    first = [row.path for row in table.rows[:100]]
    if not first:
        raise DataError(f"data: the list {path} names no images; write one path a line")
    if any(_exists(path, name) for name in first):
        return
    cure = table.cure
    if any(os.path.exists(_place(path, name.rsplit(None, 1)[0])) for name in first):
        is_csv = path.suffix.lower() in (".csv", ".tsv")
        split_by = "separate its columns by commas" if is_csv else "write a CSV instead, with the columns path,label"
        cure = f"its lines hold a path and a label; {split_by}"
    elif any(os.path.exists(_place(path, name.replace(b"\\", b"/"))) for name in first):
        cure = "write / instead of \\ in its paths"
    elif b"://" in first[0]:
        cure = f"addresses of this kind are not read; read are {', '.join(f'{name}://' for name in PROTOCOLS)}"
    example = shown(printable(first[0]))
    raise DataError(f"data: none of the first {len(first)} paths in {path} exist, e.g. {example}; {cure}")


def _once(path: Path, rows: list[Row], listing: Listing) -> list[Row]:
    """Return the rows without repeated paths. Raises DataError if a path is repeated with another label."""
    known: dict[bytes, Row] = {}
    for row in rows:
        key, label = row.path if is_address(row.path) else os.path.normpath(row.path), row.label
        first = known.get(key)
        if first is None and _is_new(path, row.path, listing):
            known[key] = row
            continue
        name = shown(printable(row.path))
        if first is not None and first.label != label:
            lines = f"{first.label} in line {first.line} and {label} in line {row.line}"
            raise DataError(f"data: {path}: {name} has two labels: {lines}; keep one of them")
        listing.problems.append((f"{path}, line {row.line}: {name}", ALREADY_LISTED))
    return list(known.values())


def _is_new(path: Path, name: bytes, listing: Listing) -> bool:
    if not is_address(name):
        return listing.is_new_file(os.fsdecode(_place(path, name)))
    address = os.fsdecode(name)
    is_new = address not in listing.seen
    if listing.several:
        listing.seen.add(address)
    return is_new


def csv_cells(text: str, path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the first row of a CSV, and the others with the lines they end in. Raises DataError."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text.split("\n", 1)[0], path))
    try:
        header = [cell.strip() for cell in next(reader, [])]
        return header, [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise DataError(f"data: {path}, line {reader.line_num}: {error}") from error


def _read_csv(text: str, path: Path, columns: Columns) -> _Table:
    """Return the rows of a CSV. Raises DataError."""
    header, cells = csv_cells(text, path)
    known, have = columns_of_header(header, path, columns), ", ".join(header)
    reason = f"has no column label or class ({path.name}); it has {have}; name one with --label-column"
    cure = "paths are relative to the list's folder"
    if "path" in known and columns.image is None and len(header) > 1:
        cure += f", and were read from the column {header[known['path']]}; it has {have}; --image-column names another"
    if "path" not in known:
        if (at := _path_in(header, path)) is not None:  # no header, but an image's path
            cells = [(1, header), *cells]
            known = {"path": at} | ({"label": 1 - at} if len(header) == 2 else {})
            reason = f"has no header ({path.name}); write a first line such as path,label"
        else:
            known["path"] = 0
            cure = f"no column is called path, so the first was taken; it has {have}; name one with --image-column"
    return _Table(
        [row_of(row, line, known, path, len(header)) for line, row in cells],
        reason,
        cure,
        _other_splits(header, cells, known),
    )


def _delimiter(first: str, path: Path) -> str:
    """Return what separates the columns of a CSV: the first of these in its first line, unless that is a path."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    is_path = os.path.isfile(_place(path, os.fsencode(first.strip())))
    return "," if is_path else next((d for d in ",;\t|" if d in first), ",")


def _other_splits(header: list[str], cells: list[tuple[int, list[str]]], known: dict[str, int]) -> str:
    """Return the name of a column that holds train beside one for testing where none is called split; else ""."""
    for i, name in enumerate(header):
        if "split" not in known and i not in known.values():
            values = {row[i].strip().lower() for _, row in cells[:100_000] if len(row) > i}
            if values & {*TRAIN_NAMES} and values & {*TEST_NAMES}:
                return name or f"{i + 1}"
    return ""


def _path_in(cells: list[str], path: Path) -> int | None:
    """Return which cell is an image's path: the first that exists, else the first that ends as one; None if none is."""
    names = [os.fsencode(cell) for cell in cells]
    there = (i for i, name in enumerate(names) if name and (is_address(name) or os.path.isfile(_place(path, name))))
    return next(there, next((i for i, name in enumerate(names) if name.lower().endswith(IMAGE_SUFFIXES)), None))


def columns_of_header(header: list[str], path: Path, columns: Columns) -> dict[str, int]:
    """Return the indices of the columns "path", "label" and "split" that there are. Raises DataError."""
    lower = [name.lower() for name in header]
    found = {}
    for field, flag, given, names in (
        ("path", "image-column", columns.image, PATH_COLUMNS),
        ("label", "label-column", columns.label, LABEL_COLUMNS),
        ("split", "", None, ("split",)),
    ):
        if given is not None and given not in header:
            raise DataError(f"data: {path} has no column {given} (--{flag}); it has {', '.join(header)}")
        if given is not None:
            found[field] = header.index(given)
        elif name := next((name for name in names if name in lower), None):
            found[field] = lower.index(name)
    return found


def row_of(cells: list[str], line: int, columns: dict[str, int], path: Path, width: int) -> Row:
    """Return a row of a table of `width` columns. Raises DataError for one without a path, or too short."""
    if len(cells) <= max(columns.values()):
        raise DataError(f"data: {path}, line {line}: {len(cells)} columns, the header has {width}")
    name, label, split = (
        cells[columns[c]].strip(" \t\r\n") if c in columns else "" for c in ("path", "label", "split")
    )
    if not name:
        raise DataError(f"data: {path}, line {line}: the path is empty")
    return Row(line, os.fsencode(name), printable(os.fsencode(label)) or None, split)
