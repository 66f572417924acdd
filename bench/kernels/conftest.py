"""Path of the modules that the benchmarks here share."""

from __future__ import annotations

import sys
from pathlib import Path

# pytest's importlib mode puts no test folder on the path
sys.path.append(str(Path(__file__).parent))
