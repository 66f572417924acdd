"""Counts of the sweeps for docs/reliability.md: one JSON line per call, read by bench/reliability/figures.py."""

from __future__ import annotations

import json
import os

# files whose every test case is one input of a sweep (tests/conftest.py counts them); others call `tally` themselves
AREAS = {
    "test_adapter_base.py": "adapters",
    "test_broken_adapters.py": "adapters",
    "test_embeddings.py": "features files",
    "test_export.py": "exports",
    "test_figures.py": "figures of eval",
    "test_known_blocks.py": "engine",
    "test_labels.py": "labels and splits",
    "test_listing.py": "folders, lists, tars",
    "test_odd_checkpoints.py": "checkpoints of other tools",
    "test_peft_options.py": "PEFT options",
    "test_pixel_kinds.py": "pixel kinds",
    "test_preprocessing.py": "preprocessing",
    "test_whitening.py": "whitening files",
}


def tally(area: str, kind: str, tried: int, wrong: int = 0, tracebacks: int = 0) -> None:
    """Append a sweep's counts to the file that UPSTEP_FAST_TALLY names; without that variable nothing happens.

    area: a row of the table in docs/reliability.md, such as "pixel kinds", "PEFT options", "command line", "kill
    points" or "hostile files". kind: what varied in this call, counted once however often it is tallied. tried: inputs.
    wrong: wrong results in silence. tracebacks: errors that are not the package's own, and hangs.
    """
    if path := os.environ.get("UPSTEP_FAST_TALLY"):
        with open(path, "a") as file:
            file.write(json.dumps(dict(area=area, kind=kind, tried=tried, wrong=wrong, tracebacks=tracebacks)) + "\n")
