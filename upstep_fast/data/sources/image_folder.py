"""A folder of images: its splits and classes, by folders or by metadata.csv and metadata.jsonl.

Such a file lies at the top or in the folder of a split. Of the images beside and below it those are read that it
names, in the order of their paths. Without a column of classes in it the folders are the classes.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from upstep_fast.data.sources.folders import Files, children, walk
from upstep_fast.data.sources.metadata import Metadata, read_metadata
from upstep_fast.data.sources.names import Names
from upstep_fast.data.sources.part import IMAGE_SUFFIXES, Columns, Listing, Part, printable, shown_suffix
from upstep_fast.data.sources.splits import find_splits, is_split, reading
from upstep_fast.data.sources.tree import Children, Tree, find_tree


@dataclass(frozen=True)
class Place:
    """Folder of images on this machine or another."""

    root: str
    tables: str  # local folder with its metadata.csv and metadata.jsonl
    children: Children
    files: Callable[[str], Iterable[bytes]]  # images in a folder and below, relative to the root, sorted
    part: Callable[[Names, tuple[str, ...] | None, str], Part]  # names, classes, why there are none


def open_folder(root: str, split: str | None, columns: Columns, listing: Listing) -> list[Part]:
    """Return the part of all images under `root`, or of one split.

    Raises DataError if the folder cannot be read, or as `find_tree` and `read_metadata` do.
    """

    def files(top: str) -> Iterable[bytes]:
        return walk(os.fsencode(root), os.fsencode(top), listing, IMAGE_SUFFIXES)

    place = Place(root, root, functools.cache(children(root)), files, functools.partial(Files, root))
    return open_place(place, split, columns, listing)


def open_place(place: Place, split: str | None, columns: Columns, listing: Listing) -> list[Part]:
    """Return the part of all images of a folder, or of one split. Raises DataError as `open_folder`."""
    root, folders_in = place.root, place.children
    where = printable(os.fsencode(root))
    tree = find_tree(folders_in, None, where, listing.add_note)
    assert isinstance(tree, Tree)
    tables = _tables(place.tables, tree, folders_in, columns, listing)
    words = {row.split for table in tables for row in table.rows.values()}
    by_column = find_splits(words, where) if split else None
    if by_column is None and split:
        tree = find_tree(folders_in, split, where, listing.add_note)
        if isinstance(tree, str):
            listing.without_test.append(tree)
            return []
    names = [name for name in place.files(tree.prefix.rstrip("/")) if tree.keeps(name)]
    if by_column is not None:
        tables = [table.of_split(by_column[split or ""]) for table in tables]
        listing.add_note(reading(str(tables[0].path), by_column[split or ""], words, folders=False))
    return [_part(place, names, tree, tables, listing)]


def _tables(root: str, tree: Tree, folders_in: Children, columns: Columns, listing: Listing) -> list[Metadata]:
    """Return the metadata at the top, in the folders around the tree, and in those of its splits."""
    around = tree.wrapped.split("/")[:-1]
    tops = ["/".join(around[:depth]) + "/" * bool(depth) for depth in range(len(around) + 1)]
    splits = [f"{tree.wrapped}{name}/" for name in sorted(folders_in(tree.wrapped.rstrip("/"))[0]) if is_split(name)]
    found = (read_metadata(root, folder, columns, listing) for folder in (*tops, *splits))
    return [table for table in found if table is not None]


def _part(place: Place, names: Sequence[bytes], tree: Tree, tables: Sequence[Metadata], listing: Listing) -> Part:
    """Return the images that the metadata names, with its classes; those of the folders without it."""
    names, used = _named(names, os.fsencode(tree.prefix), tables, listing)
    if not any(table.label for table in used):
        reason = used[0].reason if used else ""
        return place.part(Names.pack(names, tree.component, tree.under_split), None, reason)
    labels = {name: row.label for table in used for name, row in table.rows.items()}
    classes = [label for name in names if (label := labels.get(name)) is not None]
    if len(classes) == len(names):
        return place.part(Names.pack(names, None), tuple(classes), "")
    reason = f"has {len(names) - len(classes)} images without a label in {used[0].path.name}"
    return place.part(Names.pack(names, None), None, reason)


def _named(
    names: Sequence[bytes], prefix: bytes, tables: Sequence[Metadata], listing: Listing
) -> tuple[Sequence[bytes], list[Metadata]]:
    """Return the images without those that the metadata beside them does not name, and the metadata that names some."""
    there, used = set(names), []
    for table in tables:
        if not (table.folder.startswith(prefix) or prefix.startswith(table.folder)):
            continue  # of another split
        beside = {name for name in names if name.startswith(table.folder)}
        named = beside & table.rows.keys()
        if named:
            used.append(table)
            _say(table, len(named), len(beside), prefix, there, listing)
            names = [name for name in names if name not in beside or name in named]
        else:
            listing.add_note(f"{table.path} names none of the images here and is not read")
    return names, used


def _say(table: Metadata, named: int, beside: int, prefix: bytes, there: set[bytes], listing: Listing) -> None:
    """Note what a table says of the images, and list its rows that have none."""
    classes = f", classes in its column {table.label}" if table.label else ""
    rest = f"; left out: {beside - named:,} that it does not name" if beside > named else ""
    listing.add_note(f"{table.path} names {named:,} images{classes}{rest}")
    listing.others -= Counter({shown_suffix(table.path.name): 1})  # met as a file that is no image
    for name, row in table.rows.items():
        if name.startswith(prefix) and name not in there:
            listing.problems.append((f"{table.path}, line {row.line}: {printable(row.path)}", "no such image"))
