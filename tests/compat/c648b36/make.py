"""Run at commit c648b36 in an empty folder: what an earlier version leaves on a user's disk. Later:

upstep-fast embed --model local-dir:model --data photos --adapter run/adapter --fit-whitening whitening.safetensors
    --out features.npy --precision fp32 --device cpu --implementation reference; and the checkpoint of step 8 removed.
"""

from pathlib import Path

import timm
import torch
from PIL import Image

import upstep_fast

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5)
torch.manual_seed(0)
vit = timm.create_model("vit_tiny_patch16_224", **SMALL)
timm.models.save_for_hf(vit, "model", model_args=SMALL, safe_serialization=True)
generator = torch.Generator().manual_seed(0)
Path("photos").mkdir()
for i in range(12):
    coarse = torch.rand(1, 3, 5, 5, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=40, mode="bicubic")[0].clamp(0, 1)
    Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy()).save(f"photos/{i:02}.png")
upstep_fast.adapt(
    model="local-dir:model", data="photos", out="run", steps=8, batch_size=8, prototypes=8, head_hidden=32, head_dim=16,
    lora_r=2, gate_rate=0.6, cvr_weight=0.5, checkpoint_every=4, report_images=False, num_workers=0, precision="fp32",
    device="cpu", implementation="reference",
)  # fmt: skip
