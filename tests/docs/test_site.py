"""The documentation's site builds with every link checked, and the reference, figures and asks on it are real."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from upstep_fast import kernels
from upstep_fast.kernels._sample_inputs import SAMPLE_INPUTS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [ROOT / "tests/asks.md", *sorted((ROOT / "bench/results").glob("*.md"))]


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "-d", site]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_builds_with_every_link_and_reference_checked(site):
    assert (site / "index.html").is_file() and (site / "images/step.svg").is_file()


@pytest.mark.parametrize("wrong", ["[x](nowhere.md)", "[x](methods.md#nowhere)", "::: upstep_fast.train.nothing"])
def test_a_broken_link_anchor_or_reference_ends_the_build(tmp_path, wrong):
    """The check of the check."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# One\n\n{wrong}\n\n")
    (tmp_path / "docs/methods.md").write_text("# Two\n")
    config = (ROOT / "mkdocs.yml").read_text().replace("paths: [.]", f"paths: ['{ROOT}']")
    start, end = config.index("nav:"), config.index("plugins:")
    (tmp_path / "mkdocs.yml").write_text(config[:start] + config[end:])
    assert build(tmp_path / "mkdocs.yml", tmp_path / "site").returncode != 0


def test_the_site_asks_no_other_machine(site):
    loads = re.compile(
        r'<(?:script|img|iframe|source)[^>]*\ssrc="(https?:)?//|<link[^>]*rel="(?:stylesheet|preload)[^>]*href="https?:'
    )
    for page in site.rglob("*.html"):
        assert not loads.search(page.read_text()), page.name


def test_relative_links_outside_the_site_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (ROOT / target).exists(), f"{page.name}: {target}"


def test_files_named_in_the_text_exist():
    pattern = re.compile(r"`((?:docs|upstep_fast|kernels|tests|csrc|bench)/[\w./-]+\.\w+)(?:::[\w\[\]-]+)?`")
    for page in PAGES:
        for name in pattern.findall(page.read_text()):
            placeholder = re.search(r"[/_]X\.", name)  # CONTRIBUTING's kernel to be written
            assert placeholder or (ROOT / name).exists(), f"{page.name}: {name}"


# the reference


def test_every_public_name_is_in_the_reference(site):
    import upstep_fast

    text = (ROOT / "docs/reference.md").read_text()
    for name in set(upstep_fast.__all__) - {"__version__", "kernels"}:
        assert re.search(rf"^::: upstep_fast\.{name}$", text, re.M), name
    page = (site / "reference.html").read_text()
    for name in kernels.__all__:
        if callable(getattr(kernels, name)) and name[0].islower():
            assert f"upstep_fast.kernels.{name}" in text, name
    for field in ("sinkhorn_iterations", "max_bad_fraction", "lora_targets"):
        assert field in page


def test_every_documented_op_has_a_docstring_and_a_formula():
    api = (ROOT / "docs/reference.md").read_text()
    formulas = (ROOT / "docs/kernels.md").read_text()
    for module, name in re.findall(r"^::: kernels\.(\w+)\.(\w+)$", api, re.M):
        op = ROOT / "kernels" / module
        trees = [ast.parse(path.read_text()) for path in (op.glob("*.py") if op.is_dir() else [op.with_suffix(".py")])]
        (function,) = [
            node for t in trees for node in t.body if isinstance(node, ast.FunctionDef) and node.name == name
        ]
        assert len(ast.get_docstring(function) or "") > 40, name
        if not module.startswith("_"):
            op = name if name in SAMPLE_INPUTS and not name.endswith("_fp8") else module
            section = re.search(rf"^## {op}\n\n( {{4}}.*)", formulas, re.M)
            assert section and re.search(r"=|<-|:", section[1]), f"docs/kernels.md: no formula for {op}"


def test_every_op_has_a_section():
    sections = set(re.findall(r"^## (\w+)$", (ROOT / "docs/kernels.md").read_text(), re.M))
    ops = {path.stem for path in (ROOT / "kernels").glob("[a-z]*")} | {op.removesuffix("_fp8") for op in SAMPLE_INPUTS}
    assert ops <= sections, ops - sections


# figures and asks


def test_times_in_the_results_are_those_of_the_stored_run():
    text = (ROOT / "docs/results.md").read_text()
    stored = json.loads((ROOT / "bench/results/bench_cpu_base_tiny.json").read_text())
    for kind in ("backward", "forward"):
        first = stored[kind][0]["median_ms"]
        for row in stored[kind]:
            shown = f"{row['median_ms']:.0f} ({row['low_ms']:.0f}..{row['high_ms']:.0f})"
            shown += f", {first / row['median_ms']:.2f}x PEFT" if row["name"] == "engine" else ""
            assert shown in text, shown


def test_files_of_results_named_in_the_docs_exist():
    for page in PAGES:
        for name in re.findall(r"(?<!--out )(?<!--json )bench/results/(\w+\.jsonl?)\b", page.read_text()):
            made_here = name in ("local.json", "gpu.json")
            assert made_here or (ROOT / "bench/results" / name).is_file(), f"{page.name}: {name}"


def test_every_ask_has_a_row_and_every_test_it_names_exists():
    rows = re.findall(r"^\| (\d+) \|(.*)\|(.*)\|(.*)\|$", (ROOT / "tests/asks.md").read_text(), re.M)
    assert [int(number) for number, *_ in rows] == list(range(1, 43))
    for number, ask, done, shown in rows:
        assert ask.strip() and done.strip(), number
        named = re.findall(r"`(test_\w+\.py)::(\w+)`", shown)
        assert named, f"ask {number} names no test"
        for file, test in named:
            (path,) = (ROOT / "tests").rglob(file)
            tree = ast.parse(path.read_text())
            functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert test in functions, f"ask {number}: {file} has no {test}"


def test_the_licence_is_the_one_that_is_stated():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "LICENSE").read_text()
    assert project["license"] == "Apache-2.0" and "Apache License" in text and "Version 2.0" in text
    assert "Apache-2.0" in (ROOT / "README.md").read_text()
