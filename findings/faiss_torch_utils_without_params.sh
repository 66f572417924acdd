#!/usr/bin/env bash
# faiss-cpu 1.15.1 beside pytorch-metric-learning 2.9.0: the latter imports faiss.contrib.torch_utils, which replaces the
# methods of all indexes of the process. The new `search` has no argument `params`, for arrays neither, so a program that
# searches inverted lists with SearchParametersIVF fails once any of its modules imports the metrics library.
# Seen: the same search works, and after the import raises TypeError; `search_numpy` is the method that was there before.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile faiss-cpu==1.15.1 pytorch-metric-learning==2.9.0 torch==2.14.1 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import faiss
import numpy

x = numpy.random.default_rng(0).standard_normal((2_000, 16)).astype("float32")
index = faiss.index_factory(16, "IVF8,Flat")
index.train(x)
index.add(x)
how = faiss.SearchParametersIVF(nprobe=8)
before = index.search(x[:50], 3, params=how)[1]
assert (before[:, 0] == numpy.arange(50)).all()

import pytorch_metric_learning.utils.inference

try:
    index.search(x[:50], 3, params=how)
except TypeError as error:
    print(f"after the import: TypeError: {error}")
else:
    raise SystemExit("search takes params: this has changed")
assert (index.search_numpy(x[:50], 3, params=how)[1] == before).all()
print("search_numpy gives what search gave")
EOF
