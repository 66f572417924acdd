"""bench/gpu/first.py: whatever one task does, the others run, every fact is kept, and the page names what is new."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from gpu_session import pytest_make_collect_report

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def first(bench):
    return bench("first")


def python(first, name, code, limit_s=20.0, part="correctness"):
    return first.Task(name, part, (sys.executable, "-c", code), limit_s)


def run(first, tmp_path, tasks, limit_s=60.0):
    path = tmp_path / "facts.jsonl"
    with path.open("w") as file:
        first.run(tasks, first.Journal(file), limit_s, workers=4)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return rows, {row["task"]: row for row in rows if "status" in row}


FACT = 'print(\'FACT {"op": "gelu"}\', flush=True)'


def test_planted_failures_cost_one_task_each(first, bench, tmp_path, monkeypatch):
    planted = [
        python(first, "hang", f"{FACT}\nwhile True: pass", limit_s=2),
        python(first, "crash", f"{FACT}\nimport os; os.abort()"),
        python(first, "wrong", f"{FACT}\nraise SystemExit(1)"),
        python(first, "package", "import no_such_package.part"),
        python(first, "known", "raise SystemExit(1)"),
        python(first, "cut off", 'import os; os.write(1, b\'FACT {"op": "ge\'); os.abort()'),
        python(first, "right", FACT, part="speed"),
    ]
    monkeypatch.setitem(first.EXPECTED, "known", "its known reason")
    rows, ends = run(first, tmp_path, planted)
    assert {name: row["status"] for name, row in ends.items()} == {
        "hang": "timeout", "crash": "crashed: SIGABRT", "wrong": "wrong", "package": "missing: no_such_package",
        "known": "wrong", "cut off": "crashed: SIGABRT", "right": "right",
    }  # fmt: skip
    assert [row["task"] for row in rows if row.get("op") == "gelu" and row["task"] == "hang"] == ["hang"]
    page = tmp_path / "page.md"
    bench("summary").write_page(page, rows)
    text = page.read_text()
    assert "1 of 7 right" in text
    assert "**known**: wrong after 0 s (expected: its known reason)" in text
    assert all(f"**{name}**" in text for name in ("hang", "crash", "wrong", "package", "cut off"))
    assert text.count("(NEW)") == 5


def test_process_left_behind_is_killed(first, tmp_path):
    pid = tmp_path / "pid"
    code = f"""if True:
        import subprocess, sys
        quiet = {{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}}
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], **quiet)
        open({str(pid)!r}, "w").write(str(child.pid))"""
    run(first, tmp_path, [python(first, "parent", code)])
    stat = Path("/proc", pid.read_text(), "stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("the child runs on")


def test_no_time_is_said_and_speed_runs_all_the_same(first, tmp_path, monkeypatch):
    monkeypatch.setattr(first, "RESERVE_S", 0.0)
    slow = [python(first, f"slow {i}", "import time; time.sleep(30)") for i in range(6)]
    _, ends = run(first, tmp_path, [*slow, python(first, "speed", FACT, part="speed")], limit_s=9)
    assert {row["status"] for name, row in ends.items() if name.startswith("slow")} == {"timeout", "not run: no time"}
    assert ends["speed"]["status"] == "right"


def test_every_op_and_every_benchmark_has_a_task(bench, tmp_path):
    from upstep_fast.kernels._sample_inputs import SAMPLE_INPUTS

    names = [task.name for task in bench("tasks").make_tasks("cuda", tmp_path)]
    assert {f"check {op}" for op in SAMPLE_INPUTS} <= set(names)
    assert {f"bench {op}" for op in SAMPLE_INPUTS} - set(names) <= {"bench lora_linear_fp8"}  # in bench lora_linear
    assert len(names) == len(set(names))


def test_sanitizer_covers_every_op_with_a_triton_kernel():
    from upstep_fast.kernels._sample_inputs import SAMPLE_INPUTS

    (listed,) = re.findall(r"^OPS = (.*)$", (ROOT / "Makefile").read_text(), re.M)
    # center_vector is C++ and CUDA, low_rank_mixer the library's products
    assert set(listed.split()) == SAMPLE_INPUTS.keys() - {"center_vector", "low_rank_mixer"}


def test_folder_named_as_a_marker_skips_no_test(tmp_path):
    folder = tmp_path / "gpu" / "interp"
    folder.mkdir(parents=True)
    (folder / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    (folder / "test_x.py").write_text("def test_x(): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(folder)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-2000:]


def test_planted_fault_that_is_not_noticed_is_new(first, tmp_path):
    planted = [python(first, name, code) for name, code in (("seen", "raise SystemExit(1)"), ("missed", "pass"))]
    _, ends = run(first, tmp_path, [replace(task, planted="wrong") for task in planted])
    assert ends["seen"]["expected"] == "planted" and ends["seen"]["status"] == "wrong"
    assert ends["missed"]["status"] == "planted wrong, came out right" and not ends["missed"]["expected"]


def test_wrong_result_is_planted_in_the_check_itself(bench, capsys):
    bench("facts")
    assert bench("planted").main("wrong") == 1
    (fact,) = [json.loads(line.removeprefix("FACT ")) for line in capsys.readouterr().out.splitlines()]
    assert fact["passed"] is False and 0.01 < fact["forward"] < 0.03
    assert set(bench("planted").FAULTS) | {"package"} == {t.name.split()[1] for t in bench("tasks").planted_tasks()}


def test_plugins_that_are_not_there_are_not_asked_for(bench, monkeypatch):
    tasks = bench("tasks")
    assert {"--timeout", "-n"} <= set(tasks.pytest_options())
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    assert tasks.pytest_options() == ["--continue-on-collection-errors"]


POISONED = """
import sys, pytest
class cuda:
    lost = False
    @staticmethod
    def synchronize():
        if cuda.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
