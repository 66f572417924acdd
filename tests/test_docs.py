"""The documentation is true: every command and example is run as a reader would, links resolve, tests it names exist.

Commands are the `$ ` lines of ```console blocks in README.md, CONTRIBUTING.md and docs/. Those of `upstep-fast` run in
a folder with `photos/` and `labelled/`, on the model that the package ships, page by page from top to bottom;
SUBSTITUTED and SHORTENED say what differs from the page. What cannot run offline in seconds is parsed: PARSED says why.
Other programs' commands are held against what they name: targets, files, extras.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

from upstep_fast import cli, cli_help, kernels
from upstep_fast.demo import assets

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODEL = assets()[0]

# in commands and in python blocks, in this order
SUBSTITUTED = [
    ("vit_base_patch16_224", MODEL),
    ("vit_small_patch16_224", MODEL),
    ("--model M ", f"--model {MODEL} "),
    ('data="photos/", out=', 'steps=2, batch_size=8, prototypes=8, device="cpu", data="photos/", out='),
]
# given behind the page's own flags, so they win
SHORTENED = {
    "adapt": "--steps 2 --batch-size 8 --prototypes 8 --gate none --device cpu",
    "eval": "--device cpu",
    "embed": "--device cpu",
    "finetune": "--epochs 1 --batch-size 2 --device cpu",
    "bench": "--runs 2 --batch-size 4 --device cpu",
}
# a part of the command -> why it is parsed and not run
PARSED = {
    "upstep-fast demo": "two minutes; tests/test_demo.py runs it",
    "../shared/data": "85 minutes, on data that is not shipped",
    "hf-hub:": "a download",
    "hf:": "a download",
    "cuda": "needs a GPU",
    "clips/": "no clips are shipped; tests/test_finetune.py runs them",
}
# programs whose commands are checked but not run, and what is checked in `check_other`
OTHERS = ("make", "pip", "pytest", "cp", "pre-commit", "cmake", "compute-sanitizer", "torchrun", "git", "cd", "python3")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def commands(page: Path) -> list[str]:
    """Commands as typed, continued lines joined, comments gone."""
    text = "".join(blocks(page, "console")).replace("\\\n", " ")
    return [re.sub(r"\s+# .*", "", line[2:]).strip() for line in text.splitlines() if line.startswith("$ ")]


def substituted(text: str) -> str:
    for old, new in SUBSTITUTED:
        text = text.replace(old, new)
    return text


def split(command: str) -> tuple[str, list[str]]:
    """The name of an `upstep-fast` command and its arguments; redirections are left out."""
    words = [w for w in shlex.split(command.partition(" > ")[0])[1:] if w not in ("--quiet", "--plain")]
    return (words[0], words[1:]) if words else ("", [])


def parse(command: str) -> None:
    """Fails unless the command line is one that the program takes, with every value valid."""
    name, args = split(command)
    if name in ("", "--help", "--version"):
        return
    kind = cli.COMMANDS[name]
    if kind.positional and args and not args[0].startswith("-"):
        args = [f"--{kind.positional}", *args]
    cli.parse(kind.config(), args, f"upstep-fast {name}")


def run(command: str) -> None:
    """Runs it in this process; an output that is there already makes room, as on a reader's second try."""
    words = shlex.split(command.partition(" > ")[0])[1:]
    name, args = split(command)
    if "--out" in args and "--resume" not in args:
        out = Path(args[args.index("--out") + 1])
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)
    extra = [] if "--help" in args else SHORTENED.get(name, "").split()
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, *extra])
    assert not stop.value.code, f"exit code {stop.value.code}"


def check_other(command: str) -> None:
    """Holds another program's command against the checkout."""
    words = shlex.split(command)
    words = words[next(i for i, word in enumerate(words) if "=" not in word) :]  # VARIABLE=value in front
    assert words[0] in OTHERS or words[:2] == ["python", "-m"], f"{words[0]}: not known to tests/test_docs.py"
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    if words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = [
            e for word in words for found in re.findall(r"^(?:\.|upstep_fast)\[(.*)\]", word) for e in found.split(",")
        ]
        assert set(named) <= set(extras)
    if words[0] in ("pytest", "cp"):
        for word in words[1:-1] if words[0] == "cp" else words[1:]:
            assert word.startswith("-") or (ROOT / word).exists(), word
    if words[0] == "torchrun" and "upstep_fast" in words:
        parse("upstep-fast " + shlex.join(words[words.index("upstep_fast") + 1 :]))
    if words[:2] == ["python", "-m"]:
        subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True, cwd="/")


