"""The Dockerfile: its own lines where there is no docker, the image where there is."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
LINES = [line.split(" ", 1) for line in TEXT.splitlines() if line and not line.startswith("#")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def of(instruction):
    return [rest for name, rest in LINES if name == instruction]


def copied():
    """Sources of the COPY lines that read the build context, with their destinations."""
    lines = [line.split() for line in of("COPY") if not line.startswith("--from")]
    return [(source, words[-1]) for words in lines for source in words[:-1]]


def test_what_is_copied_exists_and_reaches_docker():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*" and {"**/__pycache__", "**/*.so"} <= set(rules)
    sources = {source for source, _ in copied()}
    assert sources == {rule[1:] for rule in rules if rule.startswith("!")}
    assert not [source for source in sources if not (ROOT / source).exists()]


def test_arguments_are_declared_and_the_program_is_not_root():
    declared = [re.match(r"\w+", rest)[0] for rest in of("ARG")]
    assert set(re.findall(r"\$\{(\w+)\}", TEXT)) == set(declared)
    assert of("USER") == ["upstep"] and "useradd" in TEXT
    assert of("ENTRYPOINT") == ['["upstep-fast"]'] and "upstep-fast" in PROJECT["project"]["scripts"]


def test_requirements_are_those_of_the_project():
    extras = dict(line.split("=", 1) for line in of("ARG"))["EXTRAS"].split(",")
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])
    installed = " ".join(of("RUN"))
    for requirement in PROJECT["build-system"]["requires"]:
        assert requirement.partition(">")[0] in installed
    torch = next(line for line in PROJECT["project"]["dependencies"] if line.startswith("torch"))
    assert f"'{torch}'" in installed


def test_what_is_copied_installs(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name, to in copied():
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / to, ignore=shutil.ignore_patterns("__pycache__", "*.so"), symlinks=True
            )
        else:
            shutil.copy(ROOT / name, source / to)
    (line,) = (line for line in of("RUN") if "--no-build-isolation" in line)
    options = line.partition("&&")[0].removeprefix("pip install ").split()
    assert options.pop() == '".[${EXTRAS}]"'
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        *options,
        "--no-deps",
        "--no-index",
        "-q",
        "--target",
        "../site",
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, env={"PATH": "/usr/bin:/bin", "UPSTEP_FAST_NATIVE": "none"})
    assert (tmp_path / "site/upstep_fast/assets/base_tiny/model.safetensors").is_file()
    assert (tmp_path / "site/upstep_fast/kernels/gate.py").is_file()
    assert (tmp_path / "site/bin/upstep-fast").is_file()


@pytest.mark.long
def test_the_image_is_built_and_runs(tmp_path):
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("needs docker and its daemon")

    def docker(*args):
        result = subprocess.run(["docker", *args], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    image = docker("build", "--quiet", str(ROOT)).strip()
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", docker("run", "--rm", image, "--version"))
    assert docker("run", "--rm", "--entrypoint", "id", image, "-u").strip() != "0"
    tmp_path.chmod(0o777)
    mount = ("--volume", f"{tmp_path}:/work", "--user", "12345:12345")
    docker("run", "--rm", *mount, image, "demo", "--steps", "2", "--out", "demo")
    assert (tmp_path / "demo/adapter/adapter_model.safetensors").is_file()
