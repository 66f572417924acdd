"""Several files replaced together: a kill at any moment leaves the old files or the new ones, never a mixture.

    .tmp-PID-NAME       each new file, whole and on disk
    .commit-NAME.json   of the last file: the list of temporary and final names; from here on the new files hold
    the last file is deleted, the others are replaced, the last is put in place, the list is deleted

A kill before the list leaves the old files; one after it is completed by `settle`, which the next writer calls. In
between the last file is missing, so that a reader of both never pairs an old file with a new one.

A folder is exchanged with the old one in one call where the system has it (Linux); elsewhere the old one is first
renamed to .old-NAME, where `settle_folder` finds it after a kill in between.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from upstep_fast.errors import ConfigError
from upstep_fast.input_files import read_json
from upstep_fast.runtime.atomic_file import sync_folder, temporary_of, write_atomic, write_synced

log = logging.getLogger("upstep_fast")


Content = bytes | Callable[[BinaryIO], object]  # as for `write_atomic`


def commit_together(contents: Mapping[Path, Content]) -> None:
    """Write files together; the last is the one that readers open first.

    Raises OSError; before the commit all files then have their old content.
    """
    *_, last = contents
    if len(contents) == 1:
        write_atomic(last, contents[last])
        return
    moves = {temporary_of(path): path for path in contents}
    journal = _journal(last)
    try:
        for temporary, path in moves.items():
            write_synced(temporary, contents[path])
        text = json.dumps([[str(temporary), str(path)] for temporary, path in moves.items()])
        write_atomic(journal, text.encode())
    except BaseException:
        for temporary in moves:
            temporary.unlink(missing_ok=True)
        raise
    _complete(moves, journal)


def settle(paths: list[Path], field: str) -> None:
    """Complete a commit of the same `paths` that was killed. field: the flag of the last, for messages.

    Raises ConfigError if the killed commit was of other files, and OSError.
    """
    journal = _journal(paths[-1])
    if not journal.exists():
        return
    moves, cure = _moves(read_json(journal, field)), f"repeat the command that wrote {paths[-1]}, or delete {journal}"
    if moves is None or not set(moves.values()) <= set(paths):
        named = ", ".join(map(str, moves.values())) if moves else "unknown files"
        raise ConfigError(f"{field}: a write of {named} was killed halfway; {cure}")
    _complete(moves, journal)
    log.warning("%s: completed a write of %s that was killed", field, ", ".join(map(str, moves.values())))


def _journal(last: Path) -> Path:
    return last.with_name(f".commit-{last.name}.json")


def _moves(found: Any) -> dict[Path, Path] | None:
    """Return {temporary: final} of a list; None if it is none that `commit_together` writes."""
    try:
        moves = {Path(temporary): Path(path) for temporary, path in found}
    except (TypeError, ValueError):
        return None
    own = all(t.parent == p.parent and t.name.startswith(".tmp-") and t.name.endswith(p.name) for t, p in moves.items())
    return moves if moves and own else None


def _complete(moves: Mapping[Path, Path], journal: Path) -> None:
    *others, last = moves.items()
    if last[0].exists():
        last[1].unlink(missing_ok=True)
        for temporary, path in (*others, last):
            if temporary.exists():  # else it was in place before the kill
                os.replace(temporary, path)
                sync_folder(path.parent)
    journal.unlink()


def replace_folder(new: Path, folder: Path) -> None:
    """Force the files of `new` to disk and put it in place of `folder`, a folder or nothing. Raises OSError."""
    for path in (*new.iterdir(), new):
        _sync(path)
    if not folder.exists():
        os.replace(new, folder)
    elif not _exchange(new, folder):
        aside = _aside(folder)
        os.replace(folder, aside)
        os.replace(new, folder)
        new = aside
    sync_folder(folder.parent)
    shutil.rmtree(new, ignore_errors=True)  # the old one, if there was one


def settle_folder(folder: Path) -> None:
    """Put back the old folder of a `replace_folder` that was killed between its two renames. Raises OSError."""
    if _aside(folder).is_dir() and not folder.exists():
        os.replace(_aside(folder), folder)
        log.warning("out: put back %s, whose replacement was killed", folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".old-{folder.name}")


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    at_cwd, exchange = -100, 2
    with contextlib.suppress(OSError, AttributeError, TypeError):
        call = ctypes.CDLL(None).renameat2
        return call(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0
    return False


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
        return
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
