"""Which parts of a model's features tell images of a new domain apart: k-NN of several forms, fitted without labels.

    python bench/quality/feature_forms.py bench/quality/study_cpu3.toml NAME --work WORK --out FILE

Measures finished adapters of the study's configuration NAME and the base model, on the held-out third of each train
part. A form gives each part a weight: x the features, p the mean patch token, wx and wp the same whitened
(whitening.py), each of unit length; a similarity is the weighted mean of the cosines. "fit on N": whitened by N of the
bank's images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import study
import torch
from job import label
from study_scores import SOURCE_K, SPLITS, knn_percent, labels_of
from torch import Tensor

from upstep_fast.config.evaluate import EvalConfig
from upstep_fast.config.flat import from_flat
from upstep_fast.data.sources.source import open_source
from upstep_fast.evaluation import whitening
from upstep_fast.evaluation.features import extract, load_models
from upstep_fast.runtime.device import resolve

FORMS = {
    "x": {"x": 1},
    "p": {"p": 1},
    "x p": {"x": 1, "p": 1},
    "wx": {"wx": 1},
    "wx wp": {"wx": 1, "wp": 1},
    "x wx": {"x": 1, "wx": 1},
    "x wx wp": {"x": 1, "wx": 1, "wp": 1},
    "2x wx wp": {"x": 2, "wx": 1, "wp": 1},  # whitening.append_whitened
    "4x wx wp": {"x": 4, "wx": 1, "wp": 1},
    "2x p wx wp": {"x": 2, "p": 1, "wx": 1, "wp": 1},
}
OURS = "2x wx wp"
FEW = (100, 200, 400)
KINDS = {"base": ("base",), "adapted": ("adapted",), "ensemble": ("base", "adapted")}


def main() -> None:
    """Measures every data set of the grid and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("name")
    parser.add_argument("--work", type=Path, required=True, help="the study's folder of adapters")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    jobs = [job for job in study.read_grid(args.grid) if job.name == args.name]
    lacking = [label(job.data) for job in jobs if not (args.work / job.key / "adapter").is_dir()]
    if not jobs or lacking:
        parser.error(
            f"no adapter of {args.name} for {', '.join(lacking) or 'any set'} in {args.work}; run study.py first"
        )
    found = {f"{label(job.data)} seed {job.seed}": measure(job, args.work) for job in jobs}
    result = {"configuration": args.name, "commit": study.commit(), "device": study.device(), "sets": found}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def measure(job: Any, work: Path) -> dict[str, Any]:
    """Return changes against the base x in points, {kind: {form: {"knn", "source"}}}, and its percentages."""
    data = str(study.selection(job.data, work))
    config = from_flat(
        EvalConfig, model=job.model, data=(data,), adapter=str(work / job.key / "adapter"), num_workers=1
    )
    compute, models = resolve(config.runtime.device, config.runtime.precision), load_models(config)
    sets = {"knn": (data, job.k), "source": (job.source, SOURCE_K)}
    x = {
        what: [extract(open_source(path, split=split), models, config, compute)[0] for split in SPLITS]
        for what, (path, _) in sets.items()
    }
    y = {what: labels_of(path) for what, (path, _) in sets.items()}
    bank = x["knn"][0]
    order = torch.randperm(len(bank["base"]), generator=torch.Generator().manual_seed(0))
    percent: dict[str, dict[str, dict[str, float]]] = {kind: {} for kind in KINDS}
    for few in (None, *FEW):
        fitted = {model: whitening.fit(bank[model][order[:few]]) for model in bank}
        parts = {
            what: [{model: of_parts(split[model], fitted[model]) for model in split} for split in splits]
            for what, splits in x.items()
        }
        for form in FORMS if few is None else (OURS,):
            name = form if few is None else f"{form}, fit on {few}"
            for kind, joined in KINDS.items():
                percent[kind][name] = {
                    what: knn_percent(
                        [weighted([split[model] for model in joined], FORMS[form]) for split in splits],
                        y[what],
                        sets[what][1],
                    )
                    for what, splits in parts.items()
                }
    plain = percent["base"]["x"]
    changes = {
        kind: {form: {what: at[what] - plain[what] for what in plain} for form, at in forms.items()}
        for kind, forms in percent.items()
    }
    return {"base_knn": plain["knn"], "base_source": plain["source"], **changes}


def of_parts(x: Tensor, by: whitening.Whitening) -> dict[str, Tensor]:
    """Return unit features x, patch means p, and both whitened (wx, wp), of features [N, 2, D]."""
    whitened = whitening.whitened(x, by)
    return {"x": x[:, 0], "p": x[:, 1], "wx": whitened[:, 0], "wp": whitened[:, 1]}


def weighted(models: list[dict[str, Tensor]], weights: dict[str, float]) -> Tensor:
    """Side by side, so that a product is the weighted mean of the parts' cosines."""
    total = len(models) * sum(weights.values())
    return torch.cat([parts[part] * (w / total) ** 0.5 for parts in models for part, w in weights.items()], -1)


def table(result: dict[str, Any]) -> str:
    """Markdown: means over the sets, gain and change on the source."""
    sets = result["sets"].values()
    lines = ["| form | " + " | ".join(f"{kind} | source" for kind in KINDS) + " |", "|---" + "|--:" * 6 + "|"]
    for form in next(iter(sets))["base"]:
        cells = [
            f"{sum(s[kind][form][measure] for s in sets) / len(sets):+.1f}"
            for kind in KINDS
            for measure in ("knn", "source")
        ]
        lines.append(f"| {form} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
