"""Device and precision of a run, resolved once."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from upstep_fast.errors import ConfigError
from upstep_fast.runtime import distributed, exit_signals

_NAMES = {"cpu": "a CPU", "cuda": "a GPU", "mps": "an Apple GPU"}
_DTYPES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class Compute:
    """The device and precision of a run."""

    device: torch.device
    precision: str  # fp32, fp16, bf16 or fp8

    @property
    def dtype(self) -> torch.dtype | None:
        """The autocast dtype; None: fp32 without autocast."""
        return _DTYPES[self.precision]

    @property
    def fp8(self) -> bool:
        """True if frozen weights are in row-wise fp8 and everything else is in bf16."""
        return self.precision == "fp8"

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return a context for matrix products in `precision`. Enter it after no_grad, which selects CPU attention."""
        stack = contextlib.ExitStack()
        if self.dtype is not None:
            stack.enter_context(torch.autocast(self.device.type, dtype=self.dtype))
            if self.device.type == "cpu" and torch.is_grad_enabled():
                # the backward pass of fused attention in bf16 is slow on CPUs, and so are explicit products in fp32:
                # forward and backward at [8, 12, 197, 64] take 65 and 81 ms, explicit products in bf16 36 ms (one
                # thread of an Intel Xeon with AMX, torch 2.15). The fused forward pass alone is fast: it is kept
                # where no gradients are needed
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # applies to CPUs too
                stack.callback(torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp, allowed)
                torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(self.dtype == torch.bfloat16)
        return stack


def resolve(device: str, precision: str, implementation: str = "auto") -> Compute:
    """Return the device and precision, with "auto" resolved; under torchrun each process gets its own GPU.

    Raises ConfigError if the machine does not have the device or the precision, or the device not the implementation.
    """
    exit_signals.check()  # every command comes here once torch is imported
    resolved = _resolve_device(device)
    interpreted = implementation == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if implementation in ("triton", "cuda") and resolved.type != "cuda" and not interpreted:
        raise ConfigError(
            f"implementation: {implementation} needs a CUDA GPU, the device is {resolved.type}; use auto or reference"
        )
    if precision == "auto":
        return Compute(resolved, _fast_precision(resolved))
    if precision == "fp16" and resolved.type != "cuda":  # the loss scaling computes in float64, which MPS lacks
        raise ConfigError(f"precision: fp16 needs a CUDA GPU; use bf16 or fp32 on {_NAMES[resolved.type]}")
    if precision == "fp8" and (resolved.type != "cuda" or torch.cuda.get_device_capability(resolved) < (8, 9)):
        raise ConfigError("precision: fp8 needs a GPU with fp8 matrix products (Ada, Hopper or newer); use bf16")
    if precision == "bf16" and resolved.type == "cuda" and torch.cuda.get_device_capability(resolved)[0] < 8:
        raise ConfigError("precision: this GPU has no bf16, which needs Ampere or newer; use fp16 or fp32")
    return Compute(resolved, precision)


def _resolve_device(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ConfigError(f"device: {name!r} is not a device; use auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda" and device.index is None and distributed.launched():
        device = torch.device("cuda", distributed.local_rank())
    if device.type not in _NAMES:
        raise ConfigError(f"device: {device.type} is not supported; use auto, cpu, cuda, cuda:N or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device: mps needs an Apple GPU, which torch does not find here; use --device cpu")
    if device.type == "mps" and distributed.launched():
        raise ConfigError("device: mps runs in one process; start without torchrun, or use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {name} does not exist ({torch.cuda.device_count()} GPUs found); use --device cpu")
    return device


def _fast_precision(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    if device.type == "mps":
        return "fp32"  # bf16 on request: not measured
    # on a CPU bf16 is faster only with native bf16 products (AVX512-BF16 or AMX); without them it is emulated
    native = any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16" if native else "fp32"
