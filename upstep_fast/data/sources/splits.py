"""Names of splits, in any case: `train` or `training`, and for testing the first there is of TEST_NAMES.

One rule for folders, tars, the column `split` of a CSV and the splits of an hf: data set: a tree has splits when it has
one of both; without them, all of it is for training, and a folder of such a name is a class. A tree whose only folder
is `train` holds its classes below it.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable

from upstep_fast.errors import DataError

SPLITS = ("train", "test")  # what a command asks for
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation", "holdout")
_LIKE_TRAIN = {*TRAIN_NAMES, "trainset"}
_LIKE_TEST = {*TEST_NAMES, "tests", "testset"}
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


def taken_as_classes(tops: Iterable[str], below: dict[str, set[str]], where: str) -> str:
    """Return a note on folders that look like splits in a tree without splits; empty if there are none.

    tops: folders at the tree's top, which are its classes. below: some of them, and the folders in each.
    """
    tops = sorted(set(tops))
    if _look_like_splits(tops):
        names, cure = tops, "train/ beside test/ is split"
    elif deeper := next((top for top in tops if _look_like_splits(below.get(top, set()))), None):
        names, cure = tops, f"{deeper}/ looks split; only folders at the top are splits"
    else:
        return ""
    shown = ", ".join(f"{name}/" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{where}: no splits found, so {shown} are read as classes, all for training ({cure})"


def all_read(where: str, names: Iterable[str]) -> str:
    """Return the note on rows of several splits that are not train beside one for testing."""
    return (
        f"{where}: no train beside one of {', '.join(TEST_NAMES)}, so all is read: {', '.join(sorted(set(names))[:5])}"
    )


def _look_like_splits(names: Iterable[str]) -> bool:
    """Return whether two names, or the only one, look like those of splits, one of them for testing."""
    names = list(names)
    trains, tests = _alike(names)
    return tests > 0 and (tests + trains > 1 or len(names) == 1)


def _alike(names: Iterable[str]) -> tuple[int, int]:
    """Return how many names have a word for training in them, and how many one for testing."""
    words = [set(re.split(r"[^a-z]+", name.lower())) for name in names]
    trains, tests = (sum(bool(w & like) for w in words) for like in (_LIKE_TRAIN, _LIKE_TEST))
    return trains, tests


def all_paths(matches: Iterable[str | list[str]]) -> str:
    """Return a note on several paths, train-0.tar and test-0.tar, that look like splits; empty if they do not."""
    paths = itertools.chain.from_iterable([match] if isinstance(match, str) else match for match in matches)
    names = [os.path.basename(path.rstrip("/")) for path in paths]
    trains, tests = _alike(names)
    if not trains or not tests:
        return ""
    return f"all {len(names)} paths are for training, {trains} named for training and {tests} for testing"


def reading(where: str, chosen: str, names: Iterable[str], folders: bool = True) -> str:
    """Return which split is read and what is left out: "x: train/ is read; left out: test/, val/"."""
    slash = "/" if folders else ""
    rest = sorted(f"{name or '(empty)'}{slash}" for name in set(names) if name != chosen)
    more = f" and {len(rest) - 5} more" if len(rest) > 5 else ""
    return f"{where}: {chosen}{slash} is read" + (f"; left out: {', '.join(rest[:5])}{more}" if rest else "")
