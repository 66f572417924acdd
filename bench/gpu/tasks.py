"""Tasks of the first run on a GPU: what is built, checked and timed, with the seconds each may take.

python bench/gpu/tasks.py    # prints the options of pytest for the tests that need a GPU
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

from first import Task

PYTHON = sys.executable
KERNEL_BENCHES = Path(__file__).resolve().parents[1] / "kernels"
STEP = str(Path(__file__).with_name("step.py"))
READ = str(Path(__file__).with_name("facts.py"))
PLANTED = str(Path(__file__).with_name("planted.py"))
WHEELS = Path(__file__).resolve().parents[2] / "build/gpu-wheels"
# (precision, form of bench/gpu/step.py)
STEPS = (("bf16", "eager"), ("bf16", "graphed"), ("fp8", "eager"), ("bf16", "compiled"))
SHAPE = {"cuda": "L/14", "cpu": "tiny"}  # of the benchmarks of kernels whose shapes are those of models
NO_MODEL = ("center_vector", "scored_sinkhorn", "sinkhorn", "swapped_loss", "views", "lora_linear")  # all shapes


def make_tasks(device: str, out: Path) -> list[Task]:
    """Return the tasks in the order of their worth: what a lack of time cuts off comes last."""
    steps = STEPS if device == "cuda" else [("fp32", form) for form in ("eager", "graphed", "compiled")]
    return [
        Task("machine", "build", (PYTHON, READ, "machine", device), 60),
        *_build(device),
        *(_check(op, device) for op in _ops()),
        _tests(device, out),
        *_sanitize(device),
        *(_step(precision, form, device) for precision, form in steps[:2]),
        *(_bench(path, device) for path in sorted(KERNEL_BENCHES.glob("bench_*.py"))),
        *(_step(precision, form, device) for precision, form in steps[2:]),
        Task("profile", "speed", (PYTHON, STEP, "--device", device, "--profile", "25"), 60),
    ]


def planted_tasks() -> list[Task]:
    """Return the tasks of the rehearsal that hang, crash, compute a wrong result and miss a package."""
    statuses = {"hang": "timeout", "crash": "crashed: SIGABRT", "wrong": "wrong", "package": "missing: no_such_package"}
    return [
        Task(f"planted {kind}", "correctness", (PYTHON, PLANTED, kind), 60, planted=status)
        for kind, status in statuses.items()
    ]


def pytest_options() -> list[str]:
    """Return options of the GPU tests, of the plugins that are there: processes, and a limit that also ends a hang."""
    options = ["--continue-on-collection-errors"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", "120", "-o", "timeout_method=thread"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(max(1, (os.cpu_count() or 1) - 4)), "--dist", "loadfile"]
    return options


def _ops() -> list[str]:
    from upstep_fast.kernels._sample_inputs import SAMPLE_INPUTS

    return sorted(SAMPLE_INPUTS)


def _build(device: str) -> list[Task]:
    if device == "cpu":
        return []
    pip, cuda = (PYTHON, "-m", "pip", "install", "--quiet"), {"UPSTEP_FAST_NATIVE": "cuda"}
    # make gpu-wheels; what is there already stays as it is
    carried = [str(path) for path in sorted(WHEELS.glob("*.whl")) if not _is_installed(path.name.split("-")[0])]
    return [
        *([Task("packages", "build", (*pip, "--no-index", "--no-deps", *carried), 60)] if carried else []),
        Task("build", "build", (*pip, "--no-build-isolation", "--no-deps", "-e", "."), 200,
             cuda | {"UPSTEP_FAST_ARCHITECTURES": "90-real"}),
    ]  # fmt: skip


def _is_installed(package: str) -> bool:
    try:
        return bool(metadata.distribution(package))
    except metadata.PackageNotFoundError:
        return False


def _check(op: str, device: str) -> Task:
    return Task(f"check {op}", "correctness", (PYTHON, READ, "check", op, device), 90)


def _tests(device: str, out: Path) -> Task:
    # on a CPU one file of them: none runs there, all are collected
    options = pytest_options() if device == "cuda" else ["tests/kernels/test_gelu.py"]
    command = (PYTHON, READ, "tests", str(out), "-m", "gpu", "--maxfail", "60", *options)
    return Task("tests", "correctness", command, 200)


def _sanitize(device: str) -> list[Task]:
    tool = shutil.which("compute-sanitizer")
    if device == "cpu" or tool is None:
        return []
    return [
        Task(
            f"{check} {op}",
            "correctness",
            (tool, "--tool", check, "--error-exitcode", "1", PYTHON, READ, "check", op, device, "triton"),
            120,
        )
        for check in ("memcheck", "racecheck")
        for op in _ops()
    ]


def _bench(path: Path, device: str) -> Task:
    name = path.stem.removeprefix("bench_")
    shape = "" if name in NO_MODEL else SHAPE[device]
    return Task(f"bench {name}", "speed", (PYTHON, READ, "bench", str(path), shape), 45)


def _step(precision: str, form: str, device: str) -> Task:
    command = (PYTHON, STEP, "--device", device, "--precision", precision, "--form", form)
    return Task(f"step {precision} {form}", "speed", command, 120 if form == "compiled" else 60)


if __name__ == "__main__":
    print(*pytest_options())
