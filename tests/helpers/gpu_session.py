"""Hooks for the tests on a GPU machine, which lacks packages and whose processes can lose the GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import sys

import pytest

_MISSING = re.compile(r"ModuleNotFoundError: (?:No module named '(\w+)|import of (\w+)[\w.]* halted)")


def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    """End a pytest-xdist worker after a failed GPU test that lost the context; xdist starts another one in its place.

    Every later call of CUDA in this process would fail, in tests that are right. The failure has been reported before.
    """
    torch = sys.modules.get("torch")
    if torch is None or "PYTEST_XDIST_WORKER" not in os.environ or not node.get_closest_marker("gpu"):
        return
    try:
        torch.cuda.synchronize()
    except Exception as error:  # whatever it is called, this process has no GPU any more
        print(f"{node.nodeid}: this process has lost the GPU: {error}", file=sys.__stderr__, flush=True)
        os._exit(1)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """With -m gpu, skip files that need a package which is not installed; elsewhere that is an error."""
    report = yield
    found = _MISSING.search(str(report.longrepr)) if report.failed else None
    if found and collector.config.option.markexpr == "gpu":
        package = found[1] or found[2]
        if importlib.util.find_spec(package) is None:
            report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: needs {package}")
    return report
