"""An index in a folder: written in parts, extended, and checked when it is read.

The folder holds

    index.json                      facts, and the parts with their rows and digests; written last, atomically
    part-START-DIGEST.npy, .txt     unit vectors and names of one `save`, as `embed` writes them
    lists-DIGEST.safetensors        the lists of an approximate index
    index.lock                      held while a process writes
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upstep_fast.data.sources.lines import name_line
from upstep_fast.errors import ConfigError, DataError
from upstep_fast.evaluation.feature_files.facts import parts_of
from upstep_fast.evaluation.feature_files.table import FeatureTable, read_features
from upstep_fast.evaluation.search import approximate
from upstep_fast.evaluation.search.approximate import InvertedLists, digest_of
from upstep_fast.input_files import read_json
from upstep_fast.runtime.atomic_file import write_atomic, write_errors
from upstep_fast.runtime.file_lock import locked

MANIFEST, LOCK, VERSION = "index.json", "index.lock", 1


@dataclass(frozen=True, eq=False)
class Content:
    """Content of an index folder."""

    table: FeatureTable  # of unit vectors
    lists: InvertedLists | None


def save(content: Content, folder: Path) -> None:
    """Write an index to a folder; one that is there is extended by the images that it lacks.

    Raises DataError if the folder holds another index, ConfigError if it holds other files or is being written.
    """
    with write_errors(folder, "what was there is unchanged; make room, or give another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK, f"index: {folder} is being written by another process; wait for it"):
            manifest = _manifest_to_extend(folder, content.table)
            start = sum(part["rows"] for part in manifest["parts"])
            if start < len(content.table) or not manifest["parts"]:
                manifest["parts"].append(_write_part(folder, start, content.table))
            manifest["lists"] = None
            if content.lists is not None:
                manifest["lists"] = f"lists-{content.lists.digest[:16]}.safetensors"
                approximate.write(content.lists, folder / manifest["lists"])
            write_atomic(folder / MANIFEST, json.dumps(manifest).encode())
            _remove_others(folder, manifest)


def read(folder: Path) -> Content:
    """Return what `save` wrote. Raises ConfigError if there is no index, DataError if it is damaged."""
    manifest = _read_manifest(folder)
    tables = [_read_part(folder, part) for part in manifest["parts"]]
    if len({table.x.shape[1:] for table in tables}) > 1:
        raise DataError(f"index: {folder} has parts of several widths; make it again")
    names = tuple(name for table in tables for name in table.names)
    x, lists = np.concatenate([table.x for table in tables]), None
    if manifest["lists"] and approximate.is_installed():
        lists = approximate.read(folder / manifest["lists"])
        if lists.digest != digest_of(names, x):
            raise DataError(f"index: {folder / manifest['lists']} is of other images; make the index again")
    return Content(FeatureTable(names, x, manifest["facts"]), lists)


def require_same(facts: dict[str, Any], others: dict[str, Any]) -> None:
    """Raise DataError if two features are of different models or forms; features without facts are not compared."""
    ours, theirs = _identity(facts), _identity(others)
    for key in ours:
        if key in theirs and ours[key] != theirs[key]:
            raise DataError(
                f"index: its features have the {key} {ours[key]}, these {theirs[key]}; embed all images by one model"
            )


def _identity(facts: dict[str, Any]) -> dict[str, str]:
    """Return the facts in which all features of an index agree: the parts of the fingerprint, and the form."""
    form = {"form": str(facts["form"])} if "form" in facts else {}
    return parts_of(facts.get("fingerprint")) | form


def _manifest_to_extend(folder: Path, table: FeatureTable) -> dict[str, Any]:
    """Return the manifest of the folder's index, whose images the table must begin with; a new one if it is empty."""
    if not (folder / MANIFEST).exists():
        others = sorted(path.name for path in folder.iterdir() if not _is_own(path.name))
        if others:
            raise ConfigError(f"index: {folder} holds other files, such as {others[0]}; give a new folder")
        return {"version": VERSION, "facts": table.facts, "parts": [], "lists": None}
    manifest, start = _read_manifest(folder), 0
    require_same(manifest["facts"], table.facts)
    for part in manifest["parts"]:
        rows = slice(start, start := start + part["rows"])
        if digest_of(table.names[rows], table.x[rows]) != part["digest"]:
            raise DataError(f"index: {folder} holds an index of other images; give another folder")
    return manifest


def _is_own(name: str) -> bool:
    """Return whether a file is the lock, or what a killed `save` left."""
    return name == LOCK or name.startswith((".tmp-", "part-", "lists-"))


def _remove_others(folder: Path, manifest: dict[str, Any]) -> None:
    """Remove what killed and earlier writers left."""
    parts = [Path(part["file"]) for part in manifest["parts"]]
    kept = {LOCK, manifest["lists"], *(part.name for part in parts), *(part.with_suffix(".txt").name for part in parts)}
    for path in folder.iterdir():
        if path.name not in kept and _is_own(path.name):
            path.unlink()


def _write_part(folder: Path, start: int, table: FeatureTable) -> dict[str, Any]:
    names, x = table.names[start:], table.x[start:]
    digest = digest_of(names, x)
    path = folder / f"part-{start:09}-{digest[:16]}.npy"
    write_atomic(path.with_suffix(".txt"), "".join(f"{name_line(name)}\n" for name in names).encode())
    write_atomic(path, lambda file: np.save(file, x))
    return {"file": path.name, "rows": len(x), "bytes": path.stat().st_size, "digest": digest}


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        raise ConfigError(f"index: {folder} holds no index; save one there first")
    manifest = read_json(path, "index")
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise DataError(f"index: {path} is of another version of upstep-fast, or no index; make it again")
    if not _is_valid(manifest):
        raise DataError(f"index: {path} is damaged; make the index again")
    return manifest


def _is_valid(manifest: dict[str, Any]) -> bool:
    parts, lists = manifest.get("parts"), manifest.get("lists")
    if not isinstance(manifest.get("facts"), dict) or not isinstance(parts, list) or not parts:
        return False
    kinds = {"file": str, "rows": int, "bytes": int, "digest": str}
    if not all(
        isinstance(part, dict) and all(type(part.get(key)) is kind for key, kind in kinds.items()) and part["rows"] >= 0
        for part in parts
    ):
        return False
    files = [part["file"] for part in parts] + ([] if lists is None else [lists])
    # a name of this folder only
    return all(isinstance(file, str) and file == Path(file).name and _is_own(file) for file in files)


def _read_part(folder: Path, part: dict[str, Any]) -> FeatureTable:
    """Return the names and unit vectors of a part; its size and digest are those that were written."""
    path = folder / part["file"]
    try:
        if path.stat().st_size != part["bytes"]:
            raise DataError(f"index: {path} has {path.stat().st_size} bytes, {part['bytes']} were written")
        table = read_features(path) if part["rows"] else FeatureTable((), np.load(path), {})
    except (OSError, DataError) as error:
        reason = str(error).removeprefix("index: ").removeprefix("features: ")
        raise DataError(f"index: {reason}; make the index again") from error  # the reason names the file
    if digest_of(table.names, table.x) != part["digest"]:
        raise DataError(f"index: {path} is not what was written; make the index again")
    return table
