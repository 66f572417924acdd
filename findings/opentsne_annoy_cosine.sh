#!/usr/bin/env bash
# openTSNE 1.0.4: with metric="cosine" the exact search passes 1 - cos on to the Gaussian kernel, the search by Annoy the
# length of the chord, sqrt(2 - 2 cos). Annoy is chosen from 1,000 samples on, so that the affinities change there.
# Seen: neighbors of 1,000 samples are equal, distances differ by that formula, and 13 % of the affinities' mass lies
# elsewhere. For 999 samples "auto" is the exact search; with metric="euclidean" the two agree.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openTSNE==1.0.4 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import numpy
from openTSNE.affinity import PerplexityBasedNN
from openTSNE.nearest_neighbors import Annoy, Sklearn

x = numpy.random.default_rng(0).normal(size=(1_000, 16))

def affinities(metric, method, count=1_000):
    return PerplexityBasedNN(x[:count], perplexity=30, metric=metric, method=method, random_state=0)

neighbors = {search: search(x, 15, metric="cosine", random_state=0).build() for search in (Sklearn, Annoy)}
for search, (indices, distances) in neighbors.items():
    print(f"{search.__name__}: neighbors {indices[0, :3].tolist()}, distances {distances[0, :3].round(4).tolist()}")
(exact, cosine), (approximate, chord) = neighbors.values()
same = exact == approximate
assert same.mean() > 0.95
assert numpy.allclose(chord[same], numpy.sqrt(2 * cosine[same]), atol=1e-4)
moved = {}
for metric in ("cosine", "euclidean"):
    by_exact, by_annoy = (affinities(metric, method).P for method in ("exact", "annoy"))
    moved[metric] = abs(by_exact - by_annoy).sum() / by_exact.sum()
print("sum of the differences of affinities:", {metric: round(float(value), 4) for metric, value in moved.items()})
chosen = [type(affinities("cosine", "auto", count).knn_index).__name__ for count in (999, 1_000)]
print("auto for 999 and 1,000 samples:", chosen)
assert moved["cosine"] > 0.08 and moved["euclidean"] < 0.01 and chosen == ["Sklearn", "Annoy"]
EOF
