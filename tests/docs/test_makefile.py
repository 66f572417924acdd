"""`make demo` installs what the package needs to run; programs that only note how they are called stand in for pip."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU = "https://download.pytorch.org/whl/cpu"

# python3 -m venv DIR: makes DIR/bin with programs that write their arguments to the log
PYTHON = """#!/bin/sh
mkdir -p "$3/bin"
for name in pip upstep-fast; do printf '#!/bin/sh\\necho %s "$@" >> "$LOG"\\n' $name > "$3/bin/$name"; done
printf '#!/bin/sh\\nexit $UNREACHABLE\\n' > "$3/bin/python"
chmod +x "$3"/bin/*
"""
PACKAGE = ["pip install setuptools>=77", "pip install --no-build-isolation -e .", "upstep-fast demo"]


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def make(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    program(tmp_path / "python3", PYTHON)
    log = tmp_path / "log"

    def run(*arguments, gpu=False, reachable=True):
        program(tmp_path / "nvidia-smi", f"#!/bin/sh\nexit {int(not gpu)}\n")
        log.write_text("")
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "LOG": str(log),
            "UNREACHABLE": str(int(not reachable)),
        }
        folders = (f"DEMO_VENV={tmp_path}/demo", f"VENV={tmp_path}/all", f"PYTHON={tmp_path}/python3")
        done = subprocess.run(
            ["make", *folders, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return log.read_text().splitlines(), done.stdout

    return run


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="elsewhere PyPI's torch has no NVIDIA libraries")
@pytest.mark.parametrize(
    ("gpu", "reachable", "first", "line"),
    [
        (
            False,
            True,
            [f"pip install torch>=2.11 torchvision --index-url {CPU}"],
            "demo: no NVIDIA GPU here: torch for CPUs",
        ),
        (False, False, [], f"demo: {CPU} does not answer: torch from PyPI"),
        (True, True, [], "demo: torch from PyPI"),
    ],
)
def test_the_demo_installs_what_it_needs_once(make, gpu, reachable, first, line):
    calls, printed = make("demo", gpu=gpu, reachable=reachable)
    assert calls == first + PACKAGE and line in printed
    assert make("demo", gpu=gpu, reachable=reachable)[0] == ["upstep-fast demo"]


def test_an_installation_is_not_silent(make, tmp_path):
    """Pip unpacks torch for minutes without a line; the lines end with it, and a failure stays one."""
    wait = 'case "$*" in *setuptools*) ;; *) sleep 5 ;; esac'
    slow = PYTHON.replace("chmod +x", f"echo '{wait}' >> \"$3/bin/pip\"; chmod +x")
    program(tmp_path / "python3", slow)
    _, printed = make("demo")
    assert printed.count("demo: installing, 2 s so far") == printed.count("demo: installing, 4 s so far") >= 2
    assert "6 s so far" not in printed


def test_the_demo_uses_the_environment_of_make_install(make, tmp_path):
    subprocess.run([tmp_path / "python3", "-m", "venv", tmp_path / "all"], check=True, env={"PATH": os.environ["PATH"]})
    (tmp_path / "all" / ".installed").touch()
    assert make("demo")[0] == ["upstep-fast demo"] and not (tmp_path / "demo").exists()


def test_the_tests_have_an_environment_of_their_own(make):
    make("demo")
    _, printed = make("-n", "test")
    assert "/all/bin/pip install --quiet --no-build-isolation -e '.[dev]'" in printed and "/demo/" not in printed
