#!/usr/bin/env bash
# torchmetrics 1.9.0: adjusted_rand_score multiplies counts of pairs as 64-bit integers. These products grow with the fourth
# power of the number of samples and leave the range at some 100,000 samples in a few clusters, without a warning.
# Seen: 100,000 labels, a tenth of them kept and the others drawn anew from 5 clusters: the index is 0.010 and
# torchmetrics gives -0.066. For the first 5,000 of them it is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torchmetrics==1.9.0 torch==2.14.1 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
from math import comb

import numpy
import torch
from torchmetrics.functional.clustering import adjusted_rand_score

random = numpy.random.default_rng(0)
labels = random.integers(0, 5, 100_000)
clusters = numpy.where(random.random(100_000) < 0.1, labels, random.integers(0, 5, 100_000))

def both(count):
    metric = adjusted_rand_score(torch.tensor(clusters[:count]), torch.tensor(labels[:count])).item()
    table = numpy.histogram2d(labels[:count], clusters[:count], bins=5)[0].astype(int)
    pairs, in_label, in_cluster = (sum(comb(n, 2) for n in m.ravel().tolist()) for m in (table, table.sum(1), table.sum(0)))
    chance = in_label * in_cluster / comb(count, 2)
    reference = (pairs - chance) / ((in_label + in_cluster) / 2 - chance)
    print(f"{count:,} samples: torchmetrics {metric:.4f}, Hubert and Arabie's formula {reference:.4f}")
    return metric, reference

few, many = both(5_000), both(100_000)
assert abs(few[0] - few[1]) < 1e-5 and 0.005 < few[1] < 0.02
assert 0.005 < many[1] < 0.02 and many[0] < -0.03
EOF
