"""Members of archives, tar and zip files: their splits, and which of several members of one name counts.

Names have NUL in place of "/", so that their order as bytes is that of paths, component by component.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from upstep_fast.data.sources.names import NamedPart
from upstep_fast.data.sources.part import ALREADY_LISTED, IMAGE_SUFFIXES, Listing, printable
from upstep_fast.data.sources.tree import Children, Tree, find_tree

Index = TypeVar("Index")


class Members(NamedPart):
    """Images in an archive; the members' names are labels only."""

    path: str
    sizes: np.ndarray  # [N] int64, bytes
    address: str  # of a remote archive, whose content is read from the cache; else empty

    def name(self, index: int) -> str:
        """Return a printable path."""
        return f"{printable(os.fsencode(self.address or self.path))}/{printable(self.names[index])}"

    def sizes_in_bytes(self) -> np.ndarray:
        """Return the members' sizes, [N] int64."""
        return self.sizes

    def identity(self) -> Iterator[bytes]:
        """Yield names and sizes."""
        yield self.names.blob
        yield self.names.ends.tobytes()
        yield self.sizes.tobytes()


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


def choose_split(names_of: Mapping[str, list[bytes]], split: str | None, listing: Listing) -> Tree | None:
    """Return where the members of the split and their classes lie; None for "test" of a tree without splits.

    names_of: members' names by archive; together they are one tree. Raises DataError as `find_tree`.
    """
    paths = list(names_of)
    where = printable(os.fsencode(next(iter(paths), ""))) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    tree = find_tree(children_in(names_of.values()), split, where, listing.add_note)
    if isinstance(tree, str):
        listing.without_test.append(tree)
        return None
    return tree


def children_in(of_archives: Iterable[list[bytes]]) -> Children:
    """Return the function that gives the folders in a folder of the archives, and whether it holds images."""
    folders: dict[str, set[str]] = {}
    paths = [name.rpartition(b"\0")[::2] for names in of_archives for name in names]
    images = {path for path, name in paths if name.lower().endswith(IMAGE_SUFFIXES) and name[:1] != b"."}
    for path in {path for path, _ in paths}:
        parts = os.fsdecode(path).split("\0") if path else []
        for depth, part in enumerate(parts):
            if part.startswith(".") or part == "__MACOSX":
                break
            folders.setdefault("/".join(parts[:depth]), set()).add(part)
    return lambda folder: (folders.get(folder, set()), os.fsencode(folder).replace(b"/", b"\0") in images)


def last_of_each_name(path: str, names: list[bytes], tree: Tree, listing: Listing) -> list[int]:
    """Return the members of `tree` in order of their names, without hidden ones.

    Of several members of one name the last counts, as tar does it; the others go to `listing`.
    """
    kept: list[int] = []
    prefix = os.fsencode(tree.prefix).replace(b"/", b"\0")
    for i in sorted(range(len(names)), key=names.__getitem__):
        if not names[i].startswith(prefix) or names[i].rsplit(b"\0", 1)[-1].startswith(b"."):
            continue
        if tree.inner and not tree.keeps(names[i].replace(b"\0", b"/")):
            continue
        if kept and names[kept[-1]] == names[i]:
            listing.problems.append((label_of(path, names[i]), "replaced by a later member of that name"))
            kept.pop()
        kept.append(i)
    return kept


def label_of(path: str, name: bytes) -> str:
    """Return a member's printable label, with its archive's path unless that is empty."""
    return (f"{printable(os.fsencode(path))}/" if path else "") + printable(name.replace(b"\0", b"/"))
