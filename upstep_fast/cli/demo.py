"""`upstep-fast demo`: adapt the included model to the included photographs, offline, and measure the change."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.base import DEMO
from upstep_fast.config.flat import defaults, from_flat
from upstep_fast.config.presets import PRESETS
from upstep_fast.config.tools import DemoConfig
from upstep_fast.evaluation.labeled import evaluate
from upstep_fast.evaluation.verdict import eval_verdict
from upstep_fast.model.names import LOCAL, demo_folder
from upstep_fast.report import page as html_report
from upstep_fast.report.next_steps import look_commands
from upstep_fast.report.run_record import read_config
from upstep_fast.report.tables import print_scores, print_verdicts
from upstep_fast.runtime import progress, terminal
from upstep_fast.runtime.run_folder import CONFIG
from upstep_fast.train import adapt

SCORES = "eval.json"  # written last: a demo with it is finished

# three seeds of it, and of the recipe before: docs/results.md
RECIPE: dict[str, Any] = {name: defaults(AdaptConfig)[name] for name in PRESETS["upstep"]}  # of the default recipe
RECIPE |= {"preset": "fast", **PRESETS["fast"]}


def assets() -> tuple[str, str]:
    """Return the included model and photographs as values of --model and --data."""
    folder = demo_folder()
    return f"{LOCAL}{folder}", str(folder.parent / "sign_digits_64.tar")


def run(config: DemoConfig) -> dict[str, Any]:
    """Adapt base_tiny to the hand signs, print the scores and the next command; return the scores."""
    recipe = RECIPE if config.steps is None else {**RECIPE, "steps": config.steps}
    recipe |= {"seed": config.seed}
    out, data, start = Path(config.out), assets()[1], time.monotonic()
    restart = _restart(config, recipe)
    print("A small ViT, trained on 100 kinds of everyday objects, adapts to 1,465 photographs of hands showing digits.")
    print("Training uses no labels:\n", flush=True)
    options = {"model": DEMO, "data": (data,), "out": config.out, "device": config.device, "debug": config.debug}
    adapted = adapt.run(from_flat(AdaptConfig, **options, **restart, **recipe))
    scores = evaluate(
        DEMO, data, adapter=adapted.adapter, source=config.source, device=config.device, json=str(out / SCORES)
    )
    with progress.track("report"):
        page = html_report.write(out)
    print("\nLabels serve only to measure: accuracy in percent on 597 test photographs")
    print_scores(scores)
    if config.source is None:
        print("forgetting: not measured; no images of the model's own domain are shipped (--source PATH)")
    print()
    print_verdicts(adapted.verdict, eval_verdict(scores))
    terminal.print_line(_summary(scores))
    terminal.print_line(f"adapter: {adapted.adapter}  (made in {terminal.format_duration(time.monotonic() - start)})")
    explore, search = look_commands(Path(config.out))
    print("next, look through these photographs, before and after:")
    terminal.print_line(f"  {explore}")
    terminal.print_line(f"  {search}")
    print(
        "next, on your own images (upstep-fast plan says how long it takes):\n"
        "  upstep-fast adapt --model vit_base_patch16_224 --data YOUR_FOLDER --out adapted/"
    )
    terminal.print_line(f"report: {page}")
    return scores


def _summary(scores: dict[str, Any]) -> str:
    """Return k-NN accuracy of the base model and the adapted one, each as it is and whitened, as one line."""
    start = scores["base"]["knn"]

    def gain(model: str, measure: str) -> str:  # + 0.0 turns -0.0 into 0.0
        value = scores[model][measure]
        return f"{value:.1f} % ({round(value - start, 1) + 0.0:+.1f})"

    return (
        f"k-NN accuracy: base {start:.1f} %, whitened {gain('base', 'knn_whitened')}; "
        f"adapted {gain('adapted', 'knn')}, whitened {gain('adapted', 'knn_whitened')}"
    )


def _restart(config: DemoConfig, recipe: Mapping[str, Any]) -> dict[str, bool]:
    """Return resume and overwrite of the run: as given, or as an earlier demo in the folder asks for; say which.

    Only a run of exactly the demo's settings counts as the demo's own; another one is refused as `adapt` does.
    """
    out, flags = Path(config.out), {"resume": config.resume, "overwrite": config.overwrite}
    if any(flags.values()) or not (out / CONFIG).is_file():
        return flags
    before = read_config(out)
    data = before.get("data") or [""]
    free = {"steps": before.get("steps"), "seed": before.get("seed")}
    is_demo = before.get("model") in (DEMO, assets()[0]) and Path(str(data[0])).name == Path(assets()[1]).name
    if not is_demo or any(before.get(name) != value for name, value in {**RECIPE, **free}.items()):
        return flags
    if (out / SCORES).is_file():
        terminal.print_line(f"{out} holds a finished demo of {free['steps']} steps: it is run again and replaced.")
        return flags | {"overwrite": True}
    if any(free[name] != recipe[name] for name in free):
        terminal.print_line(f"{out} holds a stopped demo of other settings: it is replaced.")
        return flags | {"overwrite": True}
    terminal.print_line(f"{out} holds a stopped demo: it continues (--overwrite starts again).")
    return flags | {"resume": True}
