#!/usr/bin/env bash
# transformers 5.24.0: Dinov2Model resizes its position embeddings to another image size without antialiasing,
# Dinov2WithRegistersModel with it; the same weights at the same size therefore have other positions in the two.
# Seen: position embeddings of a 16 x 16 grid brought to 8 x 8 differ between the two classes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.14.1 torchvision==0.29.1 pillow==13.0.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import torch
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

options = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=14)
plain = Dinov2Model(Dinov2Config(**options))
registers = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**options, num_register_tokens=0))
positions = torch.randn(1, 257, 32, generator=torch.Generator().manual_seed(0))
for model in (plain, registers):
    model.embeddings.position_embeddings.data = positions.clone()
tokens = torch.zeros(1, 1 + 8 * 8, 32)
small = [model.embeddings.interpolate_pos_encoding(tokens, 112, 112) for model in (plain, registers)]
same = [model.embeddings.interpolate_pos_encoding(torch.zeros(1, 257, 32), 224, 224) for model in (plain, registers)]
difference = (small[0] - small[1]).abs().max().item()
print(f"at 224 equal: {torch.equal(*same)}; at 112 the largest difference is {difference:.2f}")
assert torch.equal(*same) and difference > 0.1
EOF
