"""kernels/ copied alone into another package works there, beside the installed one; and the examples of its docs."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from upstep_fast.kernels import _dispatch
from upstep_fast.kernels.lora_linear import lora_linear, lora_linear_reference

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = re.findall(r"^### (.+?)\n.*?```python\n(.*?)```", (ROOT / "docs/kernels.md").read_text(), re.S | re.M)


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The folder as `someone.else_.ops`, with nothing of upstep_fast beside it; a function that imports from it."""
    home = tmp_path_factory.mktemp("theirs")
    folder = home / "someone" / "else_" / "ops"
    shutil.copytree(ROOT / "kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
    sys.path.insert(0, str(home))
    yield lambda name: importlib.import_module(f"someone.else_.ops.{name}")
    sys.path.remove(str(home))


def names(folder) -> list[str]:
    paths = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.py"))
    return [".".join(path.parts) for path in paths if path.name not in ("__init__", "__main__")]


def ops(namespace: str) -> set[str]:
    return {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith(f"{namespace}::")
    }


def test_every_file_imports_and_registers_ops_of_its_own(copied):
    for name in names(ROOT / "kernels"):
        importlib.import_module(f"upstep_fast.kernels.{name}")
        copied(name)
    theirs = copied("_dispatch").NAMESPACE
    assert theirs != _dispatch.NAMESPACE
    assert ops(theirs) == ops(_dispatch.NAMESPACE) >= {"lora_linear", "lora_linear_backward"}


def test_both_give_right_results_and_report_apart(copied):
    x, w, b, lora_a, lora_b = (torch.randn(s) for s in ((5, 8), (12, 8), (12,), (3, 8), (12, 3)))
    wanted = lora_linear_reference(x, w, b, lora_a, lora_b, 0.5)
    theirs = copied("lora_linear").lora_linear
    leaf = lora_a.requires_grad_()
    mine = lora_linear(x, w, b, leaf, lora_b, 0.5, strategy="split")
    other = theirs(x, w, b, leaf, lora_b, 0.5, strategy="merged")
    torch.testing.assert_close(mine, wanted)
    torch.testing.assert_close(other, wanted)
    for y in (mine, other):
        (gradient,) = torch.autograd.grad(y.sum(), leaf)
        torch.testing.assert_close(gradient, torch.autograd.grad(wanted_sum(x, w, b, leaf, lora_b), leaf)[0])
    reports = [dispatch.report() for dispatch in (_dispatch, copied("_dispatch"))]
    ran = [{row.op: row.implementation for row in report}["lora_linear"] for report in reports]
    assert ran == ["split", "merged"]


def wanted_sum(x, w, b, lora_a, lora_b):
    return lora_linear_reference(x, w, b, lora_a, lora_b, 0.5).sum()


def test_no_file_names_the_package():
    pattern = re.compile(r"^\s*(from|import)\s+upstep_fast\b", re.M)
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not pattern.search(path.read_text()), path


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_example_of_the_docs(title, code):
    torch.manual_seed(0)
    exec(compile(code, f"docs/kernels.md: {title}", "exec"), {"__name__": "example"})


def test_the_docs_have_both_layers():
    assert {"In a DINOv2-style attention", "In a torchtune-style LoRALinear"} <= {title for title, _ in EXAMPLES}
