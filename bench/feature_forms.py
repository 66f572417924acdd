"""Which parts of a model's features tell images of a new domain apart: k-NN of several forms, fitted without labels.

    python bench/feature_forms.py bench/study_cpu3.toml NAME --work WORK --out bench/results/feature_forms_cpu.json

Measures finished adapters of the study's configuration NAME and the base model, on the held-out third of each train
part. A form gives each part a weight: x the features, p the mean patch token, wx and wp the same whitened
(whitening.py), each of unit length; a similarity is the weighted mean of the cosines. "fit on N": whitened by N of the
bank's images.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMS = {
    "x": {"x": 1},
    "p": {"p": 1},
    "x p": {"x": 1, "p": 1},
    "wx": {"wx": 1},
    "wx wp": {"wx": 1, "wp": 1},
    "x wx": {"x": 1, "wx": 1},
    "x wx wp": {"x": 1, "wx": 1, "wp": 1},
    "2x wx wp": {"x": 2, "wx": 1, "wp": 1},  # whitening.beside
    "4x wx wp": {"x": 4, "wx": 1, "wp": 1},
    "2x p wx wp": {"x": 2, "p": 1, "wx": 1, "wp": 1},
}
OURS = "2x wx wp"
FEW = (100, 200, 400)


def main() -> None:
    """Measures every data set of the grid and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("name")
    parser.add_argument("--work", type=Path, required=True, help="the study's folder of adapters")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    import study

    jobs = [job for job in study.read_grid(args.grid) if job.name == args.name]
    found = {study.label(job.data): measure(job, args.work) for job in jobs if (args.work / job.key).is_dir()}
    result = {"configuration": args.name, "commit": study.commit(), "device": study.device(), "sets": found}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def measure(job: Any, work: Path) -> dict[str, Any]:
    """{"base" | "adapted" | "ensemble": {form: {"knn", "source"}}}: changes against the base model's x, in points."""
    import study
    from study_scores import SPLITS, knn_percent, labels_of

    from upstep_fast.config import EvalConfig
    from upstep_fast.data.sources import open_source
    from upstep_fast.device import resolve
    from upstep_fast.evaluation import extract, load_models

    data = str(study.selection(job.data, work))
    config = EvalConfig(model=job.model, data=(data,), adapter=str(work / job.key / "adapter"), num_workers=1)
    compute, models = resolve(config.device, config.precision), load_models(config)
    sets = {"knn": (data, job.k), "source": (job.source, 20)}
    x = {
        name: [extract(open_source(path, split=split), models, config, compute)[0] for split in SPLITS]
        for name, (path, _) in sets.items()
    }
    y = {name: labels_of(path) for name, (path, _) in sets.items()}
    kinds = {"base": ("base",), "adapted": ("adapted",), "ensemble": ("base", "adapted")}
    result: dict[str, Any] = {kind: {} for kind in kinds}
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x["knn"][0]["base"]), generator=generator)
    asked = [(name, FORMS[name], order) for name in FORMS]
    asked += [(f"{OURS}, fit on {few}", FORMS[OURS], order[:few]) for few in FEW]
    for name, weights, chosen in asked:
        parts = {
            model: {
                measure: [of_parts(split[model], x["knn"][0][model][chosen]) for split in splits]
                for measure, splits in x.items()
            }
            for model in ("base", "adapted")
        }
        for kind, joined in kinds.items():
            percent = {}
            for measure, (_, k) in sets.items():
                features = [weighted([parts[m][measure][i] for m in joined], weights) for i in range(len(SPLITS))]
                percent[measure] = knn_percent(features, y[measure], k)
            result[kind][name] = percent
    plain = dict(result["base"]["x"])
    return {
        "base_knn": plain["knn"],
        "base_source": plain["source"],
        **{
            kind: {form: {m: at[m] - plain[m] for m in plain} for form, at in forms.items()}
            for kind, forms in result.items()
        },
    }


def of_parts(x: Tensor, fitted_to: Tensor) -> dict[str, Tensor]:
    """Unit x, p, wx and wp of [N, 2, D]."""
    from upstep_fast import whitening

    whitened = whitening.whitened(x, whitening.fit(fitted_to))
    return {"x": x[:, 0], "p": x[:, 1], "wx": whitened[:, 0], "wp": whitened[:, 1]}


def weighted(models: list[dict[str, Tensor]], weights: dict[str, float]) -> Tensor:
    """Side by side, so that a product is the weighted mean of the parts' cosines."""
    total = len(models) * sum(weights.values())
    return torch.cat([parts[part] * (w / total) ** 0.5 for parts in models for part, w in weights.items()], -1)


def table(result: dict[str, Any]) -> str:
    """Markdown: means over the sets, gain and change on the source."""
    sets = result["sets"].values()
    kinds = ("base", "adapted", "ensemble")
    lines = ["| form | " + " | ".join(f"{kind} | source" for kind in kinds) + " |", "|---" + "|--:" * 6 + "|"]
    for form in next(iter(sets))["base"]:
        cells = [
            f"{sum(s[kind][form][measure] for s in sets) / len(sets):+.1f}"
            for kind in kinds
            for measure in ("knn", "source")
        ]
        lines.append(f"| {form} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main()
