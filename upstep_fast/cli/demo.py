"""`upstep-fast demo`: adapt the included model to the included photographs, offline, and measure the change."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.flat import from_flat
from upstep_fast.config.tools import DemoConfig
from upstep_fast.evaluation.labeled import evaluate
from upstep_fast.model.names import DEMO, LOCAL, demo_folder
from upstep_fast.report import page as html_report
from upstep_fast.report.tables import print_scores
from upstep_fast.runtime import terminal
from upstep_fast.train import adapt

# chosen for this set on 2 CPU cores: docs/results.md has the runs it was chosen from
RECIPE: dict[str, Any] = {
    "steps": 160,
    "batch_size": 64,
    "lr": 6e-3,
    "gate": "none",
    "cvr": "off",
    "prototypes": 64,
}


def assets() -> tuple[str, str]:
    """Return the included model and photographs as values of --model and --data."""
    folder = demo_folder()
    return f"{LOCAL}{folder}", str(folder.parent / "sign_digits_64.tar")


def run(config: DemoConfig) -> dict[str, Any]:
    """Adapt base_tiny to the hand signs, print the scores and the next command; return the scores."""
    model, data = DEMO, assets()[1]
    recipe = RECIPE if config.steps is None else {**RECIPE, "steps": config.steps}
    print("A small ViT, trained on 100 kinds of everyday objects, adapts to 1,465 photographs of hands showing digits.")
    print("Training uses no labels:\n")
    start = time.monotonic()
    adapted = adapt.run(
        from_flat(
            AdaptConfig,
            model=model,
            data=(data,),
            out=config.out,
            overwrite=config.overwrite,
            device=config.device,
            seed=config.seed,
            debug=config.debug,
            **recipe,
        )
    )
    scores = evaluate(
        model,
        data,
        adapter=adapted.adapter,
        source=config.source,
        device=config.device,
        json=str(Path(config.out) / "eval.json"),
    )
    page = html_report.write(Path(config.out))
    print("\nThe labels are used only now, to measure: accuracy in percent on 597 test photographs")
    print_scores(scores)
    if config.source is None:
        print("forgetting: not measured; no images of the model's own domain are shipped (--source PATH)")
    print()
    terminal.print_line(f"report: {page}")
    terminal.print_line(f"adapter: {adapted.adapter}  (made in {time.monotonic() - start:.0f} s)")
    print(
        "next, on your own images:\n  upstep-fast adapt --model vit_base_patch16_224 --data YOUR_FOLDER --out adapted/"
    )
    return scores
