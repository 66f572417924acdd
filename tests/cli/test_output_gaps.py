"""Every command, in a pseudo-terminal and in a pipe: never silent for more than 3 seconds, from its start to its end.

Slowness is planted: imports, reads and each long stage take seconds, as they do on a machine of a first-time user.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pty
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_hub import OWNER, TOKEN, fake_hub

from upstep_fast import adapt, finetune
from upstep_fast.cli.commands import COMMANDS

GAP = 3.0  # seconds without output, at most
SERVES = b"http://127.0.0.1:"  # the address that explore prints
LOADED = 12.0  # on a machine that runs other tests at the same time

# sleeps before a function MODULE:NAME of the arguments "MODULE:NAME=SECONDS" is called, or "MODULE=SECONDS" imported
PROGRAM = """
import functools, importlib.util, operator, sys, time
end = sys.argv.index("--")
PLANTED = {}
for text in sys.argv[1:end]:
    target, _, seconds = text.partition("=")
    module, _, name = target.partition(":")
    PLANTED.setdefault(module, []).append((name, float(seconds)))
sys.argv[:] = ["upstep-fast", *sys.argv[end + 1:]]
def slow(function, seconds):
    @functools.wraps(function)
    def call(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)
    return call
class Finder:
    def find_spec(self, module, path=None, target=None):
        if module not in PLANTED:
            return None
        planted = PLANTED.pop(module)
        spec = importlib.util.find_spec(module)
        run = spec.loader.exec_module
        def exec_module(loaded):
            time.sleep(sum(seconds for name, seconds in planted if not name))
            run(loaded)
            for name, seconds in planted:
                if name:
                    owner, _, last = name.rpartition(".")
                    owner = operator.attrgetter(owner)(loaded) if owner else loaded
                    setattr(owner, last, slow(getattr(owner, last), seconds))
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Finder())
from upstep_fast.cli import main
main()
"""


@dataclass(frozen=True)
class Run:
    """Output of one command, and the longest time without any."""

    code: int
    text: str
    gap: float
    before: str  # the last output before the longest gap


def run(args: list[object], planted: list[str], *, terminal: bool, cwd: Path) -> Run:
    """Run a command with planted slowness and note when its output comes."""
    command = [sys.executable, "-c", PROGRAM, *planted, "--", *map(str, args)]
    env = os.environ | {"PYTHONUNBUFFERED": "", "COLUMNS": "120"}
    reader, writer = pty.openpty() if terminal else os.pipe()
    chunks = [(time.monotonic(), b"")]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, cwd=cwd, env=env)
    os.close(writer)
    try:
        with contextlib.suppress(OSError):  # how Linux says that a terminal's other side is closed
            while chunk := os.read(reader, 1 << 16):
                chunks.append((time.monotonic(), chunk))
                if SERVES in chunk:  # until it is interrupted
                    process.send_signal(signal.SIGINT)
        code = process.wait(60)
    finally:
        process.kill()
        os.close(reader)
    chunks.append((time.monotonic(), b""))
    gap, at = max((later[0] - earlier[0], i) for i, (earlier, later) in enumerate(itertools.pairwise(chunks)))
    text = b"".join(chunk for _, chunk in chunks).decode(errors="replace")
    return Run(code, text, gap, chunks[at][1].decode(errors="replace"))


@pytest.fixture(scope="module")
def labeled(tmp_path_factory, photos):
    """The photographs as two classes."""
    folder = tmp_path_factory.mktemp("labeled")
    for i, path in enumerate(sorted(photos.iterdir())):
        to = folder / ("train", "test")[i % 4 == 3] / "ab"[i % 2 if i % 4 != 3 else i // 4 % 2]
        to.mkdir(parents=True, exist_ok=True)
        (to / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, short_run, model, photos):
    """A finished run of adapt."""
    out = tmp_path_factory.mktemp("adapted") / "run"
    adapt(model, photos, out, **short_run)
    return out


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, model, labeled):
    """A finished run of finetune."""
    out = tmp_path_factory.mktemp("finetuned") / "run"
    finetune(model, labeled, out, method="linear", epochs=1, batch_size=8, device="cpu", num_workers=0)
    return out


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The name of a repository, on a hub of this machine that commands find."""
    with fake_hub() as hub, pytest.MonkeyPatch.context() as patch:
        for name, value in {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}.items():
            patch.setenv(name, value)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        yield f"{OWNER}/adapted"


