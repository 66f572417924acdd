"""SIGINT, SIGTERM and SIGHUP at any moment from the first import on: exit code 75, one line, nothing unfinished."""

import os
import signal
import subprocess
import sys
import time

import pytest
from tally import tally

from upstep_fast import cli
from upstep_fast.cli.commands import main
from upstep_fast.model import backbone
from upstep_fast.report import logs
from upstep_fast.runtime import atomic_file, exit_signals
from upstep_fast.train import adapt as adapting
from upstep_fast.train import loop

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

# sends the signal when a module is first looked for
PROGRAM = """
import os, sys
moment, number = sys.argv[1], int(sys.argv[2])
sys.argv[:3] = ["upstep-fast"]
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == moment:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), number)
sys.meta_path.insert(0, Finder())
from upstep_fast.cli import main
main()
"""


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("upstep_fast.cli.commands", signal.SIGTERM),
        ("upstep_fast.config.adapt", signal.SIGHUP),
        ("upstep_fast.report.logs", signal.SIGINT),
        ("torch", signal.SIGTERM),
        ("numpy", signal.SIGTERM),  # where torch drops exceptions
    ],
)
def test_a_signal_while_modules_are_imported(tmp_path, moment, number):
    args = ["adapt", "--model", "m", "--data", "d", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-c", PROGRAM, moment, str(int(number)), *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (75, ["upstep-fast: interrupted"]), done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
    tally("signals", "during imports", 1)


ENTRY = "from upstep_fast.cli import main; main()"  # as the installed command


def interrupted(args, cwd, after):
    """Send SIGINT after so many seconds; return exit code, lines, and the seconds to the last line."""
    command = [sys.executable, "-c", ENTRY, *map(str, args)]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    began, lines = time.monotonic(), []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        took = time.monotonic() - began
    return process.wait(60), lines, took


# before the first tenth of a second it is Python itself that starts
MOMENTS = [0.2, *(pytest.param(after, marks=pytest.mark.long) for after in (0.6, 1.2, 2.5, 4.0, 8.0))]


@pytest.mark.parametrize("after", MOMENTS)
def test_ctrl_c_is_answered_at_once(model, photos, tmp_path, after):
    args = ["adapt", "--model", model, "--data", photos, "--out", "out", "--steps", 100_000, "--device", "cpu"]
    code, lines, took = interrupted(args, tmp_path, after)
    assert code == 75 and "Traceback" not in "\n".join(lines), lines
    assert lines[-1].startswith(("upstep-fast: interrupted", "upstep-fast: stopped after ")), lines
    # less than one second on a machine that does nothing else
    assert took < 2, (took, lines)


def test_a_step_that_takes_long_says_that_it_was_heard(handlers, flags, monkeypatch, caplog):
    step = loop.step

    def slow(state, *args, **kwargs):
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            began = time.monotonic()
            while not heard() and time.monotonic() - began < 60:
                time.sleep(0.02)
            waited.append(time.monotonic() - began)
        return step(state, *args, **kwargs)

    def heard():
        return [text for text in caplog.messages if text.startswith("SIGINT: stopping as soon as this step is done")]

    waited = []
    monkeypatch.setattr(loop, "step", slow)
    monkeypatch.setattr(logs.log, "propagate", True)
    monkeypatch.setattr(logs, "setup_logging", lambda debug: None)
    caplog.set_level("INFO", "upstep_fast")
    assert ends(main, "adapt", *flags) == 75
    assert heard() and waited[0] < 60  # while the step was still running


def test_nohup_is_respected(tmp_path):
    code = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{PROGRAM}"
    command = [sys.executable, "-c", code, "upstep_fast.version", str(int(signal.SIGHUP)), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0 and done.stdout and not done.stderr


@pytest.fixture
def handlers():
    """The program's handlers, in this process."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    exit_signals.install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    exit_signals.forget()


def ends(run, *args):
    with pytest.raises(SystemExit) as stop:
        run([str(arg) for arg in args])
    return stop.value.code


def sends(monkeypatch, owner, name, number, after=0):
    """Send the signal when a function is called for the `after`-th time, from 0."""
    real, count = getattr(owner, name), iter(range(10**6))

    def call(*args, **kwargs):
        if next(count) == after:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.fixture
def flags(options):
    options |= {"gate": "none", "memory_check": False}
    return [part for name, value in options.items() for part in _flag(name, value)]


def _flag(name, value):
    dashed = name.replace("_", "-")
    return [f"--{'' if value else 'no-'}{dashed}"] if isinstance(value, bool) else [f"--{dashed}", value]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("owner", "name"), [(backbone, "load_from"), (adapting, "start"), (adapting, "train_log"), (loop, "make_loader")]
)
def test_a_signal_before_the_first_step(handlers, flags, monkeypatch, tmp_path, capsys, owner, name, number):
    with monkeypatch.context() as patch:
        sends(patch, owner, name, number)
        assert ends(main, "adapt", *flags) == 75
    assert capsys.readouterr().err.splitlines()[-1] == "upstep-fast: interrupted"
    out = tmp_path / "out"
    assert not [path for path in tmp_path.rglob("*") if path.name == "run.lock" or ".tmp-" in path.name]
    if out.exists():  # the run had begun
        assert ends(main, "adapt", *flags, "--resume", "--quiet") == 0
    tally("signals", "before the first step", 1)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_after_the_last_step_waits_for_the_adapter_and_a_second_one_does_not(
    handlers, flags, monkeypatch, tmp_path, capsys, number
):
    with monkeypatch.context() as patch:
        sends(patch, loop, "check_adapter", number)
        sends(patch, loop, "at_strength", number)
        assert ends(main, "adapt", *flags) == 75
    assert capsys.readouterr().err.splitlines()[-1] == "upstep-fast: interrupted"
    assert not (tmp_path / "out" / "run.lock").exists()
    with monkeypatch.context() as patch:
        sends(patch, loop, "check_adapter", number)
        assert ends(main, "adapt", *flags, "--resume") == 75
    assert "stopped after all 6 steps, before the verdict; the adapter is written" in capsys.readouterr().err
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert ends(main, "adapt", *flags, "--resume") == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_the_verdict_ends_at_once(handlers, flags, monkeypatch, tmp_path, capsys, number):
    with monkeypatch.context() as patch:
        sends(patch, loop.verdict, "judge_written", number)
        assert ends(main, "adapt", *flags) == 75
    assert "stopped after all 6 steps, before the verdict; the adapter" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "run.lock").exists()
    assert ends(main, "adapt", *flags, "--resume") == 0


def test_sighup_in_the_loop_saves_the_state(handlers, flags, monkeypatch, tmp_path, capsys):
    sends(monkeypatch, loop, "step", signal.SIGHUP, after=2)
    assert ends(main, "adapt", *flags) == 75
    assert "stopped after 3 of 6 steps, all saved" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "out" / "checkpoints" / "step-00000003").is_dir()


def test_a_signal_while_a_result_is_written_leaves_nothing_unfinished(
    handlers, model, photos, monkeypatch, tmp_path, capsys
):
    sends(monkeypatch, atomic_file.os, "fsync", signal.SIGTERM)
    args = ["--model", model, "--data", photos, "--device", "cpu", "--num-workers", 0]
    assert ends(main, "embed", *args, "--out", tmp_path / "out.npy") == 75
    assert not list(tmp_path.iterdir())


def test_the_program_ignores_signals_once_its_exit_code_is_decided(handlers, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["upstep-fast", "--version"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    for number in SIGNALS:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_change_the_exit_code(tmp_path, closed):
    command = f'exec "$0" -c "{ENTRY}" adapt --steps ten {closed}'
    done = subprocess.run(["sh", "-c", command, sys.executable], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
