"""The output folder of a run: checked, locked against a second run, and emptied on request."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.files import to_toml
from upstep_fast.config.finetune import FinetuneConfig
from upstep_fast.errors import ConfigError, RunFailedError
from upstep_fast.runtime import checkpoint

log = logging.getLogger("upstep_fast")

CONFIG, LOCK, CHECKPOINTS = "config.toml", "run.lock", "checkpoints"


@contextlib.contextmanager
def lock_run_folder(config: AdaptConfig | FinetuneConfig) -> Iterator[Path]:
    """Lock the folder `config.output.out` for this run within the context; yields its path.

    A new or empty folder gets config.toml. One that holds a run is emptied with `overwrite` and left as it is with
    `resume`. Raises ConfigError for a folder that holds something else, cannot be written, or is in use.
    """
    out = Path(config.output.out)
    with contextlib.ExitStack() as stack:
        try:
            # a folder that holds something else is refused before anything is written to it
            _refuse_other_content(out, config)
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(out))
            _refuse_run(out, config)
            if config.output.overwrite:
                for path in _entries(out):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            if not (out / CONFIG).is_file():
                (out / CONFIG).write_text(to_toml(config))
            (out / CHECKPOINTS).mkdir(exist_ok=True)
            for folder in (out, out / "adapter", out / CHECKPOINTS):
                checkpoint.clean(folder)
        except OSError as error:
            raise ConfigError(f"out: cannot write to {out}: {error.strerror}; choose another folder") from error
        yield out


def check(config: AdaptConfig | FinetuneConfig) -> None:
    """Raise ConfigError early, before slow work, if `lock_run_folder` would refuse what the folder holds."""
    _refuse_other_content(Path(config.output.out), config)
    _refuse_run(Path(config.output.out), config)


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn an OSError within the context into a RunFailedError of one line: the file, the reason, the cure."""
    try:
        yield
    except OSError as error:
        raise RunFailedError(
            f"out: cannot write {error.filename or out}: {error.strerror or error}; what was saved before is complete: "
            "make room and continue with --resume"
        ) from error


def _refuse_other_content(out: Path, config: AdaptConfig | FinetuneConfig) -> None:
    if _entries(out) and not (out / CONFIG).is_file():
        cure = "choose another folder or add --overwrite"
        if config.output.overwrite or config.output.resume:
            flag = "--overwrite" if config.output.overwrite else "--resume"
            cure = f"it holds no run of upstep-fast, so {flag} does not change it; choose another"
        raise ConfigError(f"out: {out} is not empty; {cure}")


def _refuse_run(out: Path, config: AdaptConfig | FinetuneConfig) -> None:
    if _entries(out) and not (config.output.overwrite or config.output.resume):
        raise ConfigError(f"out: {out} is not empty; choose another folder, continue with --resume or add --overwrite")


def _entries(out: Path) -> list[Path]:
    return [path for path in out.iterdir() if path.name != LOCK] if out.is_dir() else []


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
        yield
    finally:
        with contextlib.suppress(PermissionError):
            path.unlink(missing_ok=True)
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