CPU = ["--device", "cpu"]
SMALL = [*CPU, "--num-workers", 0]
HEADS = "--prototypes 8 --head-hidden 32 --head-dim 16 --lora-r 2 --precision fp32 --batch-size 8"


def commands(of) -> dict[str, tuple[list[object], list[str]]]:
    """Return each command's arguments, and what is slow in it: "MODULE:FUNCTION=SECONDS"."""
    model, photos = of("model"), of("photos")
    images, labeled = ["--model", model, "--data", photos, *SMALL], lambda: ["--data", of("labeled"), *SMALL]
    run = of("adapted")
    return {
        "adapt": (
            [*images, *HEADS.split(), "--steps", 30, "--out", "out"],
            ["train.identity:identify=3.5", "train.adapter_check:check_adapter=3.5", "report.page:write=3.5"],
        ),
        "finetune": (
            ["--model", model, *labeled(), "--epochs", 3, "--batch-size", 8, "--out", "out"],
            ["train.identity:identify=3.5", "train.finetune.classifier:save=3.5", "train.finetune.step:predict=3.5"],
        ),
        "eval": ([run, *labeled()], ["evaluation.whitening:fit=3.5", "evaluation.classifiers:probe=3.5"]),
        "embed": ([run, "--data", photos, *SMALL, "--out", "out.npy"], ["model.backbone:fingerprint=3.5"]),
        "curate": ([run, "--data", photos, *CPU, "--out", "out"], ["evaluation.curation.neighbors:nearest=3.5"]),
        "explore": (
            [run, "--data", photos, "--no-browser", *CPU],
            ["explorer.gallery:rows_of=3.5", "explorer.maps:principal=3.5"],
        ),
        "search": (
            [run, Path(photos) / "00.png", *CPU, "--out", "out.html"],
            ["evaluation.run_search:open_index=3.5", "report.search_page:search_page=3.5"],
        ),
        "export": ([run, "--out", "out"], ["model.peft_format:attach=3.5", "model.lora:merge=3.5"]),
        "predict": ([of("finetuned"), *labeled(), "--out", "out.csv"], ["train.finetune.learned:fingerprints=3.5"]),
        "plan": (images, ["train.memory.count:count=3.5", "runtime.duration:product_rate=3.5"]),
        "push": ([run, of("repository")], ["model.hub:files_to_push=3.5", "network:unreachable=3.5"]),
        "models": (["vit_tiny_patch16_*"], ["model.registry:names=3.5", "model.registry:without_weights=3.5"]),
        "report": ([run], ["report.run_record:read_record=3.5"]),
        "doctor": (
            ["--model", model, *CPU],
            [
                "kernels._self_check:check=0.3",
                "cli.doctor=3.5",
                "engine.self_check:compare=3.5",
                "cli.doctor:_photo=0.3",
            ],
        ),
        "bench": (
            ["--model", model, "--batch-size", 2, "--runs", 3, *CPU],
            ["runtime.timing:_milliseconds=1", "engine.vit:try_build=3.5", "cli.benchmark=3.5"],
        ),
        "demo": (["--steps", 3, "--out", "out", *CPU], ["evaluation.classifiers:probe=3.5", "report.page:write=3.5"]),
        "completion": (["bash"], []),
    }


READ, BUILD = "data.sources.source:Source.read=0.15", "model.backbone:_build=3.5"


def check(args: list[object], planted: list[str], cwd: Path, *, terminal: bool, allowed: float) -> None:
    planted = [text if text.startswith("torch=") else f"upstep_fast.{text}" for text in planted]
    done = run(args, planted, terminal=terminal, cwd=cwd)
    assert done.code == 0, done.text[-2000:]
    assert done.gap <= allowed, (done.gap, done.before[-200:])


def test_every_command_is_swept(request):
    assert commands(request.getfixturevalue).keys() == set(COMMANDS)


@pytest.mark.long
@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_gap(request, tmp_path, name, terminal):
    args, planted = commands(request.getfixturevalue)[name]
    images = [] if name == "demo" else [READ]  # it reads 2,062
    check([name, *args], ["torch=3.5", BUILD, *images, *planted], tmp_path, terminal=terminal, allowed=GAP)


@pytest.mark.parametrize(
    ("name", "terminal", "planted"),
    [
        ("adapt", False, ["train.identity:identify=12.5"]),
        ("eval", True, ["torch=12.5"]),
    ],
)
def test_no_long_gap_on_a_busy_machine(request, tmp_path, name, terminal, planted):
    args, _ = commands(request.getfixturevalue)[name]
    check([name, *args], planted, tmp_path, terminal=terminal, allowed=LOADED)
