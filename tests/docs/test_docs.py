"""The documentation is true: every command and example is run as a reader would.

Commands are the `$ ` lines of ```console blocks in README.md, CONTRIBUTING.md, docs/ and bench/results/. Those of
`upstep-fast` run in a folder with `photos/` and `labeled/`, on the model that the package ships, page by page from top
to bottom; SUBSTITUTED and SHORTENED say what differs from the page. What cannot run offline in seconds is parsed:
PARSED says why.
Other programs' commands are held against what they name: targets, files, extras.
"""

from __future__ import annotations

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
from build.__main__ import main_parser
from PIL import Image

from upstep_fast.cli import commands as cli
from upstep_fast.cli import help as cli_help
from upstep_fast.cli.demo import assets
from upstep_fast.cli.parse import parse as parse_flags

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [ROOT / "tests/asks.md", *sorted((ROOT / "bench/results").glob("*.md"))]
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
    "upstep-fast demo": "two minutes; tests/cli/test_demo.py runs it",
    "../shared/data": "85 minutes, on data that is not shipped",
    "upstep-fast explore": "serves until Ctrl-C; tests/explorer/ runs it",
    "upstep-fast push": "an upload; tests/model/test_hub.py runs it on a server of its own",
    "hf-hub:": "a download",
    "--budget": "minutes; tests/train/test_budget.py runs it",
    "hf:": "a download",
    "cuda": "needs a GPU",
    "--data ct/ --out adapted/": "no scans are shipped; docs/radiology.md makes some",
    "--masks masks/": "no masks are shipped; tests/evaluation/test_segmentation.py makes some",
    "clips/": "no clips are shipped; tests/train/test_finetune.py runs them",
}
# programs whose commands are checked but not run, and what is checked in `check_other`
OTHERS = ("make", "pip", "pytest", "cp", "pre-commit", "cmake", "compute-sanitizer", "torchrun", "git", "cd", "python3")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def commands(page: Path) -> list[str]:
    """Commands of a page."""
    return commands_of("".join(blocks(page, "console")))


def steps(page: Path) -> list[str]:
    """Commands, which start with their program's name, and blocks of Python, each with a newline at its end."""
    found = re.findall(r"^```(console|python)\n(.*?)^```", page.read_text(), re.S | re.M)
    return [step for language, text in found for step in (commands_of(text) if language == "console" else [text])]


def commands_of(text: str) -> list[str]:
    """Commands as typed, continued lines joined, comments gone."""
    text = text.replace("\\\n", " ")
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
    parse_flags(kind.config(), kind.named(args), f"upstep-fast {name}")


def run(command: str) -> None:
    """Runs it in this process; an output that is there already makes room, as on a reader's second try."""
    words = shlex.split(command.partition(" > ")[0])[1:]
    name, args = split(command)
    if "--out" in args and "--resume" not in args:
        out = Path(args[args.index("--out") + 1])
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)
    extra = [] if "--help" in args else SHORTENED.get(name, "").split()
    if "--preset" in args:  # "fast", whose objective has no prototypes
        at = extra.index("--prototypes")
        del extra[at : at + 2]
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, *extra])
    assert not stop.value.code, f"exit code {stop.value.code}"


def check_other(command: str) -> None:
    """Holds another program's command against the checkout."""
    words = shlex.split(command)
    words = words[next(i for i, word in enumerate(words) if "=" not in word) :]  # VARIABLE=value in front
    assert words[0] in OTHERS or words[:2] == ["python", "-m"], f"{words[0]}: not known to tests/docs/test_docs.py"
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
    if words[:3] == ["python", "-m", "build"]:  # its wheel and sdist: tests/packaging
        main_parser().parse_args(words[3:])
    elif words[:2] == ["python", "-m"]:
        subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True, cwd="/")


@pytest.fixture
def workplace(tmp_path, photos, monkeypatch):
    """What a reader has: photos/ without labels, labeled/ with two classes, and the checkout's folders."""
    shutil.copytree(photos, tmp_path / "photos")
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 4)):
        for name, color in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
            (tmp_path / "labeled" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(color) + random.normal(0, 40, (64, 64, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "labeled" / part / name / f"{i}.jpg")
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
    for step in steps(page):
        if step.endswith("\n"):
            if re.search(r"\badapt\(", step):
                shutil.rmtree("adapted")
            exec(
                compile(substituted(step), str(page), "exec"),
                {"__name__": "example", "model": timm.create_model(MODEL)},
            )
            continue
        line = substituted(step)
        try:
            if not line.startswith("upstep-fast"):
                check_other(line)
            elif any(part in line for part in PARSED):
                parse(line)
            else:
                run(line)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{page.name}: {step}\n{error}\n{capsys.readouterr().err[-2000:]}")


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
    table = re.search(r"^\| command \| does \|\n(.*?)\n\n", (ROOT / "docs/reference.md").read_text(), re.S | re.M)
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
