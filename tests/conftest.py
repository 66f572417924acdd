"""Shared by all tests: where the real data lies, and the markers' visible skips."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("UPSTEP_FAST_SHARED", ROOT.parent / "shared" / "data"))

# tests are not on sys.path (import-mode=importlib), so what they share is put where `import` finds it
_spec = importlib.util.spec_from_file_location("kernel_checks", Path(__file__).with_name("kernel_checks.py"))
sys.modules["kernel_checks"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["kernel_checks"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    no_interpreter = pytest.mark.skip(reason="needs TRITON_INTERPRET=1 (make test-interp)")
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "interp" in item.keywords and not interpreting:
            item.add_marker(no_interpreter)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real weights and images; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"real data not found at {SHARED} (set UPSTEP_FAST_SHARED)")
    return SHARED
