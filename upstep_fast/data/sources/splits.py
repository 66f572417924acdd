"""Names of splits, in any case: `train` or `training`, and for testing the first there is of TEST_NAMES.

One rule for folders, tars, the column `split` of a CSV and the splits of an hf: data set: a tree has splits when it has
one of both; without them, all of it is for training, and a folder of such a name is a class. A tree whose only folder
is `train` holds its classes below it.
"""

from __future__ import annotations

from collections.abc import Iterable

from upstep_fast.errors import DataError

SPLITS = ("train", "test")  # what a command asks for
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")
TREE = "train/CLASS/... and test/CLASS/... (or val/, valid/, validation/)"


def is_split(name: str) -> bool:
    """Return whether a name is one of a split."""
    return name.lower() in (*TRAIN_NAMES, *TEST_NAMES)


def is_only_train(names: Iterable[str]) -> bool:
    """Return whether `names`, of the folders at a tree's top, are `train` alone: it then holds the classes."""
    found = [name.lower() for name in names]
    return len(found) == 1 and found[0] in TRAIN_NAMES


def find_splits(names: Iterable[str], where: str) -> dict[str, str] | None:
    """Return {"train": its name, "test": its name}, or None without both. Raises DataError for Test beside test."""
    found: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        if is_split(name):
            found.setdefault(name.lower(), []).append(name)
    train, test = (next((name for name in names if name in found), None) for names in (TRAIN_NAMES, TEST_NAMES))
    if train is None or test is None:
        return None
    for same in (found[train], found[test]):
        if len(same) > 1:
            raise DataError(f"data: {where} has the splits {' and '.join(same)}, equal but for case; rename one")
    return {"train": found[train][0], "test": found[test][0]}


def reading(where: str, chosen: str, names: Iterable[str], folders: bool = True) -> str:
    """Return which split is read and what is left out: "x: train/ is read; left out: test/, val/"."""
    slash = "/" if folders else ""
    rest = sorted(f"{name}{slash}" for name in set(names) if name != chosen)
    more = f" and {len(rest) - 5} more" if len(rest) > 5 else ""
    return f"{where}: {chosen}{slash} is read" + (f"; left out: {', '.join(rest[:5])}{more}" if rest else "")
