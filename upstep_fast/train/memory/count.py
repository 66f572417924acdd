"""Memory of one training step by category, counted on tensors that have shapes but no bytes.

The training code itself runs on PyTorch's fake tensors and decides what is saved for backward, so memory levels,
layouts and models need no formulas of their own. Every storage that an operator returns counts from its creation to its
release:

    live(t) = sum of the bytes of all storages alive at t            peak = max over t of live(t)

Temporary memory inside an operator is invisible from outside; that of attention, the only one that matters, is added by
a formula (`hidden_bytes`), that of cuBLAS as a constant.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from upstep_fast import methods
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.flat import replace_flat
from upstep_fast.data.loading.loader import Batch
from upstep_fast.data.loading.prefetch import DEPTH
from upstep_fast.engine.fold import FoldedBlock
from upstep_fast.engine.vit import EngineViT
from upstep_fast.kernels import register_flop_formulas
from upstep_fast.kernels._dispatch import NAMESPACE
from upstep_fast.kernels.attention.op import MAX_STORED
from upstep_fast.model import backbone as backbones
from upstep_fast.runtime.device import Compute
from upstep_fast.train.step import forward_loss

PARTS = ("weights", "folded", "adapters", "optimizer", "gradients", "views", "activations", "workspace")
CUBLAS_BYTES = {
    "hopper": 2 * (32 << 20),
    "older": 2 * (8 << 20),
}  # one for the forward's thread, one for the backward's


@dataclass(frozen=True)
class StepMemory:
    """Peak bytes of an update step by category, and FLOPs of its forward and backward half."""

    parts: dict[str, int]  # bytes by PARTS at the peak
    kept: int  # bytes of activations saved for backward
    waiting: int  # bytes of prefetched views on a GPU (data/loading/prefetch.py), beyond the peak
    trained: int  # number of trained values
    forward_flops: int
    backward_flops: int

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


def count(config: AdaptConfig, compute: Compute, *, on: str | None = None, flops: bool = False) -> StepMemory:
    """Count an update step of one batch; no weight is loaded or allocated, nothing is computed.

    on: "cuda", "mps" or "cpu", the device of the counted step; None: compute.device. flops: count FLOPs too, which
    takes longer. Raises ConfigError for an unknown model.
    """
    # graphs hold what a step holds; frozen blocks are counted in the step where their tokens are kept, an upper bound
    on, config = on or compute.device.type, replace_flat(config, cuda_graphs=False, view_uses=1)
    # autograd cannot run backward for a device that is absent: a CPU stands in
    stands_in = on == "mps" or (on == "cuda" and not torch.cuda.is_available())
    device = torch.device("cpu" if stands_in else on)
    with torch.device("meta"):
        backbone = backbones.load_from(config.model, pretrained=False)
    seen = _Storages(on, _library_bytes(compute) if on == "cuda" else 0)
    # one mode for both parts: a second mode would take the first one's tensors for real ones and copy them
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    # what the engine leaves to torch.compile is counted in eager mode: an upper bound
    with fake, seen, device, torch.compiler.set_stance("force_eager"):
        method, optimizer = _prepare(backbone, config, compute, seen, fuses=stands_in and on == "cuda")
    likes = _view_shapes(method, len(backbone.mean), config.optimization.batch_size)
    with fake, seen, device, torch.compiler.set_stance("force_eager"):
        seen.part = "views"
        views = tree_map(lambda like: torch.empty(like.shape, dtype=like.dtype), likes)
        context = torch.autocast("cpu", dtype=compute.dtype) if stands_in and compute.dtype else compute.autocast()
        seen.part = "activations"
        with _counter(flops) as forward, context:
            loss = forward_loss(method, views, config)
        saved = seen.live["activations"]
        optimizer.zero_grad(set_to_none=True)
        seen.part = "workspace"
        with _counter(flops) as backward, torch.autograd.set_multithreading_enabled(False):
            loss.backward()
        optimizer.step()
    parts = {part: seen.at_peak[part] for part in PARTS}
    # activations that the forward pass frees again are workspace
    parts["workspace"] += max(0, parts["activations"] - saved)
    parts["activations"] = min(parts["activations"], saved)
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    waiting = (1 + DEPTH) * parts["views"] if on == "cuda" else 0
    return StepMemory(parts, saved, waiting, trained, forward.get_total_flops(), backward.get_total_flops())


def _prepare(
    backbone: backbones.Backbone, config: AdaptConfig, compute: Compute, seen: _Storages, fuses: bool
) -> tuple[Any, torch.optim.Optimizer]:
    """Return the method, with gradients, and its optimizer, with moments: the first step has neither."""
    seen.part = "weights"
    without_bytes(backbone.vit)
    seen.part = "adapters"
    method = methods.build(backbone, config)
    seen.part = "folded"
    if config.runtime.implementation != "reference":
        method.accelerate(compute.dtype or torch.float32, config.memory.level, compute.fp8)  # type: ignore[arg-type]
    if fuses and compute.dtype is not None:
        _fuse(method)
    seen.part = "gradients"
    for group in method.parameter_groups():
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
            parameter.register_post_accumulate_grad_hook(lambda p: seen.rename(p.grad, "gradients"))
    seen.part = "optimizer"
    optimizer = torch.optim.AdamW(method.parameter_groups(), fused=True)
    optimizer.step()
    return method, optimizer


def hidden_bytes(shape: torch.Size, itemsize: int, on: str) -> int:
    """Return the temporary bytes of attention's backward. shape: of packed qkv, [B, T, 3, H, d].

    CPU: separate dq, dk and dv in fp32; in 16 bit also fp32 copies of qkv, o and their gradients (kernels/attention),
    or for short sequences copies of qkv and the gradient in bf16, with scores in fp32, P and dS.
    GPU: separate dq, dk and dv, and the library's fp32 sum of dq over tiles of 128 tokens.
    """
    images, tokens, _, heads, width = shape
    values = images * tokens * heads * width
    if on == "cpu" and itemsize == 2 and tokens <= MAX_STORED:
        scores = images * heads * tokens**2
        return 8 * values + max(8 * values + 4 * scores, 6 * scores)
    if on == "cpu":
        return (12 if itemsize >= 4 else 12 + 4 + 4 + 12 + 12) * values
    return 3 * itemsize * values + 4 * images * heads * width * 128 * -(-tokens // 128)


class _Storages(TorchDispatchMode):
    """Dispatch mode that tracks every new storage under the current category, `part`.

    on: "cuda" or "cpu". library: bytes of the libraries' workspace.
    """

    def __init__(self, on: str, library: int):
        super().__init__()
        self.part = "workspace"
        self.live: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._peak, self._on = 0, on
        self._known: dict[int, tuple[str, int]] = {}
        self.live["workspace"] = library

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the operator and track the storages of its results."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        if func._schema.name == f"{NAMESPACE}::attention_backward":
            self._note(hidden_bytes(args[1].shape, args[1].element_size(), self._on))
        return out

    def rename(self, tensor: Tensor | None, part: str) -> None:
        """Move the storage of `tensor` to another category."""
        key = tensor.untyped_storage()._cdata if tensor is not None else 0
        if key in self._known:
            previous, size = self._known[key]
            self.live[previous] -= size
            self.live[part] += size
            self._known[key] = part, size

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = self.part, storage.nbytes()
            self.live[self.part] += storage.nbytes()
            weakref.finalize(storage, self._drop, storage._cdata)
            self._note()

    def _drop(self, key: int) -> None:
        part, size = self._known.pop(key)
        self.live[part] -= size

    def _note(self, hidden: int = 0) -> None:
        total = sum(self.live.values()) + hidden
        if total > self._peak:
            self._peak, self.at_peak = total, self.live.copy()
            self.at_peak["workspace"] += hidden


def without_bytes(vit: nn.Module) -> None:
    """Replace frozen "meta" tensors by tensors of the current device and mode, in place."""
    # `to_empty` swaps tensors, which fake tensors refuse
    for module in vit.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _view_shapes(method: Any, channels: int, batch: int) -> Any:
    """Return the views of `batch` images as meta tensors.

    Each side is linear in the number of images; the line is taken through those of 2 and 3 images.
    """

    def views_of(count: int) -> Any:
        images = [torch.zeros(channels, 64, 64, dtype=torch.uint8)] * count
        return method.views(Batch(images, torch.arange(count), 0, 0), torch.device("cpu"))

    def line(two: Tensor, three: Tensor) -> Tensor:
        shape = [a + (b - a) * (batch - 2) for a, b in zip(two.shape, three.shape, strict=True)]
        return torch.empty(shape, dtype=two.dtype, device="meta")

    return tree_map(line, views_of(2), views_of(3))


def _fuse(method: Any) -> None:
    # on a GPU the engine chooses the fused form itself
    engine = getattr(getattr(method, "features", None), "__self__", None)
    if isinstance(engine, EngineViT):
        fused = [replace(block, fused=True) if isinstance(block, FoldedBlock) else block for block in engine.blocks]
        engine.blocks[:] = fused


def _counter(is_on: bool) -> FlopCounterMode | _NoCounter:
    register_flop_formulas()
    return FlopCounterMode(display=False) if is_on else _NoCounter()


class _NoCounter(contextlib.nullcontext):
    def __enter__(self) -> _NoCounter:
        return self

    def get_total_flops(self) -> int:
        return 0


def _library_bytes(compute: Compute) -> int:
    is_older = torch.cuda.is_available() and torch.cuda.get_device_capability(compute.device)[0] < 9
    return CUBLAS_BYTES["older" if is_older else "hopper"]
