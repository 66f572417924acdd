"""Training that starts from an adapter: the files of an earlier run put into fresh adapters of the same shape.

A run of adapt writes T parts of rank r (q, k, v) as one LoRA of rank T r, whose B is block-diagonal (lora.py); here its
blocks go back to the parts. The file's scale s' may differ from s of the new adapters (--strength): s B A = s' B' A'
with A = A' and B = B' s' / s.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from upstep_fast.errors import ConfigError
from upstep_fast.model import adapter_base, peft_config, peft_tensors
from upstep_fast.model.lora import LoraLinear
from upstep_fast.model.peft_config import AdapterConfig
from upstep_fast.model.peft_tensors import AdapterTensors


@torch.no_grad()
def start_from(adapters: Mapping[str, LoraLinear], folder: Path, *, base_record: str, model: str) -> None:
    """Copy the adapter in `folder` into fresh adapters, in place.

    base_record: `adapter_base.record` of the base model, called `model`. Raises ConfigError, before anything is
    changed, for another base model, other modules, ranks or parts, and for an adapter that is more than LoRA.
    """
    peft_tensors.require_files(folder)
    config = peft_config.read(folder)
    tensors = peft_tensors.read(folder, config)
    if tensors.of_modules or tensors.bare or str(config.init).lower() in peft_config.CHANGED_BASE:
        raise ConfigError(
            f"from: the adapter in {folder} holds more than LoRA on the base model (fully trained weights, PiSSA or "
            "OLoRA), which a run cannot start from; export it (--format timm) and adapt the exported model"
        )
    adapter_base.check_record(base_record, model, folder, recorded=tensors.base, base_model=config.base_model)
    starts = _starts(adapters, config, tensors, folder)
    for name, adapter in adapters.items():
        a, b = starts[name]
        adapter.lora_a.copy_(a)
        adapter.lora_b.copy_(b)


def _starts(
    adapters: Mapping[str, LoraLinear], config: AdapterConfig, tensors: AdapterTensors, folder: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A [T, r, K] and B [T, N / num_parts, r] of every adapter by its module's name."""
    cure = "give --lora-r, --lora-targets and --lora-blocks of the run that wrote it"
    if different := sorted(tensors.pairs.keys() ^ adapters.keys()):
        raise ConfigError(
            f"from: the adapter in {folder} is on other modules than this run's ({different[0]}, "
            f"{len(different)} in all); {cure}"
        )
    starts = {}
    for name, adapter in adapters.items():
        a, b = tensors.pairs[name]
        shapes = [list(matrix.shape) for matrix in adapter.as_one()]
        if [list(a.shape), list(b.shape)] != shapes:
            raise ConfigError(
                f"from: A and B of {name} in {folder} are {list(a.shape)} and {list(b.shape)}, this run's "
                f"{shapes[0]} and {shapes[1]}; {cure}"
            )
        rows, r = adapter.lora_b.shape[1:]
        blocks = [b[part * rows : (part + 1) * rows, i * r : (i + 1) * r] for i, part in enumerate(adapter.parts)]
        if sum(int(block.count_nonzero()) for block in blocks) != int(b.count_nonzero()):
            raise ConfigError(f"from: B of {name} in {folder} mixes q, k and v; {cure}, or train it further in PEFT")
        starts[name] = (
            a.view_as(adapter.lora_a),
            torch.stack(blocks) * (config.scale(tensors.written[name]) / adapter.scale),
        )
    return starts
