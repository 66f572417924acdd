"""Write bench/results/peft_options.md: every option of peft.LoraConfig, read as PEFT reads it or refused by name.

    python bench/reliability/peft_options.py

The cases are those of tests/model/test_peft_options.py: adapters that PEFT makes for a ViT of two blocks with each
option. The difference is the largest of a feature between `upstep_fast.load_adapted` and PEFT, the effect the largest
difference that the adapter makes in PEFT.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import peft

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))
import peft_cases  # noqa: E402

PAGE = ROOT / "bench" / "results" / "peft_options.md"
HEAD = """# Options of PEFT's LoRA

Written by `python bench/reliability/peft_options.py` with PEFT {version}. {read} adapters are read as PEFT reads them
(largest difference of a feature: {worst:.0e}), {refused} are refused by name, {wrong} are read otherwise.

| option | value | outcome | difference to PEFT | effect of the adapter |
|---|---|---|--:|--:|
"""


def main() -> None:
    """Make every adapter, compare, and write the page."""
    rows, differences = [], []
    with tempfile.TemporaryDirectory() as folder:
        name = peft_cases.base(Path(folder) / "base")
        for index, case in enumerate(peft_cases.CASES):
            difference, effect, refusal = peft_cases.outcome(case, name, Path(folder) / str(index))
            values = case.options | case.edits
            value = ", ".join(f"{key}={_value(v)}" for key, v in values.items()) or "PEFT's defaults"
            if refusal:
                rows.append(f"| {case.name} | {value} | refused | | |")
            else:
                differences.append(difference)
                outcome = "read" if difference <= 1e-4 else "**READ OTHERWISE**"
                rows.append(f"| {case.name} | {value} | {outcome} | {difference:.0e} | {effect:.2f} |")
    wrong = sum(difference > 1e-4 for difference in differences)
    counts = {"read": len(differences) - wrong, "refused": len(rows) - len(differences), "wrong": wrong}
    head = HEAD.format(version=peft.__version__, worst=max(differences), **counts)
    PAGE.write_text(head + "\n".join(rows) + "\n")


def _value(value: object) -> str:
    text = (
        f'"{value}"' if isinstance(value, str) else type(value).__name__ if hasattr(value, "__dict__") else str(value)
    )
    return "`" + text.replace("|", "\\|") + "`"


if __name__ == "__main__":
    main()
