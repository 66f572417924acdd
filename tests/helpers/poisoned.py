"""A process whose GPU context is lost (an illegal access, an assertion on the device) runs no further test."""

from __future__ import annotations

import os
import sys

import pytest


def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    """End a pytest-xdist worker after a failed GPU test that lost the context; xdist starts another one in its place.

    Every later call of CUDA in this process would fail, in tests that are right. The failure has been reported before.
    """
    torch = sys.modules.get("torch")
    if torch is None or "PYTEST_XDIST_WORKER" not in os.environ or "gpu" not in node.keywords:
        return
    try:
        torch.cuda.synchronize()
    except Exception as error:  # whatever it is called, this process has no GPU any more
        print(f"{node.nodeid}: this process has lost the GPU: {error}", file=sys.__stderr__, flush=True)
        os._exit(1)
