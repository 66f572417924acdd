#!/usr/bin/env bash
# peft 0.21.2: with target_parameters, alpha_pattern is matched against the parameter's name, so the module's name, which
# works with target_modules, is ignored without a word.
# Seen: alpha_pattern {"qkv": 20} changes the features with target_modules and not with target_parameters.
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

def effect(pattern, **target):
    def features(alpha_pattern):
        config = LoraConfig(r=4, lora_alpha=6, alpha_pattern=alpha_pattern, **target)
        return trained(get_peft_model(vit(), config))
    return difference(features(pattern), features({}))

modules = effect({"qkv": 20}, target_modules=["qkv"])
parameters = effect({"qkv": 20}, target_modules=[], target_parameters=["attn.qkv.weight"])
full_name = effect({"qkv.weight": 20}, target_modules=[], target_parameters=["attn.qkv.weight"])
print(f"effect of the pattern: modules {modules:.2g}, parameters {parameters:.2g}, by the parameter's name {full_name:.2g}")
assert modules > 0.1 and parameters == 0 and full_name > 0.1
EOF
