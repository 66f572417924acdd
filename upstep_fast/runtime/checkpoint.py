"""Atomic checkpoints: written to a temporary folder, forced to disk, renamed, and verified when read.

    folder/step-00001200/   manifest.json and the files it names, each with its size and SHA-256
    folder/latest           name of the newest checkpoint: a hint for people, never read here

A save writes to .tmp-<step>-<pid>, the manifest last, with an fsync of every file, of the folder and, after the rename,
of its parent; only then are older checkpoints deleted. A kill at any moment therefore leaves the previous checkpoint
intact. The manifest carries its own hash too. Only JSON is parsed here, nothing is unpickled. The hashes detect
accidents; they are not a signature against someone who can write to the folder (SECURITY.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upstep_fast.errors import ConfigError, RunFailedError
from upstep_fast.runtime.atomic_file import sync_folder

log = logging.getLogger("upstep_fast")

FORMAT = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20
_NAME = re.compile(r"step-(\d{8,12})", re.ASCII)
_FILE = re.compile(r"[a-z0-9_][a-z0-9_.]*")
# a checkpoint, one set aside, the hint `latest`, a file of `atomic_file.write_atomic`; each with the process's number
_TEMPORARY = re.compile(
    r"\.tmp-(\d+-\d+|old-step-\d{8,12}-\d+|latest-\d+|\d+-[a-z_]+\.(bin|csv|html|jsonl?|safetensors|toml))", re.ASCII
)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: the manifest without its hash, and the verified bytes of its files."""

    path: Path
    step: int
    manifest: dict[str, Any]
    files: dict[str, bytes]


class DamagedError(Exception):
    """The reason why a checkpoint is incomplete or damaged."""


