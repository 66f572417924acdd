"""Frozen linear layer with a low-rank adapter."""

from .args import STRATEGIES
from .fp8 import lora_linear_fp8, lora_linear_fp8_reference
from .op import lora_linear, lora_linear_reference

__all__ = ["STRATEGIES", "lora_linear", "lora_linear_fp8", "lora_linear_fp8_reference", "lora_linear_reference"]
