#!/usr/bin/env bash
# triton 3.6.0 (the one of torch 2.11): a kernel with a nested tuple on the left of an assignment fails before it is
# compiled: DependenciesFinder.visitAssnTarget (runtime/jit.py) puts the inner tuple's list of names into a set. Triton 3.8.0
# takes the same kernel. No GPU is needed.
# Seen: `a, (b, c) = H * W, (W, H)`: TypeError: unhashable type: 'list', without the kernel's name or line.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/kernel.py" <<'EOF'
import sys

import triton
import triton.language as tl

@triton.jit
def flat(x, H, W):
    a, b, c = H * W, W, H
    tl.store(x, a + b + c)

@triton.jit
def nested(x, H, W):
    a, (b, c) = H * W, (W, H)
    tl.store(x, a + b + c)

def outcome(kernel):
    try:
        kernel.cache_key  # what a launch asks for first: a hash of the source and of the names that it uses
    except TypeError as error:
        return str(error)
    return "taken"

found = outcome(flat), outcome(nested)  # once: 3.6.0 answers a second time as if nothing had happened
print(f"triton {triton.__version__}: flat: {found[0]}; nested: {found[1]}")
assert found == ("taken", sys.argv[1])
EOF
for case in "3.6.0 unhashable type: 'list'" "3.8.0 taken"; do
  version=${case%% *}
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --no-compile "triton==$version"
  "$folder/$version/bin/python" "$folder/kernel.py" "${case#* }"
done
