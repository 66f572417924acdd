"""Which device and which precision a run uses, resolved once and said aloud."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from upstep_fast.errors import ConfigError
from upstep_fast.runtime import distributed

_DTYPES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class Compute:
    """Where and how a run computes."""

    device: torch.device
    precision: str  # fp32, fp16, bf16 or fp8

    @property
    def dtype(self) -> torch.dtype | None:
        """The autocast type; None: plain fp32."""
        return _DTYPES[self.precision]

    @property
    def fp8(self) -> bool:
        """Whether frozen weights are in row-wise fp8; all else is in bf16."""
        return self.precision == "fp8"

    def autocast(self) -> contextlib.AbstractContextManager:
        """Run matrix products in `precision`. To be entered after no_grad, which chooses the CPU's attention."""
        stack = contextlib.ExitStack()
        if self.dtype is not None:
            stack.enter_context(torch.autocast(self.device.type, dtype=self.dtype))
            if self.device.type == "cpu" and torch.is_grad_enabled():
                # the fused attention's bf16 backward is slow on CPUs, and so are explicit products in fp32: forward and
                # backward at [8, 12, 197, 64] take 65 and 81 ms, explicit products in bf16 36 (one thread of an Intel
                # Xeon with AMX, torch 2.15). The fused forward alone is fast, so without gradients it stays
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # the CPU's too, whatever its name
                stack.callback(torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp, before)
                torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(self.dtype == torch.bfloat16)
        return stack


def resolve(device: str, precision: str) -> Compute:
    """Turn "auto" into facts; under torchrun each process has a GPU of its own.

    Raises ConfigError when the machine lacks what was asked for.
    """
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError as error:
        raise ConfigError(f"device: {device!r} is not a device; use auto, cpu, cuda or cuda:N") from error
    if found.type == "cuda" and found.index is None and distributed.launched():
        found = torch.device("cuda", distributed.local_rank())
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: {found.type} is not supported; use auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {device} is not there ({torch.cuda.device_count()} GPUs found); use --device cpu")
    if precision == "auto":
        return Compute(found, _fast_precision(found))
    if precision == "fp16" and found.type == "cpu":
        raise ConfigError("precision: fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if precision == "fp8" and (found.type == "cpu" or torch.cuda.get_device_capability(found) < (8, 9)):
        raise ConfigError("precision: fp8 needs a GPU that multiplies it (Ada, Hopper or newer); use bf16")
    if precision == "bf16" and found.type == "cuda" and torch.cuda.get_device_capability(found)[0] < 8:
        raise ConfigError("precision: this GPU has no bf16 (it came with Ampere); use fp16 or fp32")
    return Compute(found, precision)


def _fast_precision(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    # bf16 on a CPU pays only where it multiplies bf16 natively (AVX512-BF16 or AMX); elsewhere it is emulated
    native = any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16" if native else "fp32"
