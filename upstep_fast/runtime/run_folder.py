"""The output folder of a run: checked, locked against a second run, and emptied on request.

A run first locks the folder, then prepares all that can refuse its configuration, and only then begins it: until
`begin` nothing but run.lock is written, so a refused start leaves the folder as it was. `is_own` and `writing` notice
that the folder has been moved, deleted or taken over since.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.adapter_folder import REFUSED
from upstep_fast.config.files import to_toml
from upstep_fast.config.finetune import FinetuneConfig
from upstep_fast.errors import ConfigError, RunFailedError
from upstep_fast.runtime import checkpoint
from upstep_fast.runtime.atomic_file import probe, write_atomic, write_errors

log = logging.getLogger("upstep_fast")

CONFIG, LOCK, CHECKPOINTS = "config.toml", "run.lock", "checkpoints"
_FOLDERS = ("", "adapter", "best", REFUSED, "model", "model/adapter")  # that a run writes to
# of an attempt that left no checkpoint; its log and what was measured of the images stay
_RESULTS = (
    "adapter",
    "best",
    REFUSED,
    "judgement.jsonl",
    "bad_batches.json",
    "pictures.json",
    "model",
    "verdict.json",
    "whitening.safetensors",
)
_OF_THE_END = (REFUSED, "verdict.json", "whitening.safetensors")

_held: dict[Path, tuple[int, int]] = {}  # folder: inodes of it and of its run.lock, while this process holds them


@contextlib.contextmanager
def lock_run_folder(config: AdaptConfig | FinetuneConfig) -> Iterator[Path]:
    """Lock the folder `config.output.out` for this run within the context; yields its path.

    It is made if it is missing, and removed again if it is empty at the end. Raises ConfigError for a folder that holds
    something else, cannot be written, or is in use.
    """
    out = Path(config.output.out)
    to_toml(config)  # raises ConfigError if config.toml could not hold a value
    with contextlib.ExitStack() as stack:
        try:
            # a folder that holds something else is refused before anything is written to it
            _refuse_other_content(out, config)
            for path in [path for path in (*reversed(out.parents), out) if not path.exists()]:
                stack.callback(_remove_if_empty, path)
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(out))
            _refuse_run(out, config)
        except OSError as error:
            raise ConfigError(f"out: cannot write to {out}: {error.strerror}; choose another folder") from error
        yield out


def begin(config: AdaptConfig | FinetuneConfig, *, anew: bool, goes_on: bool = False) -> None:
    """Write config.toml to the locked folder and remove what is not of this run.

    With `overwrite` that is everything, config.toml last: until then the folder is known as that of a run. anew: no
    checkpoint is continued, so the results of an earlier attempt go too. goes_on: steps are to
    be taken, so what an earlier end has left goes. Raises ConfigError.
    """
    out = Path(config.output.out)
    stale = _RESULTS if anew else _OF_THE_END if goes_on else ()
    try:
        for path in _entries(out):
            if path.name != CONFIG and (config.output.overwrite or path.name in stale):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        write_atomic(out / CONFIG, to_toml(config).encode())
        (out / CHECKPOINTS).mkdir(exist_ok=True)
        for folder in _FOLDERS:
            checkpoint.clean(out / folder)
        checkpoint.clean((out / CHECKPOINTS).resolve())  # it alone may be a link
    except OSError as error:
        raise ConfigError(f"out: cannot write to {out}: {error.strerror}; choose another folder") from error


def check(config: AdaptConfig | FinetuneConfig) -> None:
    """Raise ConfigError, before slow work, if `lock_run_folder` would refuse the folder or it cannot be written."""
    out = Path(config.output.out)
    try:
        _refuse_other_content(out, config)
        if not os.path.lexists(out / LOCK):  # else it may be in use, which only the lock itself tells
            _refuse_run(out, config)
        probe(out)
    except OSError as error:
        raise ConfigError(f"out: cannot write to {out}: {error.strerror}; choose another folder") from error


def is_own(out: Path) -> bool:
    """Return False if the folder that this process has locked as `out` has been moved, deleted or taken over."""
    held = _held.get(out)
    # a missing lock alone may be put down to someone who clears up; a run that takes the folder over makes a new one
    return held is None or (_inode(out) == held[0] and _inode(out / LOCK) in (held[1], None))


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn an OSError within the context into a RunFailedError of one line: the file, the reason, the cure.

    Raises RunFailedError before anything is written if `out` is no longer this run's.
    """
    if not is_own(out):
        raise RunFailedError(
            f"out: {out} was moved, deleted or taken over by another run; what was saved before is complete: continue "
            "it with --resume and --out at its new place"
        )
    with write_errors(out, "what was saved before is complete: make room and continue with --resume"):
        yield


