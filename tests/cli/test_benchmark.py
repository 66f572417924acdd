"""The benchmark's runner: it alternates, checks before it times, and its figures are those it measured."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from upstep_fast.cli import benchmark, benchmark_plot
from upstep_fast.config.tools import BenchConfig
from upstep_fast.errors import CheckFailedError, ConfigError
from upstep_fast.runtime import timing

SMALL = dict(model="vit_tiny_patch16_224", img_size=32, batch_size=2, runs=2, device="cpu", precision="fp32")


def test_variants_take_turns():
    seen = []
    variants = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    times = timing.alternate(variants, torch.device("cpu"), runs=3, warmup=1)
    assert "".join(seen) == "abc" * 4 and {len(t) for t in times.values()} == {3}


def test_a_slower_variant_is_measured_as_slower():
    def slow():
        until = time.process_time() + 0.02  # a sleep takes none of the process's own time
        while time.process_time() < until:
            pass

    variants = {"slow": slow, "fast": lambda: None}
    times = timing.alternate(variants, torch.device("cpu"), runs=3)
    assert min(times["slow"]) >= 20 > min(times["fast"])  # a busy machine can make any one run slow


# beside the plain ViT: biases past which PEFT's layer would be read, and a matrix each for q, k and v
@pytest.mark.parametrize(
    ("model", "size"), [(SMALL["model"], 32), ("vit_small_patch16_dinov3_qkvb", 32), ("eva02_base_patch14_224", 28)]
)
def test_a_run_compares_peft_reference_and_engine(model, size, tmp_path):
    options = SMALL | dict(model=model, img_size=size)
    result = benchmark.run(BenchConfig(**options, json=str(tmp_path / "b.json")))
    assert json.loads((tmp_path / "b.json").read_text())["backward"] == result["backward"]
    for kind in ("backward", "forward"):
        assert [row["name"] for row in result[kind]] == ["peft", "reference", "engine"]
        for row in result[kind]:
            # the adapters are the same in all three, so are features and gradients
            assert row["error"] < 1e-4 and row["low_ms"] <= row["median_ms"] <= row["high_ms"] and row["runs"] == 2
    assert result["device"]["torch"] == torch.__version__


def test_the_plot_shows_every_variant_with_its_ratio(tmp_path):
    result = benchmark.run(BenchConfig(**SMALL, plot=str(tmp_path / "b.png")))
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    figure = benchmark_plot.draw(result)
    for axes, kind in zip(figure.axes, ("backward", "forward"), strict=True):
        assert [tick.get_text() for tick in axes.get_yticklabels()] == [row["name"] for row in result[kind]]
        assert [bar.get_width() for bar in axes.patches] == [row["median_ms"] for row in result[kind]]
        assert axes.texts[0].get_text().strip() == "1.00x"


def test_a_plot_that_cannot_be_written_is_refused_first(monkeypatch):
    with pytest.raises(ConfigError, match=r"plot: b\.txt must end in"):
        benchmark.run(BenchConfig(**SMALL, plot="b.txt"))
    monkeypatch.setattr(benchmark_plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="matplotlib is not installed"):
        benchmark.run(BenchConfig(**SMALL, plot="b.svg"))


def test_a_wrong_engine_is_not_timed(monkeypatch):
    real = benchmark.engine.EngineViT.features
    monkeypatch.setattr(benchmark.engine.EngineViT, "features", lambda self, x: real(self, x) * 1.01)
    with pytest.raises(CheckFailedError, match="not timed") as error:
        benchmark.run(BenchConfig(**SMALL))
    assert error.value.exit_code == 4


def test_the_benchmarks_are_collected_and_the_stored_run_names_them():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q", "--benchmark-only"]
    # of its own: pytest-benchmark refuses --benchmark-only in what looks like a worker of pytest-xdist
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240, env=own)
    names = set(re.findall(r"^bench/.*::.*$", found.stdout, re.M))
    timed = {
        str(path.relative_to(root)) for path in (root / "bench").rglob("bench_*.py") if "def test_" in path.read_text()
    }
    assert {name.split("::")[0] for name in names} == timed, found.stdout + found.stderr
    if not torch.cuda.is_available():  # whose shapes are larger
        stored = json.loads((root / "bench/results/pytest_cpu2.json").read_text())["benchmarks"]
        assert {benchmark["fullname"] for benchmark in stored} <= names


def test_the_stored_run_compares(tmp_path):
    stored = Path(__file__).parents[2] / "bench/results/pytest_cpu2.json"
    (tmp_path / "local.json").write_bytes(stored.read_bytes())
    command = ["pytest-benchmark", "compare", str(stored), str(tmp_path / "local.json"), "--group-by=fullname"]
    program = Path(sys.executable).with_name(command[0])
    done = subprocess.run([str(program), *command[1:], "--columns=min,median"], capture_output=True, text=True)
    assert done.returncode == 0 and "test_sinkhorn[128x512-ours]" in done.stdout, done.stderr


def test_the_table_of_methods_is_that_of_its_file_and_names_what_was_not_run():
    root = Path(__file__).parents[2]
    command = [sys.executable, "bench/quality/methods_table.py", "table"]
    table = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()[2:]
    assert len(table) == 5 * 2 * 4  # sets, starts, methods
    rows = [json.loads(line) for line in (root / "bench/results/methods_base_tiny.jsonl").read_text().splitlines()]
    run = {(row["set"], row["start"], row["method"]) for row in rows}
    told = (root / "bench/results/methods_compared.md").read_text()
    for line in table:
        place, (_, *figures) = tuple(line.split(" | ")[:3]), line.strip("| ").split(" | ")[3:]
        assert (place[0].strip("| "), *place[1:]) in run or set(figures) == {"not measured"}
        if place[1] == "base" and "not measured" not in figures:
            assert f"| {' | '.join(figures)} |" in told, line
