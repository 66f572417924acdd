"""Shared by all tests: where the real data lies, and the markers' visible skips."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from pathlib import Path

import pytest
import timm
import torch
from gpu_session import pytest_exception_interact, pytest_make_collect_report  # noqa: F401  (hooks)
from interpreter import patch_language_once
from photos import save_photos
from tally import AREAS, tally

from upstep_fast.kernels import _dispatch

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("UPSTEP_FAST_SHARED", ROOT.parent / "shared" / "data"))
SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    no_interpreter = pytest.mark.skip(reason="needs TRITON_INTERPRET=1 (make test-interp)")
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreting:
        patch_language_once()
    for item in items:  # by marker: keywords hold the names of folders too
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("interp") and not interpreting:
            item.add_marker(no_interpreter)


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    skipped = call.excinfo is not None and call.excinfo.errisinstance(pytest.skip.Exception)
    if call.when == "call" and not skipped and (area := AREAS.get(item.path.name)) and item.path.parent.name != "bench":
        tally(area, getattr(item, "originalname", item.name), 1, wrong=int(call.excinfo is not None))


@pytest.fixture(autouse=True)
def no_progress_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the lines that a busy machine adds out of the output that tests compare."""
    with contextlib.suppress(ImportError):  # no rich, on a GPU machine with nothing but the kernels' needs
        monkeypatch.setattr("upstep_fast.runtime.progress.SHORT", 60.0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_logreport(report: pytest.TestReport):
    """Send what a test has printed to pytest-xdist's main process as text that can be encoded."""
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return (yield)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real weights and images; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"real data not found at {SHARED} (set UPSTEP_FAST_SHARED)")
    return SHARED


@pytest.fixture
def triton():
    """Every op that has a Triton kernel runs it, or raises."""
    with _dispatch.forced("triton"):
        yield


@pytest.fixture(scope="module")
def bench():
    """Imports a module of bench/ by its name; they import each other from their own folder."""
    folders = [str(path) for path in (ROOT / "bench").iterdir() if path.is_dir()]
    names = {path.stem for path in (ROOT / "bench").glob("*/*.py")} - set(sys.modules)
    sys.path[:0] = folders
    yield importlib.import_module
    sys.path[:] = [path for path in sys.path if path not in folders]
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny ViT of random weights, as a local-dir."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **SMALL)
    timm.models.save_for_hf(vit, folder, model_args=SMALL, safe_serialization=True)
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """24 colored pictures, unlabeled; not to be written to."""
    return save_photos(tmp_path_factory.mktemp("photos"), 24)


@pytest.fixture(scope="session")
def short_run():
    """A short run of UpStep, as adapt's keywords, but for what it adapts and where it writes."""
    return dict(
        steps=6,
        batch_size=8,
        prototypes=8,
        head_hidden=32,
        head_dim=16,
        lora_r=2,
        precision="fp32",
        device="cpu",
        num_workers=0,
    )


@pytest.fixture
def options(short_run, model, photos, tmp_path):
    """A short run on them; files that want another build on it."""
    return short_run | dict(model=model, data=photos, out=tmp_path / "out")