class Writer:
    """Background writer: saves in a thread, one checkpoint at a time, and keeps the newest `keep`."""

    def __init__(self, keep: int = 2) -> None:
        self._keep = keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upstep-checkpoint")
        self._pending: Future[Path] | None = None

    def save(
        self, folder: Path, step: int, make_files: Callable[[], Mapping[str, bytes]], manifest: Mapping[str, Any]
    ) -> None:
        """Wait for the previous save, then start `save` in the thread. Raises what the previous save raised.

        make_files: called in the thread, so it must read a copy of the state.
        """
        self.wait()
        self._pending = self._pool.submit(lambda: save(folder, step, make_files(), manifest, self._keep))

    def wait(self) -> None:
        """Wait until the save in progress is on disk. Raises OSError if the disk refused it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)


def save(folder: Path, step: int, files: Mapping[str, bytes], manifest: Mapping[str, Any], keep: int = 2) -> Path:
    """Write step-XXXXXXXX with `files` and `manifest` to an existing folder, and delete old checkpoints.

    The newest `keep` up to `step` remain. Checkpoints of later steps are deleted too: they are damaged, and the run
    resumed from an earlier one. Raises OSError if the disk refuses; the previous checkpoints then remain, and the
    unfinished one is deleted.
    """
    body = {
        **manifest,
        "format": FORMAT,
        "step": step,
        "files": {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()},
    }
    text = json.dumps({**body, "sha256": _sha256(_canonical(body))}, indent=1)
    final, temporary = folder / f"step-{step:08d}", folder / f".tmp-{step}-{os.getpid()}"
    try:
        temporary.mkdir()
        for name, data in files.items():
            _write(temporary / name, data)
        _write(temporary / MANIFEST, text.encode())
        sync_folder(temporary)
        if os.path.lexists(final):  # an earlier one, or whatever lies in its place
            _remove(final)
        os.replace(temporary, final)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _write_hint(folder, final.name)
    checkpoints = sorted(_checkpoints(folder), reverse=True)
    kept = [path for saved_step, path in checkpoints if saved_step <= step][:keep]
    for _, path in checkpoints:
        if path not in kept:
            _remove(path)
    return final


def newest(folder: Path) -> Checkpoint | None:
    """Return the newest intact checkpoint in `folder`; None if the folder holds no checkpoint.

    Logs a warning for each damaged checkpoint. Raises RunFailedError if all are damaged, ConfigError if the newest was
    written by a later version of this package.
    """
    damaged = []
    for _, path in sorted(_checkpoints(folder), reverse=True):
        try:
            return load(path)
        except DamagedError as error:
            log.warning("resume: %s is damaged (%s); trying the previous checkpoint", path, error)
            damaged.append(f"{path.name}: {error}")
    if damaged:
        raise RunFailedError(
            f"resume: every checkpoint in {folder} is damaged ({'; '.join(damaged[:3])}); start again with --overwrite"
        )
    return None


def load(path: Path) -> Checkpoint:
    """Return the checkpoint in folder `path`. Raises DamagedError; ConfigError if its format is newer than FORMAT."""
    body = _manifest(path)
    files = {name: _verified(path, name, facts) for name, facts in body["files"].items()}
    return Checkpoint(path, body["step"], body, files)


def recorded(folder: Path) -> dict[str, Any] | None:
    """Return the newest intact manifest in `folder`, without the files it names; None if there is none.

    Raises ConfigError if it was written by a later version of this package.
    """
    for _, path in sorted(_checkpoints(folder), reverse=True):
        with contextlib.suppress(DamagedError):
            return _manifest(path)
    return None


def _manifest(path: Path) -> dict[str, Any]:
    if path.is_symlink():
        raise DamagedError("a link, not a folder")
    try:
        body: dict[str, Any] = json.loads(_read(path / MANIFEST, MAX_MANIFEST_BYTES))
        digest = body.pop("sha256")
        canonical = _canonical(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read: {type(error).__name__}: {error}") from error
    # checked before the format number, so every later format must keep this hash
    if digest != _sha256(canonical):
        raise DamagedError(f"{MANIFEST} does not match its SHA-256")
    version, step, named = body.get("format"), body.get("step"), body.get("files")
    if not isinstance(version, int) or version < 1 or not isinstance(named, dict):
        raise DamagedError(f"{MANIFEST} was not written by upstep_fast")
    if version > FORMAT:
        raise ConfigError(
            f"resume: {path} has format {version}, this version reads up to {FORMAT}; use a newer upstep_fast"
        )
    if _step(path) != step:
        raise DamagedError(f"{MANIFEST} belongs to step {step}")
    return body


def is_temporary(path: Path) -> bool:
    """Return whether `path` is named as an unfinished file or folder of a run, and is no link."""
    return bool(_TEMPORARY.fullmatch(path.name)) and not path.is_symlink()


def clean(folder: Path) -> None:
    """Delete the unfinished files of killed runs in `folder`, if it is a folder and no link. Raises OSError."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.iterdir():
        if is_temporary(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _verified(folder: Path, name: str, facts: Any) -> bytes:
    # the manifest is not trusted: a name must not lead out of the folder
    if not _FILE.fullmatch(name) or name == MANIFEST or not isinstance(facts, dict):
        raise DamagedError(f"{MANIFEST} names {name!r}")
    size = facts.get("bytes")
    if not isinstance(size, int):
        raise DamagedError(f"{MANIFEST} gives no size for {name}")
    data = _read(folder / name, size)
    if len(data) != size:
        raise DamagedError(f"{name} has {len(data)} bytes, {size} were written")
    if _sha256(data) != facts.get("sha256"):
        raise DamagedError(f"{name} does not match its SHA-256")
    return data


def _read(path: Path, limit: int) -> bytes:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError(f"{path.name} is not a regular file")
        if status.st_size > limit:
            raise DamagedError(f"{path.name} has {status.st_size} bytes, more than {limit}")
        return path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{path.name}: {error.strerror or error}") from error


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _write_hint(folder: Path, name: str) -> None:
    temporary = folder / f".tmp-latest-{os.getpid()}"
    try:
        temporary.write_text(name + "\n")
        # a folder of that name is not ours to delete, and the hint is for people
        with contextlib.suppress(IsADirectoryError):
            os.replace(temporary, folder / "latest")
    finally:
        temporary.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    # renamed first, so that a kill in between leaves no part of a checkpoint under its name
    aside = path.with_name(f".tmp-old-{path.name}-{os.getpid()}")
    os.replace(path, aside)
    shutil.rmtree(aside) if aside.is_dir() and not aside.is_symlink() else aside.unlink()


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    return [(step, path) for path in folder.iterdir() if (step := _step(path)) is not None and path.is_dir()]


def _step(path: Path) -> int | None:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
