#!/usr/bin/env bash
# safetensors 0.8.0: the entries of the metadata are written in a random order, in one process too, so that saving equal
# tensors with equal metadata gives different bytes, and different hashes, unless there is at most one entry.
# Seen: 20 saves with three entries give several different files; with one entry they give one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import numpy
from safetensors.numpy import save

def files(metadata):
    return len({save({"a": numpy.zeros(1, "float32")}, metadata) for _ in range(50)})

one, three = files({"x": "1"}), files({"x": "1", "y": "2", "z": "3"})
print(f"one entry: {one} different files of 50; three entries: {three}")
assert one == 1 and three > 1
EOF
