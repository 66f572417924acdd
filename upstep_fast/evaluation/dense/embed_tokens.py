"""embed --tokens: patch tokens of images with their names, as a file.

Atomic: a store is written under a temporary name and renamed when it is complete, so a killed run leaves no store; the
next one removes what it left. Memory: that of one batch and one chunk; of a .safetensors, which is for small sets, all
tokens.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upstep_fast.config.evaluate import EmbedConfig
from upstep_fast.data.loading.skipped_images import SkippedImages
from upstep_fast.errors import ConfigError, DataError
from upstep_fast.evaluation.dense import token_files
from upstep_fast.evaluation.dense.token_job import TokenJob, prepare
from upstep_fast.runtime import distributed
from upstep_fast.runtime.atomic_file import probe, require_writable, write_atomic, write_errors
from upstep_fast.runtime.commit import replace_folder, settle_folder
from upstep_fast.runtime.device import resolve
from upstep_fast.runtime.file_lock import locked
from upstep_fast.runtime.machine import format_bytes
from upstep_fast.runtime.progress import track
from upstep_fast.runtime.terminal import counted

log = logging.getLogger("upstep_fast")

CURE = "what was there is unchanged; make room, or give another --out"
MAX_IN_MEMORY = 4 << 30  # bytes of a .safetensors


def run_tokens(config: EmbedConfig) -> tuple[tuple[int, ...], str]:
    """Write the tokens of the images of a command's configuration; return their shape and what they are, in words.

    config: of `with_run`. Raises UpstepError.
    """
    out = Path(config.out)
    if distributed.is_first():
        _check_files(out, config)
    compute = resolve(config.runtime.device, config.runtime.precision, config.runtime.implementation)
    with (
        distributed.joined(compute.device, "repeat the command"),
        track("embed"),
        write_errors("the tokens", CURE),
        contextlib.ExitStack() as stack,
    ):
        job = prepare(config, compute)
        height, width, dim = job.shape[1:]
        grid, size = f"{height} x {width} x {dim}", format_bytes(job.num_bytes)
        log.info("tokens: %s x %s in %s: %s", counted(len(job.source), "image"), grid, config.dtype, size)
        if distributed.is_first():
            stack.enter_context(_locked(out))
            _check_room(out, job)
        count = _to_zarr(out, job) if out.suffix == ".zarr" else _to_safetensors(out, job)
        if config.fit_whitening and distributed.is_first() and job.content is not None:
            write_atomic(Path(config.fit_whitening), job.content)
    return (count, height, width, dim), job.form


def _to_zarr(out: Path, job: TokenJob) -> int:
    """Write a store in place of `out`; return its number of images. Raises OSError, UpstepError."""
    temporary = _temporary(out)
    try:
        if distributed.is_first():
            shutil.rmtree(temporary, ignore_errors=True)
            token_files.create_zarr(temporary, job.shape, job.dtype, distributed.size())
        distributed.wait_for_ranks()
        start, indices, skipped = _fill(token_files.tokens_array(temporary), job)
        distributed.wait_for_ranks()
        parts = distributed.gather([start, indices])
        _log_skipped(skipped, sum(len(local) for _, local in parts), len(job.source))
        if distributed.is_first():
            names = [job.source.name(index) for _, local in parts for index in local]
            token_files.finish_zarr(temporary, [(first, len(local)) for first, local in parts], names, job.facts)
            replace_folder(temporary, out)
        distributed.wait_for_ranks()
    finally:
        if distributed.is_first():
            shutil.rmtree(temporary, ignore_errors=True)
    return sum(len(local) for _, local in parts)


def _fill(x: Any, job: TokenJob) -> tuple[int, list[int], SkippedImages]:
    """Write this rank's part of the images to an array of Zarr, whole chunks at a time.

    Returns the part's first row, the indices of its readable images, and the others.
    """
    chunk = x.chunks[0]
    own = distributed.own_part(-(-len(job.source) // chunk))
    start, stop = own.start * chunk, min(own.stop * chunk, len(job.source))
    skipped, read, at = SkippedImages(), [], start
    rest = np.empty((0, *job.shape[1:]), job.dtype)
    for indices, tokens in job.batches(range(start, stop), skipped):
        read += indices
        rest = np.concatenate([rest, tokens])
        num = len(rest) // chunk * chunk
        x[at : at + num], rest, at = rest[:num], rest[num:], at + num
    x[at : at + len(rest)] = rest
    return start, read, skipped


def _to_safetensors(out: Path, job: TokenJob) -> int:
    """Write a file in place of `out`; return its number of images. Raises OSError, UpstepError."""
    skipped = SkippedImages()
    local = list(job.batches(distributed.own_part(len(job.source)), skipped))
    rows = [torch.from_numpy(x) for _, x in local]
    distributed.wait_for_ranks()
    indices = [i for part in distributed.gather([i for read, _ in local for i in read]) for i in part]
    _log_skipped(skipped, len(indices), len(job.source))
    empty = torch.from_numpy(np.empty((0, *job.shape[1:]), job.dtype))
    x: Tensor = torch.cat(distributed.gather_parts(torch.cat(rows) if rows else empty))
    if distributed.is_first():
        token_files.write_safetensors(out, x.numpy(), [job.source.name(i) for i in indices], job.facts)
    return len(indices)


def _log_skipped(skipped: SkippedImages, read: int, total: int) -> None:
    for name, reason in skipped.items():
        log.warning("skipped %s: %s", name, reason)
    if not read:
        raise DataError(f"data: none of the {total} images could be read; the first: {next(iter(skipped.items()))}")


def _check_files(out: Path, config: EmbedConfig) -> None:
    """Raise ConfigError, before slow work, if what the command writes cannot be written."""
    if out.suffix not in (".zarr", ".safetensors"):
        raise ConfigError(f"out: {out.name} must end in .zarr or .safetensors with --tokens")
    files = {"out": out} | ({"fit_whitening": Path(config.fit_whitening)} if config.fit_whitening else {})
    with write_errors("the tokens", CURE):
        settle_folder(out)
    for field, path in files.items():
        if os.path.lexists(path) and not config.overwrite:
            raise ConfigError(f"{field}: {path} exists; choose another name or add --overwrite")
    if out.suffix == ".zarr":
        token_files.require_zarr()
        _check_folder(out)
    for field, path in files.items():
        if path.suffix != ".zarr":
            require_writable(path, field)


def _check_folder(out: Path) -> None:
    if not out.parent.is_dir():
        raise ConfigError(f"out: no folder {out.parent}; make it, or give another path")
    if os.path.lexists(out) and (out.is_symlink() or not (out / "zarr.json").is_file()):
        raise ConfigError(f"out: {out} is no store of Zarr, so --overwrite does not replace it; choose another name")
    try:
        probe(out.parent)
    except OSError as error:
        raise ConfigError(f"out: cannot write {out}: {error.strerror or error}; give another path") from error


def _check_room(out: Path, job: TokenJob) -> None:
    """Raise ConfigError if the tokens do not fit on the disk, or into the memory that a .safetensors takes."""
    size = format_bytes(job.num_bytes)
    less = "fewer images" if job.config.dtype == "fp16" else "--dtype fp16 or fewer images"
    if out.suffix == ".safetensors" and job.num_bytes > MAX_IN_MEMORY:
        most = format_bytes(MAX_IN_MEMORY)
        raise ConfigError(f"out: {size} of tokens, a .safetensors is for at most {most}; write .zarr, or {less}")
    if job.num_bytes > (free := shutil.disk_usage(out.parent).free):
        raise ConfigError(f"out: needs {size}, {out.parent.resolve()} has {format_bytes(free)} free; {less}")


def _temporary(out: Path) -> Path:
    return out.with_name(f".tmp-{out.name}")


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of `out` within the context. Raises ConfigError if another process holds it."""
    path = out.with_name(f".lock-{out.name}")
    with locked(path, f"out: another process writes {out}; wait for it, or give another --out"):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
