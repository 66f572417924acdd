"""Where the splits and classes of a tree of images lie.

train/CLASS/... beside test/CLASS/... at its top, or CLASS/train/... and CLASS/test/... in every class, or CLASS/...
alone. A folder that is the only one, with folders in it and no images beside it, is entered, so that
photos/train/CLASS/... in a folder or archive is read as train/CLASS/... .
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from upstep_fast.data.sources.splits import TREE, find_splits, is_only_train, is_split, reading, taken_as_classes
from upstep_fast.errors import DataError

MAX_WRAPPED = 8  # folders that are entered; a link to its own folder has no end
_LOOKED_AT = 8  # classes whose folders are looked at before all are

Children = Callable[[str], tuple[set[str], bool]]  # folder -> (names of the folders in it, whether it holds images)


@dataclass(frozen=True)
class Tree:
    """Where the images of one split lie, and their classes; paths are relative, with "/"."""

    wrapped: str = ""  # the folders around the tree: "" or "photos/"
    prefix: str = ""  # what the paths of the images start with: `wrapped` and a split's folder, or empty
    component: int = 0  # index of the folder that is the class
    under_split: bool = False  # whether the folder before the class is a split
    inner: str = ""  # folder of each class that is read; empty: all of the class

    def keeps(self, name: bytes) -> bool:
        """Return whether the path of an image under `prefix` is of the split."""
        if not self.inner:
            return True
        folders = name.split(b"/")[:-1]
        return len(folders) > self.component + 1 and os.fsdecode(folders[self.component + 1]) == self.inner


def find_tree(children: Children, split: str | None, where: str, say: Callable[[str], None]) -> Tree | str:
    """Return where the images of `split` are, or, for "test" of a tree without splits, what it would need.

    say: takes notes on what is read. Raises DataError for splits that only some classes have.
    """
    wrapped, folders = _entered(children)
    if wrapped:
        say(f"{where}: its only folder {shown(wrapped)} is entered")
        where = f"{where.rstrip('/')}/{shown(wrapped.rstrip('/'))}"
    depth, splits = wrapped.count("/"), find_splits(folders, where)
    inner = None if splits else _splits_of_classes(children, wrapped, folders, split, where, say)
    if inner is not None:
        return Tree(wrapped, "", depth, inner=inner.get(split or "", ""))
    if split == "test" and splits is None:
        have = ", ".join(f"{shown(name)}/" for name in sorted(folders)[:5]) or "no folders"
        return f"it must hold {TREE}, and has {have}"
    top = ""
    if split and splits is not None:
        top = splits[split] + "/"
        say(reading(where, shown(splits[split]), map(shown, folders)))
    elif split:
        below = {shown(name): children(wrapped + name)[0] for name in sorted(folders)[:_LOOKED_AT]}
        say(taken_as_classes(map(shown, folders), below, where))
    under_split = splits is not None or is_only_train(folders)
    return Tree(wrapped, wrapped + top if top else "", depth + under_split, under_split)


def _entered(children: Children) -> tuple[str, set[str]]:
    """Return the folders around the tree, "" or "photos/2019/", and the names of the folders at its top."""
    wrapped, (folders, has_images) = "", children("")
    for _ in range(MAX_WRAPPED):
        only = next(iter(folders), "")
        if has_images or len(folders) != 1 or is_split(only):
            break
        inner, images_in_it = children(wrapped + only)
        if not inner:  # the only class
            break
        wrapped, folders, has_images = f"{wrapped}{only}/", inner, images_in_it
    return wrapped, folders


def _splits_of_classes(
    children: Children, wrapped: str, folders: Iterable[str], split: str | None, where: str, say: Callable[[str], None]
) -> dict[str, str] | None:
    """Return {"train": its folder, "test": its folder} of every class; None if the classes hold no splits.

    Raises DataError if only some do and "test" is asked for, as images for testing would be learned from.
    """
    names = sorted(folders)
    below = {name: children(wrapped + name)[0] for name in names[:_LOOKED_AT]}
    if not any(find_splits(inner, f"{where}/{shown(name)}") for name, inner in below.items()):
        return None
    below |= {name: children(wrapped + name)[0] for name in names[_LOOKED_AT:]}
    together = set().union(*below.values())
    splits = find_splits(together, f"{where}/CLASS")
    without = [name for name, inner in below.items() if not any(map(is_split, inner))]
    if without and split == "test":
        first = next(name for name in names if name not in without)
        raise DataError(
            f"data: {where}: {shown(first)}/ has splits in it and {shown(without[0])}/ has none; write {TREE}"
        )
    if without or splits is None:
        return None
    if split is not None:
        say(reading(f"{where}/CLASS", shown(splits[split]), map(shown, together)))
    return splits


def shown(name: str) -> str:
    """Return a path as text that can be encoded."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
