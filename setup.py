"""Builds the compiled ops: CMake and ninja, driven by setuptools.

UPSTEP_FAST_NATIVE says what to make:
    auto  what this machine can: CUDA and CPU ops (torch, nvcc), CPU ops (torch, a C++ compiler), or none (the default)
    cuda  CUDA and CPU ops; fails where it cannot
    cpu   CPU ops; fails where it cannot
    none  pure Python
UPSTEP_FAST_URL is the repository's address, for the links in the metadata of a release; the checkout knows none.
UPSTEP_FAST_ARCHITECTURES names the GPU generations, such as "90-real" for a quick build on one machine.
Two files come out, beside upstep_fast/__init__.py: libupstep_ops.so (the ops, on torch's stable ABI) and _C (pybind11).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ASKED = os.environ.get("UPSTEP_FAST_NATIVE", "auto")
LIBRARY = "upstep_fast.libupstep_ops"
MODULE = "upstep_fast._C"


def say(line: str) -> None:
    print(f"upstep_fast: {line}", flush=True)


def folder_of(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    at_home = Path(home, "bin", "nvcc")
    return str(at_home) if at_home.is_file() else shutil.which("nvcc")


def plan() -> tuple[str, str]:
    """What to build ("cuda", "cpu", "none") and why not more. Exits where what was asked for cannot be."""
    if ASKED not in ("auto", "cuda", "cpu", "none"):
        sys.exit(f"upstep_fast: UPSTEP_FAST_NATIVE={ASKED!r} is not one of auto, cuda, cpu, none")
    if ASKED == "none":
        return "none", "UPSTEP_FAST_NATIVE=none"
    missing = None
    if sys.platform != "linux":
        missing = f"the compiled ops build on Linux, this is {sys.platform}"
    elif folder_of("torch") is None:
        missing = "torch is not in the build's environment (install it, then use --no-build-isolation)"
    elif not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")):
        missing = "no C++ compiler"
    if missing:
        if ASKED != "auto":
            sys.exit(f"upstep_fast: UPSTEP_FAST_NATIVE={ASKED} cannot be built: {missing}")
        return "none", missing
    if ASKED == "cpu":
        return "cpu", "UPSTEP_FAST_NATIVE=cpu"
    if find_nvcc() is None:
        if ASKED == "cuda":
            sys.exit("upstep_fast: UPSTEP_FAST_NATIVE=cuda cannot be built: no nvcc (set CUDA_HOME)")
        return "cpu", "no nvcc"
    return "cuda", ""


class CMakeBuild(build_ext):
    """Both files in one CMake build; setuptools then copies them where a wheel or an editable install wants them."""

    def run(self) -> None:
        kind, why = plan()
        try:
            self.compile(kind)
        except (OSError, subprocess.CalledProcessError) as error:
            if ASKED != "auto":
                sys.exit(f"upstep_fast: UPSTEP_FAST_NATIVE={ASKED} failed: {error}")
            kind, why, self.extensions = "none", f"the build failed: {error}", []
        made = {"cuda": "CUDA and CPU ops", "cpu": "CPU ops", "none": "no compiled ops: pure Python"}[kind]
        say(made + (f" ({why})" if why else ""))
        if self.extensions and self.inplace:
            self.copy_extensions_to_source()

    def compile(self, kind: str) -> None:
        # every ABI and kind has its own folder: a wheel for another Python must not reuse this one's cache
        build = Path(self.build_temp).resolve() / kind
        cmake = [
            f"-DUPSTEP_FAST_OUTPUT={(Path(self.build_lib).resolve() / 'upstep_fast')}",
            f"-DUPSTEP_FAST_CUDA={'ON' if kind == 'cuda' else 'OFF'}",
            f"-DUPSTEP_FAST_VERSION={self.distribution.get_version()}",
            f"-DTORCH_FOLDER={folder_of('torch')}",
            f"-Dpybind11_ROOT={folder_of('pybind11')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]
        if kind == "cuda":
            cmake.append(f"-DCMAKE_CUDA_COMPILER={find_nvcc()}")
            if architectures := os.environ.get("UPSTEP_FAST_ARCHITECTURES"):
                cmake.append(f"-DUPSTEP_FAST_ARCHITECTURES={architectures}")
        # pip does not put the cmake and ninja of its own environment on the path
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        environment = {**os.environ, "PATH": path}
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *cmake]
        for command in (configure, ["cmake", "--build", str(build)]):
            subprocess.run(command, check=True, env=environment)

    def get_ext_filename(self, fullname: str) -> str:
        # a plain .so for the library: the same file serves every Python
        if fullname.rpartition(".")[2] == LIBRARY.rpartition(".")[2]:
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)


def project_urls() -> dict[str, str]:
    """The links in a release's metadata. Branches and folders are those of this checkout."""
    url = os.environ.get("UPSTEP_FAST_URL", "").rstrip("/")
    if not url:
        return {}
    files = {"Documentation": "docs/index.md", "Changelog": "CHANGELOG.md"}
    pages = {name: f"{url}/blob/main/{path}" for name, path in files.items()}
    return {"Homepage": url, "Source": url, "Issues": f"{url}/issues", **pages}


setup(
    project_urls=project_urls(),
    ext_modules=[] if plan()[0] == "none" else [Extension(LIBRARY, []), Extension(MODULE, [])],
    cmdclass={"build_ext": CMakeBuild},
)
if plan()[0] == "none":
    say(f"no compiled ops: pure Python ({plan()[1]})")
