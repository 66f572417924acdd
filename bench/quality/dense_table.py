"""k-NN segmentation by base and adapted patch tokens, plain and whitened, on synthetic scenes with known masks.

    python bench/quality/dense_table.py --hands sign_digits_64.tar --backgrounds source_64.tar --model base_tiny \\
        --runs seed0/ seed1/ seed2/ --json bench/results/dense_cpu.json

The scenes are synthetic (dense.py): hands cut out of photographs by their color and pasted on photographs of the
model's own domain. Each run is of `upstep-fast adapt` on the hands with another seed; backgrounds are drawn with each.
Forms: plain; appended, tokens whitened by a whitening of mean patch tokens, as a run's is; appended, tokens whitened by
one of single tokens (`embed --tokens --fit-whitening`). Both are fitted to the bank, without its labels.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import dense
import torch
import torch.nn.functional as F
from torch import Tensor

import upstep_fast
from upstep_fast.evaluation import whitening
from upstep_fast.evaluation.dense.segmentation import counts_of, knn_votes, miou_of, patch_labels, pixel_accuracy_of
from upstep_fast.evaluation.dense.tokens import append_whitened
from upstep_fast.model.backbone import Backbone
from upstep_fast.runtime import machine

FORMS = ("plain", "whitened as means", "whitened as tokens")


def measured(model: Backbone, bank: dense.Composites, queries: dense.Composites, k: int) -> dict[str, dict[str, float]]:
    """Return {form: {"miou", "pixel_accuracy"}} in percent, of patches."""
    patch = model.vit.patch_embed.patch_size
    x, q = (dense.patch_tokens(model, images) for images in (bank.images, queries.images))
    fitted = {
        "whitened as means": whitening.fit(F.normalize(x.mean(1), dim=-1)[:, None]),
        "whitened as tokens": whitening.fit(x.flatten(0, 1)[:, None]),
    }
    labels, truth = (patch_labels(masks.long(), patch).flatten() for masks in (bank.masks, queries.masks))
    result = {}
    for form in FORMS:

        def of(tokens: Tensor, form: str = form) -> Tensor:
            rows = tokens.flatten(0, 1)
            return append_whitened(rows, fitted[form]) if form in fitted else rows

        counts = counts_of(knn_votes(of(x), labels, of(q), 2, k).argmax(1), truth, 2)
        result[form] = {"miou": 100 * float(miou_of(counts)), "pixel_accuracy": 100 * float(pixel_accuracy_of(counts))}
    return result


def scenes(hands: str, backgrounds: str, size: tuple[int, int], seed: int) -> tuple[dense.Composites, ...]:
    """Return bank and queries, each hand on a background drawn by `seed`."""
    pairs = dense.images_of(hands, backgrounds, size)
    generator = torch.Generator().manual_seed(seed)
    return tuple(dense.composites(a, b[torch.randperm(len(b), generator=generator)]) for a, b in pairs)


def main() -> None:
    """Measure, print a Markdown table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("hands", "backgrounds", "model", "json"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--runs", nargs="+", required=True)
    parser.add_argument("--k", type=int, default=20)
    args = parser.parse_args()
    rows = []
    for seed, run in enumerate(args.runs):
        models = {"base": upstep_fast.load(args.model, device="cpu"), "adapted": upstep_fast.load(run, device="cpu")}
        bank, queries = scenes(args.hands, args.backgrounds, models["base"].backbone.img_size, seed)
        row = {name: measured(m.backbone, bank, queries, args.k) for name, m in models.items()}
        rows.append({"seed": seed} | row)
        print(json.dumps(rows[-1]), flush=True)
    facts = {
        "k": args.k,
        "bank": dense.NUM_BANK,
        "queries": dense.NUM_QUERIES,
        "device": machine.device_card(torch.device("cpu")),
    }
    Path(args.json).write_text(
        json.dumps({"command": __doc__.split("\n\n")[1], **facts, "rows": rows}, indent=1) + "\n"
    )
    print("| tokens | " + " | ".join(FORMS) + " |\n|---|" + "--:|" * len(FORMS))
    for name in ("base", "adapted"):
        cells = []
        for form in FORMS:
            values = [row[name][form]["miou"] for row in rows]
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
