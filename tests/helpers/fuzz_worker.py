"""Runs command lines one after another, each in a fork of this process: python fuzz_worker.py WORLD.

Reads one JSON list of arguments per line and answers with {"code", "out", "err", "seconds"}; code is "hang" for a
command that used more than CPU_SECONDS of processor time or WALL_SECONDS, which is killed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

CPU_SECONDS, WALL_SECONDS = 20, 90
IMPORTED = (
    *("cli.commands", "cli.help", "cli.parse", "cli.plan", "cli.doctor", "cli.benchmark", "cli.demo", "train.adapt"),
    *(
        "train.finetune.run",
        "train.finetune.predict",
        "evaluation.labeled",
        "evaluation.embeddings",
        "model.export.export",
        "report.page",
    ),
)
MEMORY = 6 << 30  # of address space beyond the worker's own


def main() -> None:
    """Build the inputs, then run what stdin names."""
    world = Path(sys.argv[1])
    if not world.exists():
        from fuzz_world import build

        with contextlib.redirect_stdout(sys.stderr):
            build(world)
    for name in IMPORTED:  # once, before the forks
        importlib.import_module(f"upstep_fast.{name}")
    print("ready", flush=True)
    for number, line in enumerate(sys.stdin):
        folder = world / "tries" / str(number)
        answer = one(json.loads(line), folder, world)
        shutil.rmtree(folder, ignore_errors=True)
        print(json.dumps(answer), flush=True)


def one(argv: list[str], folder: Path, world: Path) -> dict:
    """Run one command in a folder with odd places to write to."""
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier worker
    (folder / "full").mkdir(parents=True)
    (folder / "full" / "mine").touch()
    (folder / "file").touch()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    shutil.copytree(world / "good" / "run", folder / "old")
    texts = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115  (closed below)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        run(argv, folder, [file.fileno() for file in texts])
    code: int | str = "hang"
    seconds = 0.0
    while time.monotonic() - start < WALL_SECONDS:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            seconds = usage.ru_utime + usage.ru_stime
            code = os.waitstatus_to_exitcode(status)
            code = "hang" if code == -signal.SIGXCPU else code
            break
        time.sleep(0.005)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    out, err = [(file.seek(0), file.read(1 << 20))[1].decode(errors="backslashreplace") for file in texts]
    for file in texts:
        file.close()
    return {
        "code": code,
        "wrong": wrong(folder) if code == 0 and argv[0] == "embed" else None,
        "out": out,
        "err": err,
        "seconds": seconds,
    }


def wrong(folder: Path) -> str | None:
    """Return what is wrong with the features that `embed` wrote; None if nothing is."""
    for path in folder.glob("*.npy"):
        if not path.with_suffix(".txt").exists():  # whitening under an odd name
            continue
        features = np.load(path, allow_pickle=False)
        if not np.isfinite(features).all():
            return f"{path.name} holds values that are not finite"
        if (names := path.with_suffix(".txt")).read_bytes().count(b"\n") != len(features):
            return f"{names.name} and {path.name} differ in length"
    for path in folder.glob("*.safetensors"):
        if not all(torch.isfinite(value).all() for value in load_file(path).values()):
            return f"{path.name} holds values that are not finite"
    return None


def run(argv: list[str], folder: Path, outputs: list[int]) -> None:
    """Become the command; does not return."""
    code = 99
    try:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for target, output in zip((1, 2), outputs, strict=True):
            os.dup2(output, target)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        from upstep_fast.cli.commands import main as command

        try:
            command(argv)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