def _refuse_other_content(out: Path, config: AdaptConfig | FinetuneConfig) -> None:
    if _entries(out) and not os.path.lexists(out / CONFIG):
        cure = "choose another folder or add --overwrite"
        if config.output.overwrite or config.output.resume:
            flag = "--overwrite" if config.output.overwrite else "--resume"
            cure = f"it holds no run of upstep-fast, so {flag} does not change it; choose another"
        raise ConfigError(f"out: {out} is not empty; {cure}")
    # --overwrite deletes links themselves, all but the lock, which is opened
    for path in [out / LOCK] if config.output.overwrite else [out / LOCK, *_entries(out)]:
        if path == out / CHECKPOINTS and path.is_dir():
            continue  # a link to a folder is how checkpoints are moved to another disk
        mode = path.lstat().st_mode if os.path.lexists(path) else stat.S_IFREG
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            kind = "a link" if stat.S_ISLNK(mode) else "a pipe or device"
            raise ConfigError(f"out: {path} is {kind}; a run writes only to its own folder, so remove it")


def _refuse_run(out: Path, config: AdaptConfig | FinetuneConfig) -> None:
    if _entries(out) and not (config.output.overwrite or config.output.resume):
        raise ConfigError(f"out: {out} is not empty; choose another folder, continue with --resume or add --overwrite")


def _entries(out: Path) -> list[Path]:
    """Return what the folder holds, without its lock and without unfinished files of killed runs."""
    if not out.is_dir():
        return []
    return [path for path in out.iterdir() if path.name != LOCK and not checkpoint.is_temporary(path)]


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold out/run.lock, which names this process; the system releases it when the process ends, however it ends.

    Raises ConfigError naming the process that holds it.
    """
    path = out / LOCK
    # read first: some versions of filelock empty the file
    owner, before = _owner(path), _inode(path)
    lock = FileLock(path, fallback_to_soft=False)  # a lock that outlives a killed process would be of no use
    try:
        lock.acquire(timeout=0)
    except Timeout:  # an OSError too
        owner = owner or "another process"
        raise ConfigError(f"out: {out} is in use by {owner}; wait for it or choose another folder") from None
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        raise ConfigError(f"out: the file system of {out} has no file locks; choose a folder on another one") from error
    try:
        if owner and _inode(path) == before:  # else its run ended between the two lines above
            log.warning("out: %s was left by %s, which is gone; taken over", path, owner)
        with contextlib.suppress(PermissionError):  # Windows: a locked file cannot be written or removed
            path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        _held[out] = _inode(out) or 0, _inode(path) or 0
        yield
    finally:
        try:
            if is_own(out):  # the lock of a run that has taken the folder over stays
                with contextlib.suppress(OSError):  # which must not hide how the run ended
                    path.unlink(missing_ok=True)
        finally:
            _held.pop(out, None)
            lock.release()


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _owner(path: Path) -> str | None:
    """Return the process that a lock file names; None for an empty or unreadable file."""
    try:
        text = path.read_bytes()[:4096]
    except OSError:
        return None
    try:
        owner = json.loads(text)
        return f"process {int(owner['pid'])} on {str(owner['host'])[:80]!r}"
    except (ValueError, KeyError, TypeError):
        return "another process" if text else None
