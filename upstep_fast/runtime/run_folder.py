"""The output folder: whose it is, that it can be written, and that one run at a time does so."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.files import to_toml
from upstep_fast.config.finetune import FinetuneConfig
from upstep_fast.errors import ConfigError, RunFailedError
from upstep_fast.runtime import checkpoint

log = logging.getLogger("upstep_fast")

CONFIG, LOCK, CHECKPOINTS = "config.toml", "run.lock", "checkpoints"


@contextlib.contextmanager
def lock_run_folder(config: AdaptConfig | FinetuneConfig) -> Iterator[Path]:
    """Within this context the folder `config.out` belongs to this run.

    A new or empty folder gets config.toml. One that holds a run is emptied with `overwrite` and left as it is with
    `resume`. Raises ConfigError for a folder that holds something else, cannot be written, or is in use.
    """
    out = Path(config.out)
    with contextlib.ExitStack() as stack:
        try:
            # a stranger's folder is refused before anything is written to it
            _refuse_another(out, config)
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(out))
            _refuse_run(out, config)
            if config.overwrite:
                for path in _held(out):
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
    """Raise ConfigError if `lock_run_folder` would refuse what the folder holds: before work that takes its time."""
    _refuse_another(Path(config.out), config)
    _refuse_run(Path(config.out), config)


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn an OSError into a RunFailedError of one line: the file, the reason, the cure."""
    try:
        yield
    except OSError as error:
        raise RunFailedError(
            f"out: cannot write {error.filename or out}: {error.strerror or error}; what was saved before is whole: "
            "make room and go on with --resume"
        ) from error


def _refuse_another(out: Path, config: AdaptConfig | FinetuneConfig) -> None:
    if _held(out) and not (out / CONFIG).is_file():
        cure = "choose another folder or add --overwrite"
        if config.overwrite or config.resume:
            flag = "--overwrite" if config.overwrite else "--resume"
            cure = f"it holds no run of upstep-fast, so {flag} leaves it alone; choose another"
        raise ConfigError(f"out: {out} is not empty; {cure}")


def _refuse_run(out: Path, config: AdaptConfig | FinetuneConfig) -> None:
    if _held(out) and not (config.overwrite or config.resume):
        raise ConfigError(f"out: {out} is not empty; choose another folder, go on with --resume or add --overwrite")


def _held(out: Path) -> list[Path]:
    return [path for path in out.iterdir() if path.name != LOCK] if out.is_dir() else []


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold out/run.lock, which names this process; the system lets go of it when the process ends, however it ends.

    Raises ConfigError naming the process that holds it.
    """
    path, me = out / LOCK, {"pid": os.getpid(), "host": socket.gethostname()}
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _lock(descriptor):
                raise ConfigError(f"out: {out} is in use by {_owner(descriptor)}; wait for it or choose another folder")
            # whoever held it before may have removed the file between our open and our lock
            if _is_same(descriptor, path):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        if os.fstat(descriptor).st_size:
            log.warning("out: %s was left by %s, which is gone; taken over", path, _owner(descriptor))
            os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps(me).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        log.warning("out: this system has no file locks; do not start two runs on one folder")
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        owner = json.loads(os.read(descriptor, 4096))
        return f"process {int(owner['pid'])} on {str(owner['host'])[:80]!r}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
