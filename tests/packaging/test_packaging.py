"""What pip makes of the checkout: a pure wheel, an sdist, a wheel with the compiled ops, each used from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata, RawMetadata, parse_email

ROOT = Path(__file__).resolve().parents[2]
FILES = ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md")
FILES += ("CONTRIBUTING.md", "SECURITY.md", "Makefile", "mkdocs.yml")
URL = "https://example.org/someone/upstep_fast"
IGNORED = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")


def run(*command: str | Path, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0 or not check, result.stdout + result.stderr
    return result


def build_wheel(source: Path, to: Path, native: str) -> Path:
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index")
    run(*pip, "--wheel-dir", to, source, cwd=to, UPSTEP_FAST_NATIVE=native, UPSTEP_FAST_URL=URL + "/")
    (wheel,) = to.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what the build reads, so that no stale build folder takes part."""
    folder = tmp_path_factory.mktemp("source") / "upstep_fast"
    folder.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    for name in ("upstep_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=IGNORED, symlinks=True)
    shutil.copytree(ROOT / "docs", folder / "docs")
    for name in ("tests", "bench"):  # must stay out of the wheel
        (folder / name).mkdir()
        (folder / name / "test_nothing.py").touch()
    return folder


@pytest.fixture(scope="module")
def pure_wheel(source, tmp_path_factory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("pure"), "none")


@pytest.fixture(scope="module")
def cpu_wheel(source, tmp_path_factory) -> Path:
    """Through the sdist, so that a file missing there is missed here."""
    to = tmp_path_factory.mktemp("cpu")
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", to, cwd=source, UPSTEP_FAST_NATIVE="none")
    (sdist,) = to.glob("*.tar.gz")
    return build_wheel(sdist, to, "cpu")


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    """An unpacked sdist."""
    to = tmp_path_factory.mktemp("sdist")
    command = (sys.executable, "setup.py", "-q", "sdist", "--dist-dir", to)
    run(*command, cwd=source, UPSTEP_FAST_NATIVE="none", UPSTEP_FAST_URL=URL)
    (archive,) = to.glob("*.tar.gz")
    shutil.unpack_archive(archive, to, filter="data")
    (root,) = (path for path in to.iterdir() if path.is_dir())
    return root


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def use(wheel: Path, site: Path, script: str) -> str:
    """The output of `script`, run in another folder with the wheel's files alone in front of what is installed."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    elsewhere = site.parent / "elsewhere"
    elsewhere.mkdir()
    # the checkout's editable install would lend the wheel what it lacks
    alone = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    return run(sys.executable, "-c", alone + script, cwd=elsewhere, PYTHONPATH=str(site)).stdout


def modules(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


def test_pure_wheel_holds_the_package_and_nothing_else(source, pure_wheel):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    held = names(pure_wheel)
    assert {name.split("/")[0] for name in held if ".dist-info/" not in name} == {"upstep_fast"}
    with zipfile.ZipFile(pure_wheel) as archive:
        (top_level,) = [name for name in held if name.endswith("top_level.txt")]
        assert archive.read(top_level).decode().split() == ["upstep_fast"]
    for folder, home in ((source / "upstep_fast", "upstep_fast"), (source / "kernels", "upstep_fast/kernels")):
        assert {f"{home}/{name}" for name in modules(folder)} <= set(held)
    assert not [name for name in held if name.endswith(".so")]


def metadata_of(wheel: Path) -> RawMetadata:
    """The wheel's metadata as an index reads them; raises for a field that an index would refuse."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        content = archive.read(name)
    Metadata.from_email(content, validate=True)
    raw, unparsed = parse_email(content)
    assert not unparsed
    return raw


def test_metadata_are_complete(pure_wheel, sdist):
    raw = metadata_of(pure_wheel)
    assert raw["license_expression"] == "Apache-2.0" and raw["license_files"] == ["LICENSE"]
    assert raw["description_content_type"] == "text/markdown" and raw["description"].startswith("# upstep_fast")
    assert raw["summary"] and raw["author"] and raw["keywords"]
    assert raw["project_urls"] == {
        "Homepage": URL,
        "Source": URL,
        "Issues": f"{URL}/issues",
        "Documentation": f"{URL}/blob/main/docs/index.md",
        "Changelog": f"{URL}/blob/main/CHANGELOG.md",
    }
    parsed, _ = parse_email((sdist / "PKG-INFO").read_bytes())
    assert {k: v for k, v in parsed.items() if k != "metadata_version"} == {
        k: v for k, v in raw.items() if k != "metadata_version"
    }


def test_classifiers_are_known_and_say_what_is_true(pure_wheel):
    found = metadata_of(pure_wheel)["classifiers"]
    topics = {line.partition(" ::")[0] for line in found}
    assert topics >= {"Development Status", "Intended Audience", "Operating System", "Programming Language", "Typing"}
    assert not [line for line in found if line.startswith("License")]  # indexes refuse it beside license_expression
    lowest = re.search(r">=3\.(\d+)", metadata_of(pure_wheel)["requires_python"])
    versions = [int(v) for line in found for v in re.findall(r"Python :: 3\.(\d+)$", line)]
    assert lowest and versions == list(range(int(lowest[1]), int(lowest[1]) + len(versions)))
    known = pytest.importorskip("trove_classifiers").classifiers
    assert set(found) <= known


def test_every_file_that_is_read_at_run_time_is_in_wheel_and_sdist(source, pure_wheel, sdist):
    held = names(pure_wheel)
    files = [p.relative_to(source) for p in (source / "upstep_fast").rglob("*") if p.is_file() and p.suffix != ".py"]
    assert Path("upstep_fast/py.typed") in files
    assert not [str(path) for path in files if "kernels" not in path.parts and str(path) not in held]
    for path in (*files, "docs/index.md", "SECURITY.md", "CHANGELOG.md", "csrc", "tests/test_nothing.py"):
        assert (sdist / path).exists(), path


CHECK = (
    "import upstep_fast; from upstep_fast.kernels.lora_linear import lora_linear; print(upstep_fast.kernels.__file__)"
)
SITE = sysconfig.get_path("purelib")  # torch and the build's tools; as a plain path, so that its .pth files do nothing


def kernels_from(root: Path) -> Path:
    """Where a fresh interpreter, isolated from the editable install of this checkout, finds upstep_fast.kernels."""
    result = run(sys.executable, "-S", "-c", CHECK, cwd=root, PYTHONPATH=SITE)
    return Path(result.stdout.strip())


def test_kernels_in_a_bare_checkout(source):
    assert kernels_from(source) == source / "upstep_fast/kernels/__init__.py"


def test_kernels_in_an_unpacked_sdist(sdist):
    assert kernels_from(sdist) == sdist / "upstep_fast/kernels/__init__.py"


def test_kernels_in_an_editable_install(source, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    (site,) = tmp_path.glob("venv/lib/python*/site-packages")
    (site / "tools.pth").write_text(SITE)
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q")
    run(*pip, "--no-deps", "--no-build-isolation", "--no-index", "-e", source, cwd=tmp_path, UPSTEP_FAST_NATIVE="none")
    result = run(python, "-c", CHECK, cwd=tmp_path)
    assert Path(result.stdout.strip()) == source / "upstep_fast/kernels/__init__.py"


def test_kernels_of_a_wheel_installed_beside_a_checkout(source, pure_wheel, tmp_path):
    """From the clone's root the checkout wins over the installed wheel, and is whole."""
    with zipfile.ZipFile(pure_wheel) as archive:
        archive.extractall(tmp_path)
    result = run(sys.executable, "-S", "-c", CHECK, cwd=source, PYTHONPATH=f"{tmp_path}{os.pathsep}{SITE}")
    assert Path(result.stdout.strip()) == source / "upstep_fast/kernels/__init__.py"


def test_pure_wheel_runs_elsewhere(pure_wheel, tmp_path):
    script = """
import importlib.util, torch, upstep_fast
from upstep_fast.kernels import center_vector, gate, _dispatch, _native
print(upstep_fast.kernels.__file__)
print(importlib.util.find_spec("kernels"))
print(center_vector.center_vector_update(torch.ones(2, 3), gate.new_gate_state(3)).center.norm().item())
print(_dispatch.report()[0].reason)
try:
    gate.new_gate_flag()
except RuntimeError as error:
    print(error)
"""
    file, shadowed, norm, reason, no_flag = use(pure_wheel, tmp_path / "site", script).splitlines()
    assert Path(file) == tmp_path / "site/upstep_fast/kernels/__init__.py"
    assert shadowed == "None"
    assert float(norm) == pytest.approx(1)
    assert "libupstep_ops.so is not in" in reason
    assert "upstep_fast._C cannot be imported" in no_flag and "--no-build-isolation" in no_flag


def test_cpu_wheel_runs_elsewhere(cpu_wheel, tmp_path):
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    libraries = sorted(name for name in names(cpu_wheel) if name.endswith(".so"))
    assert len(libraries) == 2
    assert re.fullmatch(r"upstep_fast/_C\.cpython-.*\.so", libraries[0])
    assert libraries[1] == "upstep_fast/libupstep_ops.so"
    script = """
import torch
from upstep_fast.kernels import center_vector, gate, _dispatch, _native
flag = gate.new_gate_flag()
center_vector.center_vector_update(torch.ones(2, 3), gate.new_gate_state(3), flag=flag.address)
print(_dispatch.report()[0].implementation, flag.wait(1), _native.has_cuda())
print(_native.extension().__file__)
"""
    ran, file = use(cpu_wheel, tmp_path / "site", script).splitlines()
    assert ran == "cpp (True, True) False"
    assert Path(file).parent == tmp_path / "site/upstep_fast"


def test_the_checkout_shadows_nobody():
    """Transformers may use a distribution named kernels; a test run must not show it our folder."""
    spec = importlib.util.find_spec("kernels")
    assert spec is None or Path(spec.origin or "").parent != ROOT / "kernels"


@pytest.mark.parametrize(
    ("native", "message"),
    [
        ("cuda", "UPSTEP_FAST_NATIVE=cuda cannot be built: no nvcc (set CUDA_HOME)"),
        ("fast", "UPSTEP_FAST_NATIVE='fast' is not one of auto, cuda, cpu, none"),
    ],
)
def test_what_cannot_be_built_is_refused(source, native, message):
    result = run(sys.executable, "setup.py", "--version", cwd=source, check=False,
                 UPSTEP_FAST_NATIVE=native, CUDA_HOME="/nowhere", PATH="/usr/bin:/bin")  # fmt: skip
    assert result.returncode == 1
    assert message in result.stderr


def test_cuda_that_does_not_compile_is_refused(source, tmp_path):
    """An nvcc that does not work: `cuda` ends the build; it never ships less than was asked for."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    folders = ("--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib")
    environment = {"UPSTEP_FAST_NATIVE": "cuda", "CUDA_HOME": str(tmp_path)}
    result = run(sys.executable, "setup.py", "-q", "build_ext", *folders, cwd=source, check=False, **environment)
    assert result.returncode == 1
    assert "UPSTEP_FAST_NATIVE=cuda failed" in result.stderr


def test_build_says_what_it_made(source):
    result = run(sys.executable, "setup.py", "--version", cwd=source, UPSTEP_FAST_NATIVE="none")
    assert "upstep_fast: no compiled ops: pure Python (UPSTEP_FAST_NATIVE=none)" in result.stdout
