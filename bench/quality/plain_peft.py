"""The method as a user of timm, PEFT and torchvision would write it: the baseline of time_to_gain.py.

    python bench/quality/plain_peft.py --model local-dir:PATH --data FOLDER --out OUT --steps 160 --batch-size 64

FOLDER holds images in any folders; OUT gets a PEFT adapter. The losses are those of methods/losses: clustering with
fixed prototypes and Sinkhorn targets (swapped), or VICReg; SimCLR's InfoNCE is here alone. The views are those of the
preset "natural". Nothing of upstep_fast is used.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """Two random views of each image in a folder, decoded once and kept in memory."""

    def __init__(self, folder: Path, transform: v2.Transform):
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        self.images = [v2.functional.to_image(Image.open(path).convert("RGB")) for path in paths]
        self.transform = transform

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return two views, [C, H, W] each."""
        return self.transform(self.images[index]), self.transform(self.images[index])


def views(model: nn.Module, crop_min: float) -> v2.Transform:
    """Return the random changes that make a view, at the model's input size."""
    data = timm.data.resolve_model_data_config(model)
    return v2.Compose(
        [
            v2.RandomResizedCrop(data["input_size"][1:], scale=(crop_min, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2),
            v2.RandomGrayscale(0.2),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(data["mean"], data["std"]),
        ]
    )


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Return targets [B, K] of scores [B, K]: rows sum to 1, columns are used equally."""
    q = torch.exp((scores - scores.max()) / epsilon)
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q


def clustering(z: tuple[Tensor, Tensor], prototypes: Tensor, temperature: float = 0.1) -> Tensor:
    """Return the swapped loss of the embeddings of two views, [B, d] each."""
    a, b = (F.normalize(x.float(), dim=-1) @ prototypes.T for x in z)
    pairs = ((sinkhorn(a), b), (sinkhorn(b), a))
    return sum(-(q * F.log_softmax(p / temperature, -1)).sum(-1).mean() for q, p in pairs) / 2


def vicreg(z: tuple[Tensor, Tensor]) -> Tensor:
    """Return variance, invariance and covariance of the embeddings of two views, weighted 25, 25, 1."""
    a, b = (x.float() for x in z)
    loss = 25 * F.mse_loss(a, b)
    for x in (a, b):
        x = x - x.mean(0)
        loss = loss + 12.5 * F.relu(1 - (x.var(0) + 1e-4).sqrt()).mean()
        covariance = x.T @ x / (len(x) - 1)
        loss = loss + (covariance.square().sum() - covariance.diagonal().square().sum()) / x.shape[1]
    return loss


def simclr(z: tuple[Tensor, Tensor], temperature: float = 0.1) -> Tensor:
    """Return InfoNCE of the embeddings of two views, [B, d] each: each view tells the other from 2 B - 2 more."""
    unit = F.normalize(torch.cat(z).float(), dim=-1)
    scores = (unit @ unit.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(scores, torch.arange(len(unit)).roll(len(z[0])))


OBJECTIVES = {"clustering": clustering, "vicreg": vicreg, "simclr": simclr}


def forever(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of one epoch after the other."""
    while True:
        yield from loader


def rate(step: int, steps: int, warmup: int) -> float:
    """Return the learning rate of a step as a fraction of its peak: a linear warm-up, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def main() -> None:
    """Train, and save the adapter."""
    parser = argparse.ArgumentParser()
    for name, kind, default in (
        *(("model", str, None), ("data", Path, None), ("out", Path, None), ("objective", str, "clustering")),
        *(("steps", int, 160), ("batch-size", int, 64), ("lr", float, 3e-3), ("crop-min", float, 0.5)),
        *(("prototypes", int, 300), ("blocks", int, 0), ("workers", int, 1), ("seed", int, 0), ("bf16", int, 0)),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, required=default is None)
    o = parser.parse_args()
    torch.manual_seed(o.seed)
    model = timm.create_model(o.model, pretrained=True, num_classes=0)
    dataset = TwoViews(o.data, views(model, o.crop_min))
    blocks = list(range(len(model.blocks)))[-o.blocks :]
    targets = [f"blocks.{i}.attn.qkv" for i in blocks]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=targets))
    head = nn.Sequential(nn.Linear(model.num_features, 1024), nn.GELU(), nn.Linear(1024, 128))
    prototypes = F.normalize(torch.randn(o.prototypes, 128), dim=-1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained}, {"params": head.parameters()}], lr=o.lr, weight_decay=0.0)
    warmup = max(1, o.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, o.steps, warmup))
    loader = DataLoader(
        dataset, o.batch_size, shuffle=True, drop_last=True, num_workers=o.workers, persistent_workers=o.workers > 0
    )
    model.train()
    for step, pair in enumerate(itertools.islice(forever(loader), o.steps)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(o.bf16)):
            z = head(model(torch.cat(pair))).chunk(2)
        loss = OBJECTIVES[o.objective](z, *([prototypes] if o.objective == "clustering" else []))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            print(f"step {step} loss {loss.item():.3f}", flush=True)
    model.save_pretrained(o.out)


if __name__ == "__main__":
    main()
