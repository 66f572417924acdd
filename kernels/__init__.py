"""Kernels for adapting a frozen Vision Transformer. Copy this folder into another project and it works there.

>>> from upstep_fast.kernels import lora_linear, sinkhorn
>>> y = lora_linear(x, weight, bias, lora_a, lora_b, scale)

Every op runs on a CPU too; `report()` says which implementation ran and why, `forced` chooses one.
"""

from ._autotune import set_tuned, tuned
from ._dispatch import Choice, force, forced, report
from ._flops import register_flop_formulas
from .attention import attention
from .center_vector import center_vector_finish, center_vector_partial, center_vector_update
from .gelu import gelu
from .layer_norm import add_layer_norm, layer_norm
from .lora_linear import lora_linear
from .lora_linear.fp8 import lora_linear_fp8
from .low_rank_mixer import low_rank_mixer
from .patchify import patchify
from .quantize import dequantize, quantize
from .sinkhorn import sinkhorn
from .sinkhorn.scored import scored_sinkhorn
from .swapped_loss import swapped_cross_entropy

__all__ = [
    "Choice",
    "add_layer_norm",
    "attention",
    "center_vector_finish",
    "center_vector_partial",
    "center_vector_update",
    "dequantize",
    "force",
    "forced",
    "gelu",
    "layer_norm",
    "lora_linear",
    "lora_linear_fp8",
    "low_rank_mixer",
    "patchify",
    "quantize",
    "register_flop_formulas",
    "report",
    "scored_sinkhorn",
    "set_tuned",
    "sinkhorn",
    "swapped_cross_entropy",
    "tuned",
]
