#!/usr/bin/env bash
# torch 2.14.1: once_differentiable promises an error when its backward is differentiated again. With create_graph=True and
# the usual constant gradient of the output, no error comes: the second derivative's part through backward is missing.
# Seen: y = x^3 at 2, d/dx (x dy/dx) should be 9 x^2 = 36; 12 is returned.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import torch
from torch.autograd.function import once_differentiable

class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad

x = torch.tensor(2.0, requires_grad=True)
(slope,) = torch.autograd.grad(Cube.apply(x), x, create_graph=True)
(second,) = torch.autograd.grad(slope * x, x)
print("d/dx (x dy/dx):", second.item(), "expected 36")
assert second.item() == 12
EOF
