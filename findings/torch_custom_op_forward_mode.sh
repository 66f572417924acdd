#!/usr/bin/env bash
# torch 2.14.1: a torch.library.custom_op with register_autograd has no forward-mode formula, and torch.func.jvp through it
# returns a tangent of zeros instead of an error, where no input requires grad.
# Seen: jvp of 3 x through such an op gives 0 instead of 3.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import torch

@torch.library.custom_op("findings::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    return 3 * x

triple.register_fake(torch.empty_like)
triple.register_autograd(lambda ctx, grad: 3 * grad)
x = torch.ones(2)
plain = torch.func.jvp(lambda x: 3 * x, (x,), (torch.ones(2),))[1]
custom = torch.func.jvp(triple, (x,), (torch.ones(2),))[1]
print("tangent of 3 x:", plain.tolist(), "through the custom op:", custom.tolist())
assert plain.tolist() == [3, 3] and custom.tolist() == [0, 0]
EOF
