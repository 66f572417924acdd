"""What the data path promises at its limits: a million files and hashes, 100,000 samples, 10,000 damaged files.

    python bench/data/data_limits.py bench/results/data_limits_cpu2.json

Runs the long tests that assert these promises and stores what they record, with the machine and the command.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from upstep_fast.runtime.machine import processor_name

TESTS = (
    "tests/data/test_sources.py::test_a_million_files_list_in_ten_seconds",
    "tests/data/test_loader.py::test_memory_is_flat_over_a_hundred_thousand_samples",
    "tests/data/test_decode.py::test_mutated_files_long",
    "tests/data/test_inspect.py::test_a_million_hashes_are_searched_in_a_minute",
)


def main() -> int:
    out = Path(sys.argv[1])
    root = Path(__file__).resolve().parents[2]
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--timeout=1800", f"--junitxml={report}", *TESTS]
        code = subprocess.run([*command, "-o", "junit_family=xunit1"], cwd=root).returncode
        for case in ElementTree.parse(report).iter("testcase"):
            values = {p.get("name", ""): float(p.get("value", "nan")) for p in case.iter("property")}
            failed = case.find("failure") is not None or case.find("error") is not None
            found[case.get("name", "")] = values | {"passed": not failed, "seconds": float(case.get("time", 0))}
    machine = {"cpu": processor_name(), "cores": os.cpu_count(), "gpu": "none"}
    command_line = f"python bench/data/data_limits.py {out}"
    record = {"date": str(datetime.date.today()), "command": command_line, "machine": machine, "tests": found}
    out.write_text(json.dumps(record, indent=1) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
