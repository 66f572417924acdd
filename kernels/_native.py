"""Compiled ops of an installed upstep_fast: loaded when first needed; if they cannot be, the reason is cached.

libupstep_ops.so (the ops, `torch.ops.upstep_ops`) and the module _C (build info, GateFlag) lie in the folder of an
installed `upstep_fast`. A copy of this folder in another project uses them too, and runs without them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

LIBRARY = "libupstep_ops.so"
_OLDEST = (8, 0)  # compute capability of the oldest GPU the library holds code for
_CURE = "pip install --no-build-isolation upstep_fast, with torch and a C++ compiler there, builds it"


@functools.cache
def library_folder() -> Path | None:
    """Return the folder of the installed upstep_fast, found without importing it; None: not installed."""
    spec = importlib.util.find_spec("upstep_fast")
    folders = spec.submodule_search_locations if spec else None
    return Path(next(iter(folders))) if folders else None


@functools.cache
def load_failure() -> str | None:
    """Load the compiled ops, once; returns why they cannot be used, or None."""
    if hasattr(torch.ops.upstep_ops, "center_vector"):
        return None  # another copy of this folder was here first
    folder = library_folder()
    if folder is None:
        return "upstep_fast, which brings the compiled ops, is not installed"
    if not (folder / LIBRARY).is_file():
        return f"{LIBRARY} is not in {folder}: {_CURE}"
    try:
        torch.ops.load_library(folder / LIBRARY)
    except (OSError, RuntimeError) as error:
        return f"{folder / LIBRARY} does not load: {str(error).splitlines()[0]}"
    return None


def has_cuda() -> bool:
    """Return whether the loaded library holds CUDA ops."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("upstep_ops::center_vector", "CUDA")


def native_unsupported_reason(kind: str, device: torch.device, op: str = "center_vector") -> str | None:
    """Return why the compiled op of this kind ("cpp" or "cuda") cannot take tensors on `device`, or None."""
    expected = "cpu" if kind == "cpp" else "cuda"
    if device.type != expected:
        return f"needs {expected.upper()} tensors, got {device}"
    if failure := load_failure():
        return failure
    if not hasattr(torch.ops.upstep_ops, op):
        return f"{LIBRARY} is older than {op}: {_CURE}"
    if kind == "cpp":
        return None
    if not has_cuda():
        return f"{LIBRARY} was built without CUDA (UPSTEP_FAST_NATIVE=cuda makes the build insist on it)"
    if (capability := torch.cuda.get_device_capability(device)) < _OLDEST:
        return "needs compute capability {}.{} or newer, got {}.{}".format(*_OLDEST, *capability)
    return None


def extension() -> ModuleType:
    """Import the module upstep_fast._C. Raises RuntimeError, with the cure, where it was not built."""
    try:
        return importlib.import_module("upstep_fast._C")
    except ImportError as error:
        raise RuntimeError(f"upstep_fast._C cannot be imported ({error}): {_CURE}") from error