sys.modules["torch"] = type("torch", (), {"cuda": cuda})

@pytest.mark.gpu
def test_loses_the_gpu():
    cuda.lost = True
    raise AssertionError("wrong result")

@pytest.mark.gpu
@pytest.mark.parametrize("i", range(3))
def test_is_right(i):
    cuda.synchronize()
"""


def test_process_that_lost_the_gpu_runs_no_further_test(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu")
    (tmp_path / "conftest.py").write_text("from gpu_session import pytest_exception_interact")
    (tmp_path / "test_gpu.py").write_text(POISONED)
    command = [sys.executable, "-m", "pytest", "-n", "1", "-q", "-p", "xdist.plugin", "-p", "no:cacheprovider"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests/helpers"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "3 passed" in done.stdout, done.stdout
    assert "AssertionError: wrong result" in done.stdout  # the failure itself is not lost
    assert set(re.findall(r"FAILED test_gpu.py::(\w+)", done.stdout)) == {"test_loses_the_gpu"}


# packages of the dev environment that a bare GPU image lacks
HIDDEN = ("av", "datasets", "docstring_parser", "jsonschema", "rich", "shtab", "typeguard", "tyro", "webdataset")


@pytest.mark.parametrize(
    ("marker", "error", "outcome"),
    [
        ("gpu", "E   ModuleNotFoundError: No module named 'no_such_package.part'", "skipped"),
        ("gpu", "E   ModuleNotFoundError: No module named 'json.no_such_part'", "failed"),
        ("gpu", "E   ImportError: cannot import name 'x' from 'json'", "failed"),
        ("not gpu", "E   ModuleNotFoundError: No module named 'no_such_package'", "failed"),
    ],
)
def test_only_gpu_tests_are_skipped_for_lack_of_a_package(marker, error, outcome):
    config = SimpleNamespace(option=SimpleNamespace(markexpr=marker))
    hook = pytest_make_collect_report(SimpleNamespace(config=config, path=Path("test_x.py")))
    next(hook)
    report = SimpleNamespace(failed=True, outcome="failed", longrepr=error)
    with pytest.raises(StopIteration):
        hook.send(report)
    assert report.outcome == outcome


@pytest.mark.long
def test_gpu_tests_collect_without_optional_packages(tmp_path):
    (tmp_path / "hide.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({HIDDEN}))")
    plugins = ("-p", "hide", "-p", "pytest_timeout", "-p", "pytest_benchmark.plugin")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, "-m", "gpu", "--collect-only", "-q"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]


def test_page_compares_with_floor_and_rival(bench, tmp_path):
    def row(variant, ms):
        return {"task": "bench gelu", "group": "gelu forward", "variant": variant, "median_ms": ms}

    rows = [row("copy", 1.0), row("ours", 3.0), row("ours fp8", 0.5), row("eager", 4.0), row("compiled", 2.0)]
    bench("summary").write_page(tmp_path / "page.md", rows)
    text = (tmp_path / "page.md").read_text()
    assert "| gelu forward | 3.000 | 3.00x | compiled 2.000 | 1.50 |" in text
    assert "gelu forward: compiled is 1.50x as fast as ours" in text


def test_a_benchmark_that_is_killed_keeps_the_facts_before_it(tmp_path):
    file = tmp_path / "bench_x.py"
    file.write_text(
        "import os\n"
        "def test_one(benchmark):\n    benchmark.group = 'x'\n    benchmark.pedantic(abs, (1,), rounds=3)\n"
        "def test_two(benchmark):\n    os._exit(9)\n"
    )
    command = [sys.executable, str(ROOT / "bench/gpu/facts.py"), "bench", str(file), ""]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # xdist times nothing
    done = subprocess.run(command, capture_output=True, text=True, env=env | {"PYTHONPATH": str(ROOT)})
    facts = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("FACT ")]
    assert done.returncode == 9 and [(fact["group"], fact["variant"]) for fact in facts] == [("x", "test_one")]
    assert facts[0]["median_ms"] > 0
