"""Members of archives, tar and zip files: their splits, and which of several members of one name counts.

Names have NUL in place of "/", so that their order as bytes is that of paths, component by component.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from upstep_fast.data.sources.part import ALREADY_LISTED, Listing, printable
from upstep_fast.data.sources.splits import TREE, find_splits, is_only_train, reading, taken_as_classes

Index = TypeVar("Index")


def opened(paths: list[str], read_index: Callable[[Path], Index], listing: Listing) -> dict[str, Index]:
    """Return {path: index} of the archives that are met for the first time. Raises DataError, as `read_index`."""
    indexes = {}
    for path in paths:
        index = read_index(Path(path))
        if listing.is_new(os.stat(path)):
            indexes[path] = index
        else:
            listing.problems.append((printable(os.fsencode(path)), ALREADY_LISTED))
    return indexes


def choose_split(names_of: Mapping[str, list[bytes]], split: str | None, listing: Listing) -> tuple[bytes, bool] | None:
    """Return (what the names of the split's members start with, whether classes lie below a split).

    names_of: members' names by archive; together they are one tree. Returns None for "test" of a tree without splits.
    """
    tops = {name.split(b"\0", 1)[0] for names in names_of.values() for name in names if b"\0" in name}
    folders, paths = {os.fsdecode(top) for top in tops}, list(names_of)
    where = printable(os.fsencode(next(iter(paths), ""))) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    splits = find_splits(folders, where)
    if split == "test" and splits is None:
        have = ", ".join(f"{printable(top)}/" for top in sorted(tops)[:5]) or "no folders"
        listing.without_test.append(f"it must hold {TREE}, and has {have}")
        return None
    prefix = b""
    if split and splits is not None:
        prefix = os.fsencode(splits[split]) + b"\0"
        listing.notes.append(reading(where, splits[split], map(printable, tops)))
    elif split:
        listing.add_note(taken_as_classes(map(printable, tops), _folders_below(names_of.values()), where))
    return prefix, splits is not None or is_only_train(folders)


def _folders_below(of_archives: Iterable[list[bytes]]) -> dict[str, set[str]]:
    """Return {folder at the top: names of the folders in it}."""
    below: dict[str, set[str]] = {}
    for path in {tuple(name.split(b"\0", 3)[:2]) for names in of_archives for name in names if name.count(b"\0") > 1}:
        below.setdefault(printable(path[0]), set()).add(printable(path[1]))
    return below


def last_of_each_name(path: str, names: list[bytes], prefix: bytes, listing: Listing) -> list[int]:
    """Return the members under `prefix` in order of their names, without hidden ones.

    Of several members of one name the last counts, as tar does it; the others go to `listing`.
    """
    kept: list[int] = []
    for i in sorted(range(len(names)), key=names.__getitem__):
        if not names[i].startswith(prefix) or names[i].rsplit(b"\0", 1)[-1].startswith(b"."):
            continue
        if kept and names[kept[-1]] == names[i]:
            listing.problems.append((label_of(path, names[i]), "replaced by a later member of that name"))
            kept.pop()
        kept.append(i)
    return kept


def label_of(path: str, name: bytes) -> str:
    """Return a member's printable label, with its archive's path unless that is empty."""
    return (f"{printable(os.fsencode(path))}/" if path else "") + printable(name.replace(b"\0", b"/"))
