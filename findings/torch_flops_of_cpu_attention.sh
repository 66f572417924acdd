#!/usr/bin/env bash
# torch 2.14.1: FlopCounterMode counts no operation of scaled_dot_product_attention on a CPU, whose fused form has no formula;
# with the form that is not fused it counts the two products.
# Seen: 0 FLOPs fused, 2 x 2 B H T^2 d FLOPs otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

B, H, T, d = 2, 3, 16, 8
q = torch.randn(B, H, T, d)

def flops(backend):
    with sdpa_kernel(backend), FlopCounterMode(display=False) as counter:
        F.scaled_dot_product_attention(q, q, q)
    return counter.get_total_flops()

fused, plain = flops(SDPBackend.FLASH_ATTENTION), flops(SDPBackend.MATH)
print("fused:", fused, "plain:", plain)
assert fused == 0 and plain == 4 * B * H * T * T * d
EOF
