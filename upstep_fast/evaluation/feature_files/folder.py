"""The folder that `embed` writes shards to: locked, checked against the command, and planned.

A generation's names are written first (plan-000.parquet), then its shards, each atomically, in any order. What a killed
command has left is therefore told by the names of the files alone, and a repeated one writes what is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from upstep_fast.config.evaluate import EmbedConfig
from upstep_fast.config.reading import parse_intensity
from upstep_fast.data.sources.source import Source
from upstep_fast.errors import ConfigError, DataError
from upstep_fast.evaluation.feature_files import facts as feature_facts
from upstep_fast.evaluation.feature_files.job import FeatureJob
from upstep_fast.evaluation.feature_files.parquet import (
    BASE,
    FACTS,
    Plan,
    holds_features,
    read_plans,
    require_pyarrow,
)
from upstep_fast.evaluation.feature_files.write import write_names
from upstep_fast.model.identity import differences
from upstep_fast.runtime import file_lock
from upstep_fast.runtime.atomic_file import probe, write_atomic, write_errors
from upstep_fast.runtime.commit import replace_folder, settle_folder

log = logging.getLogger("upstep_fast")

SHARD_BYTES = 1 << 25
FILES = (".npy", ".safetensors", ".parquet")
LOCK = ".lock"
CURE = "what was written is complete: make room and repeat the command"
TWICE = "data: two images are called", "a folder cannot tell them apart; write one file"
_OWN = re.compile(r"(plan-\d{3,9}|part-\d{3,9}-\d{5,9})\.parquet|\.lock|\.tmp-.*", re.ASCII)


def is_folder(out: str | Path) -> bool:
    """Return whether `out` names a folder: it is one, ends in a slash, or has no suffix."""
    path = Path(out)
    return str(out).endswith(("/", os.sep)) or not path.suffix or (path.is_dir() and path.suffix not in FILES)


def target_of(out: Path, config: EmbedConfig) -> Path:
    """Return the folder that shards are written to: `out`, or one beside it that is to replace it."""
    is_replaced = config.overwrite and holds_features(out)
    return out.absolute().with_name(f".new-{out.absolute().name}") if is_replaced else out


@contextlib.contextmanager
def locked(out: Path, config: EmbedConfig) -> Iterator[None]:
    """Lock the folder for one writer within the context, and put a new one of --overwrite in its place at the end.

    Raises ConfigError, before slow work, for a folder that is in use, holds something else or cannot be written.
    """
    require_pyarrow("out")
    if config.fit_whitening is not None:
        raise ConfigError(
            "fit_whitening: needs all features at once, which a folder of shards never has; fit it with --out to a "
            ".npy of a sample of the images, then give --whitening"
        )
    target = target_of(out, config)
    is_new = not out.exists()
    with contextlib.ExitStack() as lock:
        try:
            settle_folder(out)
            out.mkdir(parents=True, exist_ok=True)
            in_use = f"out: {out} is in use by another embed; wait for it or choose another folder"
            lock.enter_context(file_lock.locked(out / LOCK, in_use))
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"out: cannot write to {out}: {reason}; choose another folder") from error
        try:
            _require_own(out, config)
            _clean(out, target)
            yield
            if target != out:
                with write_errors(out, CURE):
                    replace_folder(target, out)
        finally:
            lock.close()
            if is_new:
                _remove_if_empty(out)


def _require_own(out: Path, config: EmbedConfig) -> None:
    """Raise ConfigError if the folder holds something else than features."""
    entries = sorted(path.name for path in out.iterdir())
    others = [name for name in entries if not _OWN.fullmatch(name)]
    if others and (config.overwrite or not holds_features(out)):
        raise ConfigError(f"out: {out} holds {others[0]}, which is no file of features; choose another folder")


def _clean(out: Path, target: Path) -> None:
    """Delete unfinished files of killed commands. Raises ConfigError if the folder cannot be written."""
    try:
        for path in out.iterdir():
            if path.name.startswith(".tmp-") and not path.is_dir():
                path.unlink()
        if target != out:
            if target.exists():
                shutil.rmtree(target)
            target.mkdir()
        probe(target)
    except OSError as error:
        raise ConfigError(f"out: cannot write to {target}: {error.strerror or error}; choose another folder") from error


def _remove_if_empty(out: Path) -> None:
    with contextlib.suppress(OSError):
        if [path.name for path in out.iterdir()] in ([], [LOCK]):
            (out / LOCK).unlink(missing_ok=True)
            out.rmdir()


def with_recorded_intensity(source: Source, plans: Sequence[Plan]) -> Source:
    """Return a source whose values are read as those of the plans were, where `auto` would measure them anew."""
    recorded = plans[0].metadata.get("reading", {}).get("intensity") if plans else None
    intensity = source.reading.intensity
    if not isinstance(recorded, str) or intensity.ranges or intensity.kind != "auto":
        return source
    reading = dataclasses.replace(source.reading, intensity=parse_intensity(recorded))
    return dataclasses.replace(source, reading=reading)


def matched(job: FeatureJob, plans: Sequence[Plan]) -> FeatureJob:
    """Return the job, with the base model's features if the folder has them.

    Raises ConfigError if the folder holds features of another model, adapter, whitening, form or reading.
    """
    if not plans:
        return job
    then = plans[-1].metadata
    if BASE in then.get("columns", {}):
        job = dataclasses.replace(job, config=dataclasses.replace(job.config, with_base=True))
    if reason := _other(then, job):
        cure = "choose another --out, or replace them with --overwrite"
        raise ConfigError(f"out: {plans[-1].folder} holds other features: {reason}; {cure}")
    if (precision := then.get("precision")) != job.compute.precision:
        log.warning(
            "precision: the features there were computed in %s, new ones in %s", precision, job.compute.precision
        )
    return job


def _other(then: dict[str, Any], job: FeatureJob) -> str:
    """Return in what the features of a plan differ from those of the job; "" if in nothing."""
    facts = job.facts
    recorded, current = (feature_facts.parts_of(one.get("fingerprint")) for one in (then, facts))
    if names := [name for name in current if recorded.get(name) != current[name]]:
        texts = [f"the {name} has changed ({recorded.get(name)}, now {current[name]})" for name in names]
        return ", ".join(texts)
    if changed := differences(then.get("identity", {}), job.identity):
        return "; ".join(changed[:3])
    for name in ("form", "columns", "reading"):
        if then.get(name) != facts[name]:
            return f"{name} is {_words(facts[name])}, there it is {_words(then.get(name))}"
    return ""


def _words(value: Any) -> str:
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


class NameIndex:
    """Positions of the images of a source by name, 24 bytes for each. Raises DataError for two images of one name.

    twice: what its message says before and after that name.
    """

    def __init__(self, count: int, name: Callable[[int], str], twice: tuple[str, str] = TWICE):
        digests = _digests(name(i) for i in range(count))
        self._order = np.argsort(digests, kind="stable")
        self._digests = digests[self._order]
        again = np.flatnonzero(self._digests[1:] == self._digests[:-1])
        if len(again):
            shared = name(int(self._order[again[0]]))
            raise DataError(f"{twice[0]} {shared}; {twice[1]}")

    @classmethod
    def of(cls, source: Source) -> NameIndex:
        """Return the index of a source."""
        return cls(len(source), source.name)

    def find(self, names: Iterable[str]) -> np.ndarray:
        """Return the position of each name, [n] int64, -1 where there is none."""
        wanted = _digests(names)
        if not len(self._digests):
            return np.full(len(wanted), -1)
        at = np.minimum(np.searchsorted(self._digests, wanted), len(self._digests) - 1)
        return np.where(self._digests[at] == wanted, self._order[at], -1)


def _digests(names: Iterable[str]) -> np.ndarray:
    # 128 bits: among 1e9 names two are alike with a probability of 1e-21
    each = (hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest() for name in names)
    return np.fromiter(each, "S16")


def write_plan(folder: Path, number: int, job: FeatureJob, positions: np.ndarray) -> None:
    """Write the names of a generation. Raises RunFailedError."""
    size = job.config.shard_size or default_shard_size(sum(job.columns.values()))
    facts = job.facts | {"shard_size": size, "identity": job.identity, "data": list(map(str, job.config.data.paths))}
    names = (job.source.name(int(i)) for i in positions)
    with write_errors("the features", CURE):
        write_atomic(folder / f"plan-{number:03d}.parquet", lambda file: write_names(names, {FACTS: facts}, file))


def default_shard_size(width: int) -> int:
    """Return the images of a shard of about 32 MB, a power of 2. width: of all columns."""
    return 1 << max(0, (SHARD_BYTES // (4 * width)).bit_length() - 1)


def plans_of(folder: Path) -> list[Plan]:
    """Return the plans in a folder, [] if there is no such folder yet."""
    return read_plans(folder) if folder.is_dir() else []
