#!/usr/bin/env bash
# peft 0.21.2: LoraConfig(alora_invocation_tokens=...) on a model that is no causal language model is accepted, trains, and
# then does nothing: the adapter's output equals the base model's.
# Seen: largest difference from the base model 0 with the option, above 0.1 without it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 torch==2.14.1 timm==1.0.31 torchvision==0.29.1
cd "$folder"
venv/bin/python - <<'EOF'
import warnings
warnings.simplefilter("ignore")
import timm, torch
from peft import LoraConfig, PeftModel, get_peft_model

def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0).eval()

x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))

def trained(model):
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()

@torch.no_grad()
def difference(a, b):
    return (a(x) - b(x)).abs().max().item()

def effect(**options):
    config = LoraConfig(r=4, target_modules=["qkv"], **options)
    return difference(trained(get_peft_model(vit(), config)), vit())

without, with_tokens = effect(), effect(alora_invocation_tokens=[1])
print(f"effect of the adapter: {without:.2g}; with alora_invocation_tokens: {with_tokens:.2g}")
assert without > 0.1 and with_tokens == 0
EOF
