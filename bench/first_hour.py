"""The first hour of a new user, timed: every line that the commands print, with the seconds since the start.

    python bench/first_hour.py PHOTOS OUT.md [--steps N]

In a new folder: a clone of this repository, `make demo` (its own environment, then the demo), and on a copy of the
folder PHOTOS `adapt` to its verdict and `embed`, with the included model. OUT.md gets the device card, the seconds and
the longest silence of each command, and the lines. The download of packages is part of it: pip's cache is not used.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from upstep_fast.runtime.machine import processor_name

# pip's lines about the machine's own package indexes, and its progress bars
_OF_PIP = re.compile(r"Looking in (indexes|links): |WARNING: Location |━")
REPOSITORY = Path(__file__).resolve().parent.parent
COMMANDS = (
    "git clone --quiet REPOSITORY upstep_fast",
    "make -C upstep_fast .venv-demo/.installed",
    "make -C upstep_fast demo",
    "upstep-fast adapt --model demo --data photos/ --out adapted/ --steps STEPS",
    "upstep-fast embed adapted/ --data photos/ --out features.npy",
)


def main() -> None:
    """Run the commands and write OUT.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("photos", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        shutil.copytree(options.photos, folder / "photos")
        count = sum(1 for path in (folder / "photos").rglob("*") if path.is_file())
        load, start, rows, lines = os.getloadavg()[0], time.monotonic(), [], []
        for command in COMMANDS:
            began = time.monotonic()
            silence = _run(command.replace("STEPS", str(options.steps)), folder, start, lines)
            rows.append(
                f"| `{command.replace('STEPS', str(options.steps))}` | {time.monotonic() - began:.0f} | {silence:.1f} |"
            )
            options.out.write_text(_page(count, load, rows, lines))


def _run(command: str, folder: Path, start: float, lines: list[str]) -> float:
    """Run a command and append its lines; return its longest silence in seconds. Raises CalledProcessError."""
    # the demo's own environment, whatever the one that runs this; each line at once, although stdout is a pipe
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"PYTHONUNBUFFERED": "1", "PIP_NO_CACHE_DIR": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    env["PATH"] = f"{folder}/upstep_fast/.venv-demo/bin:{env['PATH']}"
    shown = command.replace("REPOSITORY", str(REPOSITORY))
    last = time.monotonic()
    lines.append(f"{last - start:7.1f}  $ {command}")
    silence = 0.0
    with subprocess.Popen(
        shown.split(),
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            now = time.monotonic()
            silence, last = max(silence, now - last), now
            if not _OF_PIP.search(line):
                lines.append(f"{now - start:7.1f}  {_shown(line, folder)}".rstrip())
    silence = max(silence, time.monotonic() - last)
    lines.append(f"{time.monotonic() - start:7.1f}  (exit code {process.returncode})")
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return silence


def _shown(line: str, folder: Path) -> str:
    """Return a line without its end, at most 240 characters, with shorter paths."""
    return re.sub(r"Processing /\S*/", "Processing ", line.rstrip().replace(str(folder), "~"))[:240]


def _page(count: int, load: float, rows: list[str], lines: list[str]) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    table = "\n".join(rows)
    return f"""# The first hour, timed

`python bench/first_hour.py PHOTOS OUT.md`, {datetime.date.today()}, commit {commit.stdout.strip()}; {count} photographs
in PHOTOS. {processor_name()}, {os.cpu_count()} cores, Python {platform.python_version()}. Load of the machine (1 min):
{load:.1f} before, {os.getloadavg()[0]:.1f} after; these commands alone make 1 to 2 of it.

| command | seconds | longest silence, seconds |
| --- | ---: | ---: |
{table}

Each line below carries the seconds since the start.

```
{chr(10).join(lines)}
```
"""


if __name__ == "__main__":
    main()
