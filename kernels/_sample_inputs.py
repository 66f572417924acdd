"""Sample inputs of each op, for the self-check (`python -m <this folder>`, `upstep-fast doctor`) and the tests."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleInputs:
    """Small call of an op: `call` and `reference` take the same tensors, floating ones in the dtype to check."""

    call: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    wrt: tuple[int, ...] = ()  # inputs whose gradients are compared
    limit: float = 0.0  # where the op rounds more coarsely than its dtype

    def to(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Return the inputs on `device`, floating ones in `dtype`."""
        return [t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in self.inputs]


def _normals(*shapes: tuple[int, ...]) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) for shape in shapes)


def _attention(ops: ModuleType) -> SampleInputs:
    return SampleInputs(
        ops.attention, lambda x: ops.attention_reference(x, 64**-0.5)[0], (*_normals((2, 17, 3, 2, 64)),), (0,)
    )


def _center_vector(ops: ModuleType) -> SampleInputs:
    def of(update: Callable[..., tuple[Tensor, ...]]) -> Callable[[Tensor], Tensor]:
        new_state = importlib.import_module(".gate", __package__).new_gate_state

        def call(u: Tensor) -> Tensor:
            z, center, *_ = update(u, new_state(u.shape[1], u.device))
            return torch.cat([z.flatten(), center])

        return call

    return SampleInputs(of(ops.center_vector_update), of(ops.center_vector_reference), (*_normals((32, 48)),), (0,))


def _gelu(ops: ModuleType) -> SampleInputs:
    # backward keeps a byte an entry, whose derivative has an RMS error of 1.5e-3
    return SampleInputs(ops.gelu, ops.gelu_reference, (*_normals((64, 96)),), (0,), limit=5e-3)


def _layer_norm(ops: ModuleType) -> SampleInputs:
    return SampleInputs(
        ops.layer_norm,
        lambda *args: ops.layer_norm_reference(*args)[0],
        (*_normals((64, 96), (96,), (96,)),),
        (0, 1, 2),
    )


def _lora_linear(ops: ModuleType) -> SampleInputs:
    def of(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *tensors: op(*tensors, 0.5)

    inputs = (*_normals((64, 96), (48, 96), (48,), (4, 96), (48, 4)),)
    return SampleInputs(of(ops.lora_linear), of(ops.lora_linear_reference), inputs, (0, 3, 4))


def _lora_linear_fp8(ops: ModuleType) -> SampleInputs:
    def of(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, scale, *rest: op(x, w.to(torch.float8_e4m3fn), scale.float(), *rest, 0.5)

    x, weight, *rest = _normals((64, 96), (48, 96), (48,), (4, 96), (48, 4))
    weight, scale = importlib.import_module(".quantize", __package__).quantize_reference(weight)
    inputs = (x, weight.float(), scale.bfloat16(), *rest)
    # Hopper's fp8 products keep about 14 bits of a sum
    return SampleInputs(of(ops.lora_linear_fp8), of(ops.lora_linear_fp8_reference), inputs, (0, 4, 5), limit=2e-3)


def _low_rank_mixer(ops: ModuleType) -> SampleInputs:
    def of(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda b, a, *factors: op(b, a, ("channel", "token"), factors)

    small = (0.1 * t for t in _normals((4, 96), (4,), (96, 4), (96,), (3, 33), (3,), (33, 3), (33,)))
    inputs = (*_normals((2, 33, 96), (2, 33, 96)), *small)
    return SampleInputs(of(ops.low_rank_mixer), of(ops.low_rank_mixer_reference), inputs, tuple(range(1, 10)))


def _patchify(ops: ModuleType) -> SampleInputs:
    return SampleInputs(
        lambda x: ops.patchify(x, 4),
        lambda x: ops.patchify_reference(x, 4, x.dtype),
        (*_normals((2, 3, 16, 24)),),
        (0,),
    )


def _quantize(ops: ModuleType) -> SampleInputs:
    def of(op: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
        return lambda x: ops.dequantize(*op(x))

    return SampleInputs(of(ops.quantize), of(ops.quantize_reference), (*_normals((64, 96)),))


def _scored_sinkhorn(ops: ModuleType) -> SampleInputs:
    def of(op: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        return lambda z, centers: torch.cat(op(z, centers, 0.05, 3))

    z, centers = (torch.nn.functional.normalize(t, dim=1) for t in _normals((40, 16), (24, 16)))
    return SampleInputs(of(ops.scored_sinkhorn), of(ops.scored_sinkhorn_reference), (z, centers), (0, 1))


def _sinkhorn(ops: ModuleType) -> SampleInputs:
    def of(op: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda scores: op(scores, 0.05, 3)

    return SampleInputs(of(ops.sinkhorn), of(ops.sinkhorn_reference), (next(_normals((64, 24))).tanh(),))


def _swapped_loss(ops: ModuleType) -> SampleInputs:
    def of(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda scores, targets: op(scores, targets, 0.1)

    scores, targets = _normals((32, 24), (32, 24))
    inputs = (scores.tanh(), targets.softmax(1))
    return SampleInputs(of(ops.swapped_cross_entropy), of(ops.swapped_cross_entropy_reference), inputs, (0,))


def _views(ops: ModuleType) -> SampleInputs:
    def call(*tensors: Tensor) -> Tensor:
        inputs = [x.float() if x.is_floating_point() else x for x in tensors]  # factors are fp32 for any result
        options = {"interpolation": "bicubic", "taps": (5, 5), "patch": 8, "dtype": tensors[-1].dtype}
        return ops.make_views(*inputs, 16, 16, **options)

    def reference(*tensors: Tensor) -> Tensor:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return ops.views_reference(*tensors, 16, 16, "bicubic", (5, 5), 8, torch.float64)
        finally:
            torch.set_default_dtype(default)

    pixels = torch.randint(256, (3 * 40 * 30,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    boxes = torch.tensor([[0, 0, 0, 40, 30, 0], [0, 5, 3, 20, 12, 2], [0, 1, 2, 9, 8, 4]]).int()
    still, one = [1.0, 1.0, 1.0, 0.0, 0.0], [1.25, 0.75, 1.375, 0.125, 0.0]
    factors = torch.tensor([[*one, 0.0, 1.0], [0.75, 1.25, 0.625, 0.0, 1.0, 0.0, 0.0], [*still, 2.0, 0.0]])
    mean, std = torch.tensor([0.5, 0.375, 0.25]), torch.tensor([0.25, 0.3125, 0.25])
    return SampleInputs(call, reference, (pixels, torch.tensor([[0, 1200, 30, 1]]), boxes, factors, mean, std))


# where an op's module has another name
MODULES = {
    "lora_linear_fp8": "lora_linear.fp8",
    "scored_sinkhorn": "sinkhorn.scored",
}

# op -> its sample inputs
SAMPLE_INPUTS: dict[str, Callable[[ModuleType], SampleInputs]] = {
    "attention": _attention,
    "center_vector": _center_vector,
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "lora_linear": _lora_linear,
    "lora_linear_fp8": _lora_linear_fp8,
    "low_rank_mixer": _low_rank_mixer,
    "patchify": _patchify,
    "quantize": _quantize,
    "scored_sinkhorn": _scored_sinkhorn,
    "sinkhorn": _sinkhorn,
    "swapped_loss": _swapped_loss,
    "views": _views,
}


def sample_inputs(name: str) -> SampleInputs:
    """Return the sample inputs of op `name`, one of `SAMPLE_INPUTS`."""
    return SAMPLE_INPUTS[name](importlib.import_module(f".{MODULES.get(name, name)}", __package__))