@pytest.fixture
def workplace(tmp_path, photos, monkeypatch):
    """What a reader has: photos/ without labels, labelled/ with two classes, and the checkout's folders."""
    shutil.copytree(photos, tmp_path / "photos")
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 4)):
        for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
            (tmp_path / "labelled" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + random.normal(0, 40, (64, 64, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "labelled" / part / name / f"{i}.jpg")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "upstep_fast").symlink_to(ROOT / "upstep_fast")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, photos):
    """A finished run, for pages that begin after one."""
    folder = tmp_path_factory.mktemp("adapted")
    os.symlink(photos, folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(f"upstep-fast adapt --model {MODEL} --data photos/ --out adapted/")
    return folder / "adapted"


WITH_CODE = [page for page in PAGES if commands(page) or blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_every_command_and_example_of_a_page(page, workplace, adapted, capsys):
    shutil.copytree(adapted, workplace / "adapted")
    for command in commands(page):
        line = substituted(command)
        try:
            if not line.startswith("upstep-fast"):
                check_other(line)
            elif any(part in line for part in PARSED):
                parse(line)
            else:
                run(line)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{page.name}: {command}\n{error}\n{capsys.readouterr().err[-2000:]}")
    for code in blocks(page, "python"):
        if re.search(r"\badapt\(", code):
            shutil.rmtree("adapted")
        exec(compile(substituted(code), str(page), "exec"), {"__name__": "example", "model": timm.create_model(MODEL)})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_the_text_has_flags_that_exist(page):
    """Commands within sentences and tables, which may leave out what the sentence is not about."""
    for command in re.findall(r"`(upstep-fast [^`\n]+)`", page.read_text()):
        name, args = split(re.sub(r"\[.*?\]", "", command))
        assert name in cli.COMMANDS or name.isupper() or name in ("--help", "--version"), command
        if name in cli.COMMANDS:
            cli_help.check_flags([a for a in args if a != "--config"], cli.COMMANDS[name].config())


def test_no_command_hides_from_these_tests():
    for page in PAGES:
        for language, text in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.S | re.M):
            if language != "console":
                assert not re.search(r"^\$ |^upstep-fast ", text, re.M), (
                    f"{page.name}: a command outside a console block"
                )


def test_examples_of_the_help_are_valid(workplace, adapted):
    shutil.copytree(adapted, workplace / "adapted")
    for examples in cli_help.EXAMPLES.values():
        for example in examples:
            parse(example)


def test_every_command_is_in_the_table_of_commands():
    table = re.search(r"^\| command \| does \|\n(.*?)\n\n", (ROOT / "docs/cli.md").read_text(), re.S | re.M)
    assert table
    listed = re.findall(r"^\| `(\w+)` \|", table[1], re.M)
    assert sorted(listed) == sorted(cli.COMMANDS)


def test_messages_quoted_in_troubleshooting_are_messages():
    files = [ROOT / "setup.py", *(ROOT / "upstep_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    source = "".join(path.read_text() for path in files)
    for line in (ROOT / "docs/troubleshooting.md").read_text().splitlines():
        seen = line.split("|")[1] if line.startswith("| ") else ""
        for message in re.findall(r"`([^`]+)`", seen):
            assert message in source, message


# the site


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


@pytest.mark.parametrize("wrong", ["[x](nowhere.md)", "[x](methods.md#nowhere)", "::: upstep_fast.trainer.nothing"])
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

    text = (ROOT / "docs/api.md").read_text()
    for name in set(upstep_fast.__all__) - {"__version__", "kernels"}:
        assert re.search(rf"^::: upstep_fast\.\w+\.{name}$", text, re.M), name
    page = (site / "api.html").read_text()
    for name in kernels.__all__:
        if callable(getattr(kernels, name)) and name[0].islower():
            assert f"upstep_fast.kernels.{name}" in text, name
    for field in ("sinkhorn_iterations", "max_bad_fraction", "lora_targets"):
        assert field in page


def test_every_documented_op_has_a_docstring_and_a_formula():
    api = (ROOT / "docs/api.md").read_text()
    formulas = (ROOT / "docs/kernels.md").read_text()
    for module, name in re.findall(r"^::: kernels\.(\w+)\.(\w+)$", api, re.M):
        tree = ast.parse((ROOT / f"kernels/{module}.py").read_text())
        (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        assert len(ast.get_docstring(function) or "") > 40, name
        if not module.startswith("_"):
            section = re.search(rf"^## {module.removesuffix('_fp8')}\n\n( {{4}}.*)", formulas, re.M)
            assert section and re.search(r"=|<-|:", section[1]), f"docs/kernels.md: no formula for {module}"


def test_every_op_has_a_section():
    sections = set(re.findall(r"^## (\w+)$", (ROOT / "docs/kernels.md").read_text(), re.M))
    parts = re.compile(r"_(triton|plain|args|fp8)$")
    modules = {parts.sub("", path.stem) for path in (ROOT / "kernels").glob("[a-z]*.py")}
    assert modules <= sections, modules - sections


# figures and asks


def test_figures_of_performance_are_those_of_the_stored_run():
    text = (ROOT / "docs/performance.md").read_text()
    stored = json.loads((ROOT / "bench/results/bench_cpu_base_tiny.json").read_text())
    for kind in ("backward", "forward"):
        first = stored[kind][0]["median_ms"]
        for row in stored[kind]:
            shown = f"{row['median_ms']:.0f} ({row['low_ms']:.0f}..{row['high_ms']:.0f})"
            shown += f", {first / row['median_ms']:.2f}x PEFT" if row["name"] == "engine" else ""
            assert shown in text, shown


def test_files_of_results_named_in_the_docs_exist():
    for page in PAGES:
        for name in re.findall(r"bench/results/(\w+\.json)", page.read_text()):
            made_here = name in ("local.json", "gpu.json")
            assert made_here or (ROOT / "bench/results" / name).is_file(), f"{page.name}: {name}"


def test_every_ask_has_a_row_and_every_test_it_names_exists():
    rows = re.findall(r"^\| (\d+) \|(.*)\|(.*)\|(.*)\|$", (ROOT / "docs/asks.md").read_text(), re.M)
    assert [int(number) for number, *_ in rows] == list(range(1, 43))
    for number, ask, done, shown in rows:
        assert ask.strip() and done.strip(), number
        named = re.findall(r"`(test_\w+\.py)::(\w+)`", shown)
        assert named, f"ask {number} names no test"
        for file, test in named:
            tree = ast.parse((ROOT / "tests" / file).read_text())
            functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert test in functions, f"ask {number}: {file} has no {test}"


def test_the_licence_is_the_one_that_is_stated():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "LICENSE").read_text()
    assert project["license"] == "Apache-2.0" and "Apache License" in text and "Version 2.0" in text
    assert "Apache-2.0" in (ROOT / "README.md").read_text()
