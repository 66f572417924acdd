"""The run's own clusters over its steps: are they of one class, and do images stay in them?

    purity      share of images that belong to the largest class of their cluster
    NMI         2 I(cluster; class) / (H(cluster) + H(class))      Strehl and Ghosh 2002, arithmetic mean
    stability   share of images whose cluster is that of the look before

Looked at afterwards, in the checkpoints that a run kept, on labeled images that it did not see; no label enters the
training. An image's cluster is the prototype most similar to its embedding, as training would assign it without
Sinkhorn's balance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast import methods
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.files import from_options, read_toml
from upstep_fast.config.flat import replace_flat
from upstep_fast.data.loading.loader import load_images
from upstep_fast.data.sources.source import open_source
from upstep_fast.model import backbone as backbones
from upstep_fast.model import pooling
from upstep_fast.runtime import checkpoint
from upstep_fast.runtime.device import resolve
from upstep_fast.train.resume import STATE


def counts(assigned: Tensor, labels: Tensor) -> Tensor:
    """[K, C] fp64: images of each cluster and class. assigned, labels: [N] int64."""
    table = torch.zeros(int(assigned.max()) + 1, int(labels.max()) + 1, dtype=torch.float64)
    return table.index_put_((assigned, labels), torch.ones(len(labels), dtype=torch.float64), accumulate=True)


def purity(assigned: Tensor, labels: Tensor) -> float:
    """0 to 1; as many clusters as images are pure by themselves, so compare at one number of clusters."""
    return float(counts(assigned, labels).amax(1).sum() / len(labels))


def nmi(assigned: Tensor, labels: Tensor) -> float:
    """Return the normalized mutual information, 0 to 1; 1 where both are constant."""
    p = counts(assigned, labels) / len(labels)
    of_cluster, of_class = (torch.special.entr(p.sum(dim)).sum() for dim in (1, 0))
    mutual = of_cluster + of_class - torch.special.entr(p).sum()
    return float(2 * mutual / (of_cluster + of_class)) if of_cluster + of_class > 0 else 1.0


@torch.no_grad()
def history(run: Path, data: str) -> list[dict[str, Any]]:
    """Return a row per checkpoint of `run`: step, purity, nmi, stability (None at first), on `data`'s test part."""
    config = from_options(AdaptConfig, read_toml(run / "config.toml", AdaptConfig), "adapt")
    compute = resolve(config.runtime.device, config.runtime.precision)
    source = open_source(data, split="test")
    classes = {name: i for i, name in enumerate(sorted(set(source.labels or ())))}
    rows: list[dict[str, Any]] = []
    before: Tensor | None = None
    for path in sorted((run / "checkpoints").glob("step-*")):
        found = checkpoint.load(path)
        state = safetensors.torch.load(found.files[STATE])
        base = backbones.load_from(config.model)
        method: Any = methods.build(base, replace_flat(config, prototypes=len(state["method.prototypes"])))
        for name, tensor in method.state_tensors().items():
            tensor.copy_(state[f"method.{name}"])
        method.to(compute.device)
        assigned, labels = [], []
        for indices, images in load_images(source, range(len(source)), **base.eval_transform_args, num_workers=1):
            x = base.normalized(images, compute.device)
            z = F.normalize(method.head(pooling.features(method.vit, x)).float(), dim=-1)
            assigned.append((z @ F.normalize(method.prototypes, dim=-1).T).argmax(1).cpu())
            labels += [classes[source.labels[i]] for i in indices.tolist()]  # type: ignore[index]
        now, truth = torch.cat(assigned), torch.tensor(labels)
        stability = None if before is None else float((now == before).double().mean())
        rows.append({"step": found.step, "purity": purity(now, truth), "nmi": nmi(now, truth), "stability": stability})
        before = now
    return rows
