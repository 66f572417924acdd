"""The compiled files: what they link to, what they hold, how they load or say why not; GateFlag; the report."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from upstep_fast.kernels import __main__ as report
from upstep_fast.kernels import _dispatch, _native
from upstep_fast.kernels.gate import new_gate_flag

ROOT = Path(__file__).resolve().parents[2]
FOLDER = _native.library_folder()
LIBRARY = FOLDER / _native.LIBRARY

needs_library = pytest.mark.skipif(not LIBRARY.is_file(), reason=f"{LIBRARY} was not built")
needs_cuda_build = pytest.mark.skipif(
    _native.load_failure() is not None or not _native.has_cuda(), reason="no CUDA ops"
)


def output(*command: str | Path) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


@needs_library
def test_library_needs_the_stable_abi_alone():
    """One file for every torch from 2.11 on and every Python: no C++ symbol of torch, no Python, no CUDA library."""
    symbols = [line.split()[-1] for line in output("nm", "-D", "--undefined-only", LIBRARY).splitlines()]
    foreign = [
        s for s in symbols if re.match(r"_ZNK?(3c10|2at|5torch)|_ZN?K?T?[VIS]?N?(3c10|2at|5torch)|_?Py|cu[A-Z]|cuda", s)
    ]
    assert foreign == []
    assert "torch_library_impl" in symbols  # the names are read rightly
    dynamic = output("readelf", "-d", LIBRARY)
    needed = set(re.findall(r"Shared library: \[([^\]]+)\.so", dynamic))
    assert needed <= {"libtorch", "libtorch_cpu", "libstdc++", "libm", "libgcc_s", "libc", "libdl", "ld-linux-x86-64"}
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


@needs_library
def test_library_shows_nothing_but_its_registration():
    """Ours are the only names it could clash with, and they are hidden."""
    defined = output("nm", "-DC", "--defined-only", LIBRARY)
    assert "upstep::" not in defined


@needs_library
def test_library_was_built_for_the_oldest_torch():
    info = _native.extension().BUILD_INFO
    assert info["torch_target"] == "2.11"
    assert "TORCH_TARGET_VERSION=0x020b000000000000 TORCH_STABLE_ONLY" in (ROOT / "CMakeLists.txt").read_text()


@needs_cuda_build
@pytest.mark.aot
def test_every_gpu_generation_is_in_the_library():
    """Code for sm_80, sm_90 and sm_100, PTX for what comes after; and no kernel that spills."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        pytest.skip("needs the cuobjdump that triton brings")
    assert set(re.findall(r"\.(sm_\d+)\.cubin", output(tool, "--list-elf", LIBRARY))) == {"sm_80", "sm_90", "sm_100"}
    assert re.findall(r"\.(sm_\d+)\.ptx", output(tool, "--list-ptx", LIBRARY)) == ["sm_100"]
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", output(tool, "-res-usage", LIBRARY))
    assert len(usage) == 3 * 19  # 12 forward, 6 backward, 1 finish
    assert [name for name, _, stack, _ in usage if int(stack)] == []
    assert max(int(shared) for *_, shared in usage) <= 48 * 1024


def test_reason_names_what_is_missing(tmp_path):
    """A copy of the folder with no package, no file or a broken file to load: the op runs anyway and says why."""
    shutil.copytree(ROOT / "kernels", tmp_path / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / _native.LIBRARY).write_text("not a library")
    script = f"""
import torch
from pathlib import Path
from ops import _native, _dispatch, center_vector, gate
for folder in (None, Path({str(tmp_path)!r}, "empty"), Path({str(tmp_path)!r}, "broken")):
    _native.library_folder = lambda: folder
    print(_native.load_failure.__wrapped__())
_native.load_failure = lambda: "nothing here"
center_vector.center_vector_update(torch.randn(4, 3), gate.new_gate_state(3))
print(_dispatch.report())
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    none, missing, broken, choice = result.stdout.splitlines()
    assert "is not installed" in none
    assert "is not in" in missing and "pip install --no-build-isolation" in missing
    assert "does not load" in broken
    assert "implementation='reference', reason='not cpp: nothing here'" in choice


# GateFlag


@pytest.fixture
def flag():
    if _native.load_failure():
        pytest.skip(_native.load_failure())
    return new_gate_flag()


def test_flag_waits_without_the_gil(flag):
    """Another Python thread writes the decision; it could not if the wait held the GIL."""

    def write():
        time.sleep(0.05)
        flag.publish(1, is_open=True)

    thread = threading.Thread(target=write)
    thread.start()
    assert flag.wait(1, timeout=20) == (True, True)
    thread.join()


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("is_finite", [True, False])
@pytest.mark.parametrize("sequence", [1, 2**40])
def test_flag_keeps_what_was_written(flag, sequence, is_open, is_finite):
    flag.publish(sequence, is_open=is_open, is_finite=is_finite)
    assert flag.sequence == sequence
    assert flag.wait(sequence, timeout=0) == (is_open, is_finite)


def test_flag_never_gives_a_stale_decision(flag):
    flag.publish(3, is_open=True)
    with pytest.raises(TimeoutError, match="decision 4 did not come in time; the latest is 3"):
        flag.wait(4, timeout=0.01)
    flag.publish(5, is_open=False)
    with pytest.raises(RuntimeError, match="decision 4 was overwritten by decision 5"):
        flag.wait(4, timeout=0.01)


@pytest.mark.parametrize(("sequence", "timeout"), [(0, 1.0), (1, -1.0), (1, float("nan"))])
def test_flag_refuses_bad_arguments(flag, sequence, timeout):
    with pytest.raises(ValueError, match="sequence must be at least 1 and timeout"):
        flag.wait(sequence, timeout=timeout)


@pytest.mark.parametrize("memory", [torch.zeros(1), torch.zeros(2, dtype=torch.int64), torch.zeros((), device="meta")])
def test_flag_refuses_other_memory(flag, memory):
    with pytest.raises(ValueError, match="memory must be an int64 tensor of one cell"):
        type(flag)(memory)


def test_flag_keeps_its_memory_alive(flag):
    memory = torch.zeros(1, dtype=torch.int64)
    other = type(flag)(memory)
    other.publish(7, is_open=True)
    assert int(memory) >> 2 == 7
    assert sys.getrefcount(memory) > 2


def test_flag_hears_ctrl_c(flag):
    """A signal ends the wait long before its timeout."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            flag.wait(1, timeout=60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# the report


def test_report_names_every_op_and_the_library(capsys):
    assert report.main(["--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for name in ("torch " + " " * 8 + torch.__version__, "compiled ops", *(c.op for c in _dispatch.report())):
        assert name in printed
    ops = [line.split()[0] for line in printed.split("\n\n")[1].splitlines()]
    for name in report.SAMPLE_INPUTS:
        assert any(op.startswith((name, "swapped")) for op in ops), name


def test_report_says_what_failed(capsys, monkeypatch):
    def broken(ops):
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setitem(report.SAMPLE_INPUTS, "gelu", broken)
    assert report.main(["--device", "cpu"]) == 1
    assert re.search(r"gelu +cpu +FAILED +out of luck$", capsys.readouterr().out, re.M)
